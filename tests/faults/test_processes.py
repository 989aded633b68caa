"""The main job as several processes: what it ends with is what one process ends with, and all of them end alike."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import doom, forks
from support.attacked import Attacked

from dptdr_jax.core import lock


def hold_mining(directory: pathlib.Path, flags: Sequence[str]) -> None:
  """The main job, in which mining during training never ends; who waits for it leaves a file."""
  from dptdr_jax.pipeline.generations import Generations
  from dptdr_jax.runtime.hosts import TEAM

  ask = TEAM.all_say

  def all_say(*question) -> bool:
    (directory / f"waits-{TEAM.index}").touch()
    return ask(*question)

  TEAM.all_say, Generations._mine = all_say, lambda *arguments: threading.Event().wait()
  forks.job(flags)


def killed(log: pathlib.Path, flags: Sequence[str]) -> None:
  """The main job, of which process 1 is killed in the middle of training."""
  one = "--process=1" in flags
  doom.main(log.with_suffix(".1" if one else ".0"), "train1:progress:3" if one else "none", flags)


@pytest.fixture
def started(attacked, tmp_path):
  """A function that starts two processes, or more, in a directory that has what is made before training."""
  workdir = tmp_path / "work"
  attacked.early(workdir)

  def start(*more: str, processes: int = 2, program=forks.job) -> list[forks.Job]:
    return forks.cluster(attacked.flags(workdir, *more), processes, said=tmp_path / "said", program=program)

  return start


def wait_for(condition: Callable[[], bool], running: Sequence[forks.Job]) -> None:
  """Returns when it holds; all of them must be at work until then."""
  while not condition():
    assert all(job.process.is_alive() for job in running), forks.end(running)
    time.sleep(0.05)


def compare(workdir: pathlib.Path, attacked: Attacked) -> None:
  """The same as one process ends with, but for rounding."""
  losses = []
  for path in (workdir, attacked.work):
    records = [json.loads(line) for line in (path / "train1/metrics.jsonl").read_text().splitlines()]
    losses.append([record["loss"] for record in records if "loss" in record])
  np.testing.assert_allclose(*losses, rtol=1e-4)
  tables = [load_file(path / "train1/retriever/prompts.safetensors") for path in (workdir, attacked.work)]
  for name, table in tables[1].items():
    assert np.linalg.norm(tables[0][name] - table) <= 1e-4 * np.linalg.norm(table), name
  for which in ("0", "1"):  # mined while training continued, by the first, and drawn from by all
    pools = [np.load(path / f"train1/generations/{which}/pool/rows.npy") for path in (workdir, attacked.work)]
    np.testing.assert_array_equal(*pools)
  results = [json.loads((path / "results.json").read_text()) for path in (workdir, attacked.work)]
  assert list(results[0]) == list(results[1])
  for system, splits in results[1].items():
    for name, value in splits["dev"].items():  # 16 queries: a flip of one is 1 / 16 at most
      assert abs(results[0][system]["dev"][name] - value) <= 2 / 16, (system, name)


def test_two_processes_end_as_one(attacked, started, tmp_path):
  statuses, printed = forks.end(started())
  assert statuses == [0, 0], printed[0][-3000:] + printed[1][-3000:]
  compare(tmp_path / "work", attacked)
  assert ["report.html" in text for text in printed] == [True, False]
  assert all(text.count("encode corpus: shard") >= 2 for text in printed), "each encodes its part"


def test_one_killed_then_one_told_to_stop_they_go_on_as_one(attacked, started, tmp_path):
  first, second = started(program=functools.partial(killed, tmp_path / "events"))
  assert second.end()[0] == -signal.SIGKILL
  first.process.kill()  # as the launcher does: alone it would wait for the other
  first.end()

  running = started(program=functools.partial(hold_mining, tmp_path))
  wait_for(lambda: all((tmp_path / f"waits-{index}").exists() for index in range(2)), running)
  os.kill(running[1].process.pid, signal.SIGTERM)
  statuses, printed = forks.end(running)
  assert statuses == [75, 75], printed[0][-3000:]
  assert all("stop at 'round 1 waits for negatives of generation" in text for text in printed)

  assert "train resumes after step" in attacked.run(tmp_path / "work")
  compare(tmp_path / "work", attacked)


def test_damage_that_the_first_finds_ends_all_alike(attacked, started, tmp_path):
  next((tmp_path / "work/store/pretrain").glob("*/backbone/config.json")).unlink()
  statuses, printed = forks.end(started())
  last = [text.splitlines()[-1] for text in printed]
  assert statuses == [2, 2] and last[0] == last[1], last
  assert "backbone/config.json is lost: training chose it on the way" in last[0]


def test_all_wait_for_an_artefact_that_another_run_makes_and_all_can_be_stopped(attacked, started, tmp_path):
  key = next((attacked.work / "store/train").iterdir()).name
  path = tmp_path / f"work/store/train/{key}.lock"
  with lock.held(path, wait_s=1, on_wait=print):
    running, said = started(), tmp_path / "said-0"
    waits = f"train/{key} is being made by process {os.getpid()} on"
    wait_for(lambda: said.exists() and waits in said.read_text(), running)
    os.kill(running[0].process.pid, signal.SIGTERM)
    statuses, printed = forks.end(running)
  assert statuses == [75, 75], printed[0][-3000:] + printed[1][-3000:]
