"""The paper's recipe for Natural Questions: RoBERTa-large, untied prompts of length 32, 128 × 2 a step.

python -m dptdr_jax.main --config=configs/nq.py --config.data.dir=DATA --workdir=runs/nq

DATA holds psgs_w100.tsv.gz, biencoder-nq-{train,dev}.json.gz and nq-test.qa.csv; --config.data.download fetches them.
"""

from configs import base


def get_config():
  """RIP, stage 1 on the BM25 negatives of DPR's files, UNM, stage 2 from fresh prompts."""
  c = base.get_config()
  c.backbone.path = "roberta-large"
  c.data.format = "nq"
  c.text.separator = "</s>"
  c.pretrain.enabled = True  # RIP on the Wikipedia passages, at the defaults, which are coCondenser's
  c.pretrain.chunk = 32  # with the next line it fits 16 GB of memory
  c.pretrain.remat = "attention"
  c.prompt.length = 32
  c.prompt.tied = False
  c.train.epochs = 60.0
  c.train.queries = 128
  c.train.passages = 2
  c.train.positive = "first"
  c.train.query_chunk = 8
  c.train.passage_chunk = 128
  c.train.remat = "attention"  # memory is what accelerators lack, and by roofline it is no slower
  c.train.checkpoint_every = 1000
  c.train.evaluate_every = 2000
  c.train.evaluate_passages = 100_000
  c.train.evaluate_queries = 6515
  c.rounds = 2  # UNM: the negatives of round 2 are BM25's and those of round 1's retriever in one pool, denoised
  c.mine.bm25.depth = 200
  c.mine.dense.depth = 200
  c.mine.dense.relative_margin = 1.0  # raw dot products: any other share of them depends on where they have their zero
  c.encode.dtype = "float16"
  c.evaluate.splits = ("test",)
  c.evaluate.measures = ("Success@5", "Success@20", "Success@100")
  c.evaluate.answers = True
  c.evaluate.depth = 100
  return c
