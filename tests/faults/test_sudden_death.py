"""SIGKILL at points drawn by stage and progress: the rerun ends with the same bytes as an undisturbed run."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import pathlib
import random
import signal
from collections.abc import Sequence

import pytest
from support import doom, forks, tiny

# Two runs' lives. In each the stages are in order, one death a stage: every stage then begins where nothing of it is
# there, so that it has as many events as undisturbed and each drawn point is reached.
LIVES = (
  ("prepare progress", "mine0 rename", "train1 checkpoint", "encode progress", "evaluate rename"),
  ("prepare rename", "train1 progress", "encode rename", "evaluate progress", "report rename"),
)


# Ten deaths in one stage, each counted from where the one before let the run go on. A step has one progress event and a
# save some renames, so that a life of five deaths leaves steps to do.
STAGES = {
  # Of a rerun's own renames the second is the export's.
  "pretrain": (
    ("rename:1", "progress:2", "checkpoint:1", "progress:1", "checkpoint:0"),
    ("progress:0", "checkpoint:2", "progress:2", "checkpoint:1", "rename:1"),
  ),
  # Negatives mined while training goes on: progress and renames are those of both threads.
  "train1": (
    ("rename:3", "progress:9", "checkpoint:1", "rename:5", "progress:3"),
    ("progress:14", "rename:7", "checkpoint:2", "progress:6", "rename:2"),
  ),
}
FLAGS = {
  "pretrain": ("pretrain.enabled=True", "pretrain.steps=12", "pretrain.spans=16", "pretrain.span_tokens=16",
               "pretrain.shortest=2", "pretrain.log_every=1", "pretrain.checkpoint_every=1",
               "pretrain.evaluate_every=6", "pretrain.learning_rate=1e-3"),
  "train1": ("train.refresh_every=3", "train.passages=3", "train.negatives=random", "train.checkpoint_every=1",
             "train.evaluate_every=0", "mine.dense.depth=12"),
}  # fmt: skip
MADE = {
  "pretrain": ("backbone/model.safetensors", "backbone/manifest.json", "metrics.jsonl"),
  "train1": ("retriever/prompts.safetensors", "metrics.jsonl",
             *(f"generations/{which}/pool/{name}.npy" for which in range(3) for name in ("rows", "reasons"))),
}  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """A function (workdir, point, *flags) that runs the main job once, on one device, and returns its exit status."""
  usual = tiny.run_flags(tmp_path_factory.mktemp("faults"))

  def run(workdir: pathlib.Path, point: str, *flags: str) -> int:
    said = workdir.with_suffix(".said")
    arguments = [*usual, *flags, f"--workdir={workdir}"]
    status = forks.run(doom.main, str(workdir.with_suffix(".events")), point, arguments, said=said)
    assert status in (0, -signal.SIGKILL), said.read_text()[-4000:]
    return status

  return run


def made(workdir: pathlib.Path) -> dict[str, bytes]:
  names = ("results.json", "train1/retriever/prompts.safetensors", "train1/metrics.jsonl")
  return {name: (workdir / name).read_bytes() for name in names}


def live(command, tmp_path: pathlib.Path, points: Sequence[str], *flags: str) -> tuple[int, pathlib.Path]:
  """A run that dies at each of the points and is then left alone: how often it died, and its directory."""
  workdir = tmp_path / "-".join(points).replace(":", "_")
  deaths = sum(command(workdir, point, *flags) == -signal.SIGKILL for point in points)
  assert command(workdir, "none", *flags) == 0
  return deaths, workdir


def draw(log: pathlib.Path, seed: int) -> list[list[str]]:
  """Draws the points of each life, evenly among the events that an undisturbed run had in the stage."""
  events = collections.Counter(log.read_text().splitlines())
  generator = random.Random(seed)
  return [[f"{event.replace(' ', ':')}:{generator.randrange(events[event])}" for event in life] for life in LIVES]


def test_killed_anywhere_ends_the_same(command, tmp_path):
  undisturbed = tmp_path / "undisturbed"
  assert command(undisturbed, "none") == 0
  expected = made(undisturbed)
  lives = draw(undisturbed.with_suffix(".events"), seed=7)

  with concurrent.futures.ThreadPoolExecutor(len(lives)) as pool:
    ended = list(pool.map(lambda points: live(command, tmp_path, points), lives))
  assert sum(deaths for deaths, _ in ended) == 10
  for points, (_, workdir) in zip(lives, ended, strict=True):
    assert made(workdir) == expected, points


@pytest.mark.parametrize("stage", STAGES)
def test_killed_10_times_in_one_stage_it_ends_the_same(command, tmp_path, stage):
  flags = [*(f"--config.{field}" for field in FLAGS[stage]), f"--stages=prepare,{stage}"]
  lives = [[f"{stage}:{point}" for point in life] for life in STAGES[stage]]
  undisturbed = tmp_path / "undisturbed"
  assert command(undisturbed, "none", *flags) == 0
  with concurrent.futures.ThreadPoolExecutor(len(lives)) as pool:
    ended = list(pool.map(lambda points: live(command, tmp_path, points, *flags), lives))
  assert sum(deaths for deaths, _ in ended) == 10
  for points, (_, workdir) in zip(lives, ended, strict=True):
    for name in MADE[stage]:
      assert lines(workdir / stage / name) == lines(undisturbed / stage / name), (points, name)


def lines(path: pathlib.Path) -> list[bytes] | bytes:
  """A file's bytes; of metrics, all but what the clock says."""
  if path.name != "metrics.jsonl":
    return path.read_bytes()
  found = [json.loads(line) for line in path.read_text().splitlines()]
  return [json.dumps({k: v for k, v in line.items() if k != "tokens_per_second"}).encode() for line in found]
