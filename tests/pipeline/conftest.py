"""One finished run in which everything is made, for all tests: they read it, or change a copy."""

import fcntl
import os

import pytest
from support import runs


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> runs.Run:
  """Made once for all of pytest's workers; several tests share it, so that none may change it."""
  base = tmp_path_factory.getbasetemp()
  directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "whole"
  directory.mkdir(exist_ok=True)
  with open(directory / "lock", "w") as stream:
    fcntl.flock(stream, fcntl.LOCK_EX)
    made = runs.Run(runs.everything(directory), directory / "work")
    if not (directory / "done").exists():
      made.run()
      (directory / "done").touch()
  return made
