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
  """Starts `python -m dptdr_jax.main ARGUMENTS` that many times; the processes find each other."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": quick.xla_flags(devices),
  }
  if processes > 1:  # jax lets the first alone write to a cache: the others would compile while it waits in vain
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  place = [f"--coordinator=localhost:{port}", f"--processes={processes}"] if processes > 1 else []
  return [
    subprocess.Popen(
      [sys.executable, "-m", "dptdr_jax.main", *arguments, *place, *([f"--process={index}"] if place else [])],
      cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) for index in range(processes)
  ]  # fmt: skip


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
