"""Eight simulated devices for every test, and quick compilation; set before anything imports jax."""

import atexit
import os
import shutil
import tempfile

from support import quick

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the one that whoever started them has made
  _COMPILED = tempfile.mkdtemp(prefix="dptdr-compiled-")
  atexit.register(shutil.rmtree, _COMPILED, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick.xla_flags(devices=8)}".strip()
# Where in Python each operation comes from is a sixth of the work, and nobody reads these programs.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
# What one test has compiled, the next one and every process that it starts load.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["HF_HUB_OFFLINE"] = "1"
quick.collect_seldom()


def pytest_collection_modifyitems(items):
  """Minutes first, seconds last, so that of several workers none is left with a long file at the end."""
  items.sort(key=lambda item: not {"multihost", "faults", "training"} & {*item.path.parts})
