"""Two runs with one --store at the same time: each artefact is made once, and who needs it waits for its maker."""

from __future__ import annotations

import collections
import os
import pathlib
import re
import signal
import time
from collections.abc import Sequence

from support import doom, forks
from support.attacked import differ, ended


def maker(point: str, built: pathlib.Path, other: pathlib.Path, flags: Sequence[str]) -> None:
  """Runs the main job and writes down what it begins to make. At the point it waits until the other job, which prints
  to `other`, waits for it; then it is killed."""
  from dptdr_jax.core.store import Store

  begin = Store._begin

  def noted(store, kind, ref, inputs):
    with open(built, "a", encoding="utf-8") as stream:
      stream.write(f"{ref}\n")
    return begin(store, kind, ref, inputs)

  def strike() -> None:
    deadline = time.monotonic() + 120
    while not _waits_for(other, "train", os.getpid()) and time.monotonic() < deadline:
      time.sleep(0.05)
    doom.die()

  Store._begin = noted
  doom.main(built.with_suffix(f".{os.getpid()}"), point, flags, strike)


def _waits_for(said: pathlib.Path, kind: str, maker: int) -> bool:
  return said.exists() and bool(re.search(rf"{kind}/\w+ is being made by process {maker} on ", said.read_text()))


def test_each_artefact_is_made_once_and_a_dead_makers_work_is_taken_over(attacked, tmp_path):
  built, said, works = tmp_path / "built", tmp_path / "second.said", [tmp_path / "first", tmp_path / "second"]
  flags = [attacked.flags(work, f"--store={tmp_path}/store") for work in works]
  attacked.early(works[0], tmp_path / "store")
  first = forks.Job(maker, "train1:checkpoint:9", built, said, flags[0], said=tmp_path / "first.said")
  while not list(tmp_path.glob("store/train/*.partial")):
    assert first.process.is_alive(), first.end()
    time.sleep(0.05)
  second = forks.Job(maker, "none", built, tmp_path / "nowhere", flags[1], said=said)
  (killed, _), (status, printed) = first.end(), second.end()
  assert (killed, status) == (-signal.SIGKILL, 0), printed[-3000:]
  assert _waits_for(said, "train", first.process.pid)
  assert "train resumes after step" in printed
  counts = collections.Counter(built.read_text().split())
  assert {ref.split("/")[0] for ref, count in counts.items() if count > 1} == {"train"}
  assert not differ(ended(works[1]), ended(attacked.work))
