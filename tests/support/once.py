"""What is made once for all of pytest's workers."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import pytest

from dptdr_jax.core import lock


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
  """A directory in which `make` has been called; several tests share it, so that none may change it."""
  base = factory.getbasetemp()
  directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
  with lock.held(directory / "making.lock", wait_s=0.5):
    if not (directory / "done").exists():
      make(directory)
      (directory / "done").touch()
  return directory
