"""One of several processes of the main job, which keeps what it compiles: `python -m support.member DIR FLAGS...`."""

from __future__ import annotations

import os
import pathlib
import sys
import threading
from unittest import mock

from support import quick


def keep_compiled(directory: pathlib.Path) -> None:
  """Compiled programs go to `directory` and come from there: one for each process, as they differ by its devices.

  jax lets process 0 alone write to a cache; in a common one it would load while the others compile.
  """
  import jax
  from jax._src import compiler, distributed

  write = compiler._cache_write

  def write_as_first(*arguments):
    with mock.patch.object(distributed.global_state, "process_id", 0):
      write(*arguments)

  compiler._cache_write = write_as_first
  jax.config.update("jax_compilation_cache_dir", str(directory))


def hold_mining(directory: pathlib.Path) -> None:
  """Negatives mined while training goes on are never there; who waits for them leaves a file in `directory`."""
  from dptdr_jax.runtime import hosts
  from dptdr_jax.stages import mine

  ask = hosts.all_say

  def all_say(*question) -> bool:
    (directory / f"waits-{hosts.process_index()}").touch()
    return ask(*question)

  hosts.all_say, mine.mine = all_say, lambda *arguments: threading.Event().wait()


def main(directory: pathlib.Path, flags: list[str]) -> None:
  """Runs the main job with `flags`."""
  sys.path.insert(0, os.getcwd())  # as `python -m` has it; the configs import each other from there
  quick.collect_seldom()
  keep_compiled(directory)
  if "HOLD_MINING" in os.environ:
    hold_mining(pathlib.Path(os.environ["HOLD_MINING"]))
  from dptdr_jax import main as job

  sys.argv = ["main", *flags]
  job.run()


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), sys.argv[2:])
