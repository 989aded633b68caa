"""Runs the main job and kills its process at a counted point: `python doom.py LOG POINT FLAGS...`.

POINT is `STAGE:KIND:N`: SIGKILL just before the Nth event of that kind in that stage (from 0), or `none`. Kinds:
`progress` (a progress bar is about to advance), `rename` (something is whole under its temporary name and about to take
its own) and `checkpoint` (a rename by orbax). LOG receives one line `STAGE KIND` for each event, so that an undisturbed
run tells which points there are.
"""

from __future__ import annotations

import collections
import os
import signal
import sys
import threading
from collections.abc import Callable

_lock = threading.Lock()
_counts: collections.Counter = collections.Counter()
_stage = "start"


def die() -> None:
  """Ends this process as a power cut does."""
  os.kill(os.getpid(), signal.SIGKILL)


def main(log: str, point: str, flags: list[str], strike: Callable[[], None] = die) -> None:
  """Patches what an event passes through, then runs the main job with `flags`; calls `strike` at the point."""
  sys.path.insert(0, os.getcwd())  # as `python -m` has it; the configs import each other from there
  from dptdr_jax import main as job
  from dptdr_jax.core import progress
  from dptdr_jax.runtime import hosts

  stream = open(log, "a", encoding="utf-8")  # noqa: SIM115 - open until death

  def event(kind: str) -> None:
    with _lock:
      if point == f"{_stage}:{kind}:{_counts[_stage, kind]}":
        strike()
      _counts[_stage, kind] += 1
      stream.write(f"{_stage} {kind}\n")
      stream.flush()

  def renaming(function):
    def watched(source, target, *arguments, **options):
      event("checkpoint" if f"{os.sep}checkpoints{os.sep}" in os.fspath(target) else "rename")
      return function(source, target, *arguments, **options)

    return watched

  def advancing(bar, n=1):
    event("progress")
    advance(bar, n)

  def meeting(*place):
    meet(*place)
    from dptdr_jax import pipeline  # not before the processes have met, as the main job has it

    def entering(stage, *arguments, **options):
      global _stage
      _stage = stage.name
      return execute(stage, *arguments, **options)

    execute, pipeline._execute = pipeline._execute, entering

  advance, meet = progress.Bar.advance, hosts.initialize
  progress.Bar.advance, hosts.initialize = advancing, meeting
  os.replace, os.rename = renaming(os.replace), renaming(os.rename)
  sys.argv = ["main", *flags]
  job.run()


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], sys.argv[3:])
