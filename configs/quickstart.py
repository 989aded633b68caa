"""From nothing to a measured retriever on a laptop: search in the docstrings of the Python packages installed here.

python launch/docstrings.py --out=runs/docstrings
python -m dptdr_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

With --config.pretrain.enabled=True a short pretraining on the docstrings comes first: some minutes more.
"""

from configs import beir


def get_config():
  """MiniLM out of an installed package, 384 wide, 6 layers, by the recipe of beir.py; six minutes on 2 cores."""
  c = beir.get_config()
  c.backbone.sha256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
  c.data.dir = "runs/docstrings"
  c.text.passage_length = 64
  c.pretrain.spans = 128
  c.pretrain.overlap = False  # docstrings are short: most would be the same span twice
  c.pretrain.neighbours = 1
  c.pretrain.learning_rate = 2e-5
  c.pretrain.steps = 40
  c.pretrain.checkpoint_every = 20
  c.pretrain.evaluate_every = 20
  c.prompt.length = 16
  c.train.steps = 120
  c.train.passages = 1
  c.train.negatives = "source"
  c.train.checkpoint_every = 60
  c.train.evaluate_every = 60
  c.train.evaluate_passages = 1000
  c.train.evaluate_queries = 300
  c.evaluate.splits = ("test",)
  return c
