"""SIGKILL at points drawn by stage and progress: what is started again ends with the same bytes as undisturbed."""

from __future__ import annotations

import collections
import concurrent.futures
import pathlib
import random
import signal
from collections.abc import Sequence

from support.attacked import differ, ended

# Each line is a run's life. Its stages are in order, one death a stage: every stage then begins where nothing of it is
# there, so that it has as many events as undisturbed and each drawn point is reached.
LIVES = (
  ("prepare progress", "pretrain checkpoint", "mine0 rename", "train1 progress", "encode rename"),
  ("prepare rename", "pretrain rename", "cross checkpoint", "train1 finish", "evaluate rename"),
  ("pretrain finish", "cross rename", "train1 checkpoint", "encode progress", "report finish"),
)


def events(log: pathlib.Path) -> collections.Counter:
  return collections.Counter(log.read_text().splitlines())


def draw(expected: collections.Counter, seed: int) -> list[list[str]]:
  """Draws the points of each life, evenly among the events that an undisturbed run had in the stage."""
  generator = random.Random(seed)
  return [[f"{event.replace(' ', ':')}:{generator.randrange(expected[event])}" for event in life] for life in LIVES]


def test_killed_anywhere_ends_with_the_same_bytes(attacked, tmp_path):
  expected = events(attacked.work.with_suffix(".events"))

  def live(points: Sequence[str]) -> pathlib.Path:
    workdir = tmp_path / "-".join(points).replace(":", "_")
    for point in points:
      status, said = attacked.start(workdir, point=point).end()
      assert status == -signal.SIGKILL, (point, said[-4000:])
    attacked.run(workdir)
    return workdir

  lives = draw(expected, seed=7)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    workdirs = list(pool.map(live, lives))
  for points, workdir in zip(lives, workdirs, strict=True):
    assert not differ(ended(workdir), ended(attacked.work)), points
    found = events(workdir.with_suffix(".events"))
    for stage in (stage for stage in ("pretrain", "train1") if f"{stage}:finish" in " ".join(points)):
      assert found[f"{stage} progress"] == expected[f"{stage} progress"], "what is trained is not trained again"
