"""Runs of a program in processes of their own, forked from one that has imported what the main job imports.

A run that is killed and started again dozens of times would do little else than import; forked, it is as much a process
of its own, and no device has been touched before the fork.
"""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import pprint
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess

import jax
from ml_collections import ConfigDict
from support import quick

ROOT = pathlib.Path(__file__).parents[2]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
  ["dptdr_jax.main", "dptdr_jax.pipeline.run", "matplotlib.figure", "ir_measures", "dptdr_jax.serving.server"]
)


def write(config: ConfigDict, path: pathlib.Path) -> None:
  """Writes a config to a Python file, for --config=PATH."""
  values = pprint.pformat(config.to_dict(), sort_dicts=False)
  path.write_text(f"from ml_collections import ConfigDict\n\n\ndef get_config():\n  return ConfigDict({values})\n")


def job(flags: Sequence[str]) -> None:
  """The main job."""
  from dptdr_jax import main

  sys.argv = ["main", *flags]
  main.run()


class Job:
  """One process; what it prints is in the file `said`."""

  def __init__(self, program: Callable[..., None], *arguments: object, said: pathlib.Path, devices: int = 1):
    """Starts `program` there, with so many simulated devices. What one compiles the next one loads."""
    self._said = said
    self.process: BaseProcess = _CONTEXT.Process(target=_child, args=(program, arguments, said, devices))
    self.process.start()

  def end(self, timeout_s: float = 900) -> tuple[int, str]:
    """Its exit status (-9: SIGKILL), and what it printed; after the timeout it is killed."""
    self.process.join(timeout_s)
    self.process.kill()
    self.process.join()
    return self.process.exitcode, self._said.read_text(errors="replace")


def cluster(
  flags: Sequence[str], processes: int, *, said: pathlib.Path, devices: int = 1, program: Callable[..., None] = job,
) -> list[Job]:  # fmt: skip
  """The main job as several processes, which find each other; process K prints to SAID-K."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  place = [f"--coordinator=localhost:{port}", f"--processes={processes}"]
  return [
    Job(program, [*flags, *place, f"--process={index}"], said=said.with_name(f"{said.name}-{index}"), devices=devices)
    for index in range(processes)
  ]  # fmt: skip


def end(running: Sequence[Job]) -> tuple[list[int], list[str]]:
  """The exit statuses of several processes, and what each printed."""
  statuses, printed = zip(*(one.end() for one in running), strict=True)
  return list(statuses), list(printed)


def _child(program: Callable[..., None], arguments: tuple, said: pathlib.Path, devices: int) -> None:
  stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  for standard in (1, 2):
    os.dup2(stream, standard)
  os.environ["XLA_FLAGS"] = quick.xla_flags(devices)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  quick.collect_seldom()
  os.chdir(ROOT)
  program(*arguments)
