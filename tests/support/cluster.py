"""Starts the main job as several processes on this machine, each with some simulated devices."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence

from support import quick

ROOT = pathlib.Path(__file__).parents[2]


def start(arguments: Sequence[str], processes: int, devices: int = 2) -> list[subprocess.Popen]:
  """Starts the main job with ARGUMENTS that many times; the processes find each other."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  environment = os.environ | {
    "PYTHONPATH": str(ROOT / "tests"),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": quick.xla_flags(devices),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  compiled = pathlib.Path(environment.pop("JAX_COMPILATION_CACHE_DIR"))

  def command(index: int) -> list[str]:
    place = [f"--coordinator=localhost:{port}", f"--processes={processes}", f"--process={index}"]
    place = place if processes > 1 else []
    member = [sys.executable, "-m", "support.member", str(compiled / f"{processes}x{devices}-{index}")]
    return [*member, *arguments, *place]

  options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
  return [subprocess.Popen(command(index), **options) for index in range(processes)]


def run(arguments: Sequence[str], processes: int, devices: int = 2, timeout_s: float = 300) -> list[str]:
  """Runs them to the end; returns what each printed, and raises where one failed."""
  running = start(arguments, processes, devices)
  try:
    printed = [process.communicate(timeout=timeout_s)[0] for process in running]
  finally:
    for process in running:
      process.kill()
  for process, text in zip(running, printed, strict=True):
    assert process.returncode == 0, text[-4000:]
  return printed
