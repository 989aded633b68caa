"""Eight simulated devices for every test, and quick compilation; set before anything imports jax."""

import atexit
import os
import pathlib
import shutil
import tempfile

from support import quick

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # xdist's workers inherit it
  _COMPILED = tempfile.mkdtemp(prefix="dptdr-compiled-")
  atexit.register(shutil.rmtree, _COMPILED, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick.xla_flags(devices=8)}".strip()
# Without the Python lines of each operation, which are a sixth of the work and which nobody reads.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
# What one test compiles is loaded by the next one, and by every process that it starts.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["HF_HUB_OFFLINE"] = "1"
quick.collect_seldom()


# Directories whose files take longest. They go first, so that no worker is left with a long file at the end.
_LONG = ("multihost", "faults", "pipeline", "commands", "training")
_TESTS = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
  """Orders the directories; within each the order stays."""
  rank = {name: number for number, name in enumerate(_LONG)}
  items.sort(key=lambda item: rank.get(item.path.relative_to(_TESTS).parts[0], len(_LONG)))
