"""Commands in processes of their own, see support.forks."""

from __future__ import annotations

import os
import pathlib
import runpy
import sys
from collections.abc import Sequence

from absl import flags
from support import forks


def call(said: pathlib.Path, name: str, *given: str, directory: pathlib.Path = forks.ROOT) -> tuple[int, str]:
  """Exit status and output of `python -m dptdr_jax.NAME GIVEN` in a directory; `said` is the file of its output."""
  return forks.Job(run_command, name, given, directory, said=said).end()


def run_command(name: str, given: Sequence[str], directory: pathlib.Path = forks.ROOT) -> None:
  """`python -m dptdr_jax.NAME GIVEN` in this process."""
  os.chdir(directory)
  for flag in list(flags.FLAGS.flags_by_module_dict().get("dptdr_jax.main", ())):  # imported before the fork
    delattr(flags.FLAGS, flag.name)
  sys.modules.pop("dptdr_jax.main", None)
  sys.argv = [name, *given]
  runpy.run_module(f"dptdr_jax.{name}", run_name="__main__")
