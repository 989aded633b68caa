"""One finished run in which everything is made, for all tests: they read it, or change a copy."""

import pytest
from support import runs
from support.once import once


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> runs.Run:
  def made(directory) -> runs.Run:
    return runs.Run(runs.everything(directory), directory / "work")

  return made(once(tmp_path_factory, "whole", lambda directory: made(directory).run()))
