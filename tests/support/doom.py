"""Runs the main job and kills its process at a counted point.

A point is `STAGE:KIND:N`: SIGKILL just before the Nth event of that kind in that stage (from 0), or `none`. Kinds:
`progress` (a progress bar is about to advance), `rename` (something is whole under its temporary name and about to take
its own), `finish` (an artefact is) and `checkpoint` (a rename by orbax). A log receives one line `STAGE KIND` for each
event, so that an undisturbed run tells which points there are.
"""

from __future__ import annotations

import collections
import os
import pathlib
import re
import signal
import threading
from collections.abc import Callable, Sequence

from support import forks

_ARTEFACT = re.compile(r"[0-9a-f]{20}\.partial")


def die() -> None:
  """Ends this process as a power cut does."""
  os.kill(os.getpid(), signal.SIGKILL)


def main(log: pathlib.Path, point: str, flags: Sequence[str], strike: Callable[[], None] = die) -> None:
  """Patches what an event passes through, then runs the main job with `flags`; calls `strike` at the point."""
  from dptdr_jax.core import progress
  from dptdr_jax.pipeline import run

  stream, lock = open(log, "a", encoding="utf-8"), threading.Lock()  # noqa: SIM115 - open until death
  counts: collections.Counter = collections.Counter()
  stage = "start"

  def event(kind: str) -> None:
    with lock:
      if point == f"{stage}:{kind}:{counts[stage, kind]}":
        strike()
      counts[stage, kind] += 1
      stream.write(f"{stage} {kind}\n")
      stream.flush()

  def renaming(function: Callable) -> Callable:
    def watched(source, target, *arguments, **options):
      finishes = _ARTEFACT.fullmatch(os.path.basename(os.fspath(source)))
      event("checkpoint" if f"{os.sep}checkpoints{os.sep}" in os.fspath(target) else "finish" if finishes else "rename")
      return function(source, target, *arguments, **options)

    return watched

  def advancing(bar, n=1):
    event("progress")
    advance(bar, n)

  def making(store, node, workdir):
    nonlocal stage
    stage = node.stage
    make(store, node, workdir)

  advance, make = progress.Bar.advance, run._make
  progress.Bar.advance, run._make = advancing, making
  os.replace, os.rename = renaming(os.replace), renaming(os.rename)
  forks.job(flags)
