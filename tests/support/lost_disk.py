"""Runs the main job with its copy on a remote, and ends it at a chosen point of round 1's training.

Points: `kill:N` (SIGKILL when the Nth checkpoint is on the remote), `term:N` (SIGTERM to itself when it is made),
`upload` (SIGKILL between the files of the finished artefact and its artefact.json) and `none`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from support import doom, forks


def main(point: str, flags: Sequence[str]) -> None:
  """Patches what the point hangs on, then runs the main job with `flags`."""
  from dptdr_jax.core.remote import RemoteDirectory
  from dptdr_jax.core.remote_store import RemoteStore

  kind, _, number = point.partition(":")
  taken = []

  def snapshot(store, name, directory):
    take(store, name, directory)
    taken.extend([name] if name.startswith("train/") else [])
    if number and len(taken) == int(number):
      if kind == "term":
        os.kill(os.getpid(), signal.SIGTERM)
      else:
        store.last(60)
        doom.die()

  def write(directory, name, content):
    if kind == "upload" and name.startswith("train/") and name.endswith("/artefact.json"):
      doom.die()
    put(directory, name, content)

  take, put = RemoteStore.snapshot, RemoteDirectory.write
  RemoteStore.snapshot, RemoteDirectory.write = snapshot, write
  forks.job(flags)
