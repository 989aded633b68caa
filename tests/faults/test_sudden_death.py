"""SIGKILL at points drawn by stage and progress: the rerun ends with the same bytes as an undisturbed run."""

from __future__ import annotations

import collections
import concurrent.futures
import os
import pathlib
import random
import signal
import subprocess
import sys

import pytest
from support import doom, tiny

ROOT = pathlib.Path(__file__).parents[2]

# Two runs' lives. In each the stages are in order, one death a stage: every stage then begins where nothing of it is
# there, so that it has as many events as undisturbed and each drawn point is reached.
LIVES = (
  ("prepare progress", "mine0 rename", "train1 checkpoint", "encode progress", "evaluate rename"),
  ("prepare rename", "train1 progress", "encode rename", "evaluate progress", "report rename"),
)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """A function (workdir, point) that runs the main job once, on one device, and returns its exit status."""
  directory = tmp_path_factory.mktemp("faults")
  data, backbone = tiny.beir(directory / "data"), tiny.backbone(directory / "backbone")
  flags = [
    f"--config={ROOT}/configs/beir.py", f"--config.data.dir={data}", f"--config.backbone.path={backbone}",
    "--config.train.steps=12", "--config.train.queries=8", "--config.train.checkpoint_every=3",
    "--config.train.evaluate_every=4", "--config.train.log_every=1", "--config.train.negatives=bm25",
    "--config.train.learning_rate=0.05", "--config.prompt.length=4", "--config.text.passage_length=32",
    "--config.encode.shard_passages=16", "--config.evaluate.examples=2",
  ]  # fmt: skip
  # One device; and what the undisturbed run compiles the others load, or a dozen processes would do little else.
  environment = os.environ | {
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }

  def run(workdir: pathlib.Path, point: str) -> int:
    log = workdir.with_suffix(".events")
    arguments = [sys.executable, doom.__file__, str(log), point, *flags, f"--workdir={workdir}"]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-4000:]
    return done.returncode

  return run


def made(workdir: pathlib.Path) -> dict[str, bytes]:
  names = ("results.json", "train1/retriever/prompts.safetensors", "train1/metrics.jsonl")
  return {name: (workdir / name).read_bytes() for name in names}


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

  def live(points: list[str]) -> tuple[int, dict[str, bytes]]:
    workdir = tmp_path / "-".join(points).replace(":", "_")
    deaths = sum(command(workdir, point) == -signal.SIGKILL for point in points)
    assert command(workdir, "none") == 0
    return deaths, made(workdir)

  with concurrent.futures.ThreadPoolExecutor(len(lives)) as pool:
    ended = list(pool.map(live, lives))
  assert sum(deaths for deaths, _ in ended) == 10
  for points, (_, found) in zip(lives, ended, strict=True):
    assert found == expected, points
