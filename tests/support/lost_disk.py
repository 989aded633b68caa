"""Runs the main job with its copy on a remote, and ends it at a chosen point: `python lost_disk.py POINT FLAGS...`.

POINT is `checkpoint:STEP` (SIGKILL when the copy has that checkpoint of train1), `sigterm:STEP` (SIGTERM to itself when
it is saved), `shard:N` (SIGKILL when the copy has the Nth embedding shard, from 1) or `none`. The copy is made at the
points alone, so that it is known what it holds; with `none` it is made in the background, as fast as it can.
"""

from __future__ import annotations

import os
import signal
import sys


def main(point: str, flags: list[str]) -> None:
  """Patches what the point hangs on, then runs the main job with `flags`."""
  sys.path.insert(0, os.getcwd())  # as `python -m` has it; the configs import each other from there
  from dptdr_jax import main as job
  from dptdr_jax.core import mirror
  from dptdr_jax.retrieval.embeddings import EmbeddingWriter
  from dptdr_jax.runtime.checkpoints import Checkpoints

  kind, _, number = point.partition(":")
  followed = {}
  shards = []

  def follows(copy, key, stop):
    followed.update(update=lambda: copy.update(key, ended=False), name=copy.name)

  def die() -> None:
    followed["update"]()
    os.kill(os.getpid(), signal.SIGKILL)

  def saves(checkpoints, step, *arguments, **options):
    save(checkpoints, step, *arguments, **options)
    if followed.get("name") == "train1" and step == int(number):
      if kind == "sigterm":
        os.kill(os.getpid(), signal.SIGTERM)
      elif kind == "checkpoint":
        checkpoints.wait()
        die()

  def writes(writer, *arguments):
    write(writer, *arguments)
    shards.append(writer)
    if kind == "shard" and len(shards) == int(number):
      die()

  mirror.EVERY_S = 0.001
  if kind != "none":
    mirror._keep_copying = follows
    save, write = Checkpoints.save, EmbeddingWriter.write
    Checkpoints.save, EmbeddingWriter.write = saves, writes
  sys.argv = ["main", *flags]
  job.run()


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2:])
