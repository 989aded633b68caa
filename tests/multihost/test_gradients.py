"""Several processes compute the loss and gradient of one process, dropout on."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from support import quick

TESTS = pathlib.Path(__file__).parents[1]


def gradients_of(processes: int, devices: int, out: pathlib.Path, steps: tuple[str, ...]) -> dict[str, dict]:
  """What support.gradients writes, by step."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = str(probe.getsockname()[1])
  environment = os.environ | {"PYTHONPATH": str(TESTS), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick.xla_flags(devices)}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  out.mkdir()
  command = [sys.executable, "-m", "support.gradients", str(out), port, str(processes)]
  running = [
    subprocess.Popen([*command, str(index), *steps], env=environment, stderr=subprocess.PIPE, text=True)
    for index in range(processes)
  ]
  try:
    said = [process.communicate(timeout=280)[1] for process in running]
  finally:
    for process in running:
      process.kill()
  assert not any(process.returncode for process in running), said[0][-3000:]
  return {name: dict(np.load(out / f"{name}.npz")) for name in steps}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  return gradients_of(1, 1, tmp_path_factory.mktemp("gradients") / "alone", ("train", "pretrain"))


# Pretraining of four is compared by loss and norm in test_processes.
@pytest.mark.parametrize(("processes", "steps"), [(2, ("train", "pretrain")), (4, ("train",))])
def test_several_processes_of_two_devices_compute_the_gradient_of_one(processes, steps, alone, tmp_path):
  several = gradients_of(processes, 2, tmp_path / "several", steps)
  for step in steps:
    wanted = alone[step]
    assert several[step]["loss"] == pytest.approx(wanted["loss"], rel=1e-6), step
    off = np.linalg.norm(several[step]["gradient"] - wanted["gradient"]) / np.linalg.norm(wanted["gradient"])
    assert off < 1e-6, step
