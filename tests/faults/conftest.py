"""One undisturbed run for all tests of faults: what they end with must be what it ends with."""

import os

import pytest
from support.attacked import Attacked

from dptdr_jax.core import lock


@pytest.fixture(scope="session")
def attacked(tmp_path_factory) -> Attacked:
  """Made once for all of pytest's workers; no test may change it."""
  base = tmp_path_factory.getbasetemp()
  directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "attacked"
  made, done = Attacked(directory), directory / "done"
  with lock.held(directory / "making.lock", wait_s=0.5, on_wait=lambda holder: None):
    if not done.exists():
      made.make()
      done.touch()
  return made
