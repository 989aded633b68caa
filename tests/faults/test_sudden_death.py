"""SIGKILL at points drawn by stage and progress: the rerun ends with the same bytes as an undisturbed run."""

from __future__ import annotations

import collections
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import pytest
from support import doom, tiny

ROOT = pathlib.Path(__file__).parents[2]
KILLS = 10
AT_RENAMES = 4  # between a write and its rename


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """A function (workdir, point) that runs the main job once, on one device, and returns its exit status."""
  directory = tmp_path_factory.mktemp("faults")
  data, backbone = tiny.beir(directory / "data"), tiny.backbone(directory / "backbone")
  flags = [
    f"--config={ROOT}/configs/beir.py", f"--config.data.dir={data}", f"--config.backbone.path={backbone}",
    "--config.train.steps=12", "--config.train.queries=8", "--config.train.checkpoint_every=3",
    "--config.train.evaluate_every=4", "--config.train.log_every=1", "--config.train.negatives=bm25",
    "--config.prompt.length=4", "--config.text.passage_length=32", "--config.encode.shard_passages=16", "--config.evaluate.examples=2",
  ]  # fmt: skip

  def run(workdir: pathlib.Path, point: str) -> int:
    log = workdir.with_suffix(".events")
    arguments = [sys.executable, doom.__file__, str(log), point, *flags, f"--workdir={workdir}"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-4000:]
    return done.returncode

  return run


def made(workdir: pathlib.Path) -> dict[str, bytes]:
  names = ("results.json", "train1/retriever/prompts.safetensors", "train1/metrics.jsonl")
  return {name: (workdir / name).read_bytes() for name in names}


def draw_points(log: pathlib.Path, seed: int) -> list[str]:
  """Draws points from an undisturbed run's events: stages in turn, then evenly within the stage."""
  events = collections.Counter(tuple(line.split()) for line in log.read_text().splitlines())
  generator = random.Random(seed)
  points = []
  for number in range(KILLS):
    kind = "rename" if number < AT_RENAMES else "progress"
    kinds = sorted(key for key in events if key[1] == kind)
    stage, _ = kinds[number % len(kinds)]
    points.append(f"{stage}:{kind}:{generator.randrange(events[stage, kind])}")
  return points


def test_killed_anywhere_ends_the_same(command, tmp_path):
  undisturbed = tmp_path / "undisturbed"
  assert command(undisturbed, "none") == 0
  expected = made(undisturbed)
  points = draw_points(undisturbed.with_suffix(".events"), seed=7)
  killed = 0
  for number, point in enumerate(points):
    workdir = tmp_path / f"killed{number // 5}"  # five deaths in one run's life, then a new life
    killed += command(workdir, point) != 0
    if number % 5 == 4:
      assert command(workdir, "none") == 0
      assert made(workdir) == expected, points[number - 4 : number + 1]
      shutil.rmtree(workdir)
  assert killed >= KILLS // 2  # a point may lie before where the last death left the run
