"""The paper's recipe for MS MARCO passage ranking: RoBERTa-large, tied prompts of length 128, 64 × 30 a step.

python -m dptdr_jax.main --config=configs/msmarco.py --config.data.dir=DATA --workdir=runs/msmarco

DATA holds collection.tsv, queries.{train,dev.small}.tsv, qrels.{train,dev.small}.tsv, qidpidtriples.train.full.2.tsv.gz
and, for the title-augmented corpus that the paper reports on, para.title.txt; --config.data.download fetches them. With
TREC DL's files there too: --config.evaluate.splits="('dev','dl19','dl20')"
"""

from configs import base


def get_config():
  """RIP, stage 1 on BM25 negatives, UNM, stage 2 from fresh prompts."""
  c = base.get_config()
  c.backbone.path = "roberta-large"
  c.data.format = "msmarco"
  c.data.title_augmented = True
  c.text.separator = "</s>"
  c.pretrain.enabled = True  # RIP on the MS MARCO passages, at the defaults, which are coCondenser's
  c.pretrain.chunk = 32  # with the next line it fits 16 GB of memory
  c.pretrain.remat = "attention"
  c.prompt.length = 128
  c.train.epochs = 10.0
  c.train.queries = 64
  c.train.passages = 30
  c.train.query_chunk = 8
  c.train.passage_chunk = 120
  c.train.remat = "attention"  # memory is what accelerators lack, and by roofline it is no slower
  c.train.checkpoint_every = 1000
  c.train.evaluate_every = 5000
  c.train.evaluate_passages = 100_000
  c.train.evaluate_queries = 6980
  c.rounds = 2  # UNM: the negatives of round 2 are BM25's and those of round 1's retriever in one pool, denoised
  c.mine.bm25.depth = 200
  c.mine.dense.depth = 200
  c.mine.dense.relative_margin = 1.0  # what round 1's retriever puts above the judged one; scores are raw dot
  # products, and any other share of them depends on where they have their zero
  c.evaluate.splits = ("dev",)
  c.evaluate.graded_splits = ("dl19", "dl20")
  return c
