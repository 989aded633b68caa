"""The main job as several processes: what it ends with is what one process ends with, and any of them may be told to
stop."""

from __future__ import annotations

import json
import pathlib
import shutil
import signal
import time
from collections.abc import Sequence

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import cluster, tiny

ROUNDS = ("train1", "train2")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
  directory = tmp_path_factory.mktemp("processes")
  data, backbone = tiny.beir(directory / "data"), tiny.backbone(directory / "backbone")
  return [
    f"--config={cluster.ROOT}/configs/beir.py", f"--config.data.dir={data}", f"--config.backbone.path={backbone}",
    "--config.train.steps=5", "--config.train.queries=8", "--config.train.checkpoint_every=2",
    "--config.train.evaluate_every=5", "--config.train.log_every=1", "--config.train.learning_rate=0.05",
    "--config.prompt.length=4", "--config.text.passage_length=32", "--config.encode.shard_passages=16",
    "--config.evaluate.examples=2", "--config.rounds=2", "--config.wait_seconds=120", "--config.train.refresh_every=2",
    "--config.pretrain.enabled=True", "--config.pretrain.steps=0", "--config.pretrain.tokens=250",
    "--config.pretrain.spans=16", "--config.pretrain.mlm_weight=1", "--config.pretrain.span_tokens=16",
    "--config.pretrain.shortest=2", "--config.pretrain.log_every=1",
    "--config.pretrain.overlap=False",
  ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
  """The directory of a run by one process on one device."""
  workdir = tmp_path_factory.mktemp("alone")
  cluster.run([*flags, f"--workdir={workdir}"], processes=1, devices=1)
  return workdir


def metrics(workdir: pathlib.Path, stage: str) -> dict[str, np.ndarray]:
  records = [json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]
  return {name: np.array([record[name] for record in records if name in record]) for name in ("loss", "gradient_norm")}


def compare_prompts(workdir: pathlib.Path, expected: pathlib.Path, stage: str) -> None:
  mine, theirs = (load_file(path / stage / "retriever/prompts.safetensors") for path in (workdir, expected))
  for name, table in theirs.items():
    assert np.linalg.norm(mine[name] - table) <= 1e-4 * np.linalg.norm(table), (stage, name)


def compare_results(workdir: pathlib.Path, expected: pathlib.Path) -> None:
  results = [json.loads((path / "results.json").read_text()) for path in (workdir, expected)]
  assert list(results[0]) == list(results[1])
  for system, splits in results[1].items():
    for name, value in splits["dev"].items():  # 16 queries: a flip of one is 1 / 16 at most
      assert abs(results[0][system]["dev"][name] - value) <= 3 / 16, (system, name)


def compare_stages(workdir: pathlib.Path, expected: pathlib.Path, rounds: Sequence[str] = ROUNDS) -> None:
  """What these rounds end with, and what they went through."""
  for stage in ("pretrain", *rounds):
    mine, theirs = metrics(workdir, stage), metrics(expected, stage)
    for name, values in theirs.items():
      # Equal states in `pretrain` alone; what follows starts from weights that are off by its rounding.
      np.testing.assert_allclose(mine[name], values, rtol=2e-6 if stage == "pretrain" else 1e-4, err_msg=stage)
  for stage in rounds:
    compare_prompts(workdir, expected, stage)
  for generation in ("0", "1"):  # mined while training went on, by the first, and drawn from by both
    mine, theirs = (np.load(path / f"train1/generations/{generation}/pool/rows.npy") for path in (workdir, expected))
    np.testing.assert_array_equal(mine, theirs)


def test_two_processes_end_as_one(flags, alone, tmp_path):
  printed = cluster.run([*flags, f"--workdir={tmp_path}"], processes=2)
  compare_stages(tmp_path, alone)
  compare_results(tmp_path, alone)
  assert ["report.html" in text for text in printed] == [True, False]
  assert [text.count("encode/train2/corpus, shard") for text in printed] == [2, 2]


def test_stopped_by_a_sigterm_to_one_of_two_it_goes_on_as_one_or_four(flags, alone, tmp_path):
  arguments = [*flags, "--config.train.loader_workers=1", "--stages=prepare,pretrain,mine0,train1"]
  # Both are in the stage by then, seconds before the first of its steps, which is compiled first.
  printed = stop(arguments, tmp_path / "stopped", [tmp_path / "stopped/pretrain/metrics.jsonl"])
  assert all("pretrain stands at step" in text for text in printed), printed[1][-3000:]  # in the middle, not beside it
  for processes, more in (1, ()), (4, ("--config.pretrain.fsdp=2", "--config.fsdp=2")):
    workdir = tmp_path / f"work{processes}"
    shutil.copytree(tmp_path / "stopped", workdir)
    printed = cluster.run([*arguments, *more, f"--workdir={workdir}"], processes, devices=min(processes, 2))
    assert all("pretrain goes on after step" in text for text in printed), printed[0][-3000:]
    compare_stages(workdir, alone, ["train1"])


def test_a_sigterm_to_one_while_both_wait_for_negatives_is_saved_by_both(flags, alone, tmp_path, monkeypatch):
  for stage in ("prepare", "pretrain", "mine0"):
    shutil.copytree(alone / stage, tmp_path / "work" / stage)
  arguments = [*flags, "--config.train.checkpoint_every=100", "--stages=prepare,pretrain,mine0,train1"]
  with monkeypatch.context() as held:
    held.setenv("HOLD_MINING", str(tmp_path))
    printed = stop(arguments, tmp_path / "work", [tmp_path / f"waits-{index}" for index in range(2)])
  assert all("stop at 'round 1 waits for negatives of generation 0'" in text for text in printed), printed[1][-3000:]
  printed = cluster.run([*arguments, f"--workdir={tmp_path}/work"], processes=2)
  assert all("train goes on after step 2" in text for text in printed), printed[0][-3000:]
  compare_prompts(tmp_path / "work", alone, "train1")


def stop(arguments: list[str], workdir: pathlib.Path, when: list[pathlib.Path]) -> list[str]:
  """Starts two processes and sends the second SIGTERM when these files are there; returns what each printed."""
  running = cluster.start([*arguments, f"--workdir={workdir}"], processes=2)
  try:
    deadline = time.monotonic() + 200
    while not all(path.exists() for path in when) and time.monotonic() < deadline:
      time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=120)[0] for process in running]
  finally:
    for process in running:
      process.kill()
  assert [process.returncode for process in running] == [75, 75], printed[0][-3000:] + printed[1][-3000:]
  return printed


def test_an_error_of_input_in_one_keeps_nobody_waiting(flags, tmp_path):
  running = cluster.start([*flags, "--config.data.dir=nowhere", f"--workdir={tmp_path}/work"], processes=2)
  try:
    printed = [process.communicate(timeout=90)[0] for process in running]  # jax.distributed alone would wait 300 s
  finally:
    for process in running:
      process.kill()
  assert running[0].returncode == 2 and "error: nowhere: no such folder" in printed[0]
  assert running[1].returncode not in (0, 2, 75), printed[1]  # it lost the other: to be restarted, not to be mended
