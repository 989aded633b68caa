"""Runs of a program in processes of their own, forked from one that has imported what the main job imports.

A run that is killed and started again dozens of times would do little else than import; forked, it is as much a process
of its own, and no device has been touched before the fork.
"""

from __future__ import annotations

import multiprocessing
import os
import pathlib
from collections.abc import Callable, Mapping

import jax
from support import quick

ROOT = pathlib.Path(__file__).parents[2]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["dptdr_jax.pipeline", "matplotlib.figure", "tensorflow_datasets"])


def run(
  program: Callable[..., None], *arguments: object, said: pathlib.Path, environment: Mapping[str, str] | None = None
) -> int:
  """Calls `program` there, on one device; returns the exit status (-9: SIGKILL). What it prints is in the file `said`.

  What one compiles the next one loads.
  """
  process = _CONTEXT.Process(target=_child, args=(program, arguments, said, environment or {}))
  process.start()
  process.join()
  return process.exitcode


def _child(program: Callable[..., None], arguments: tuple, said: pathlib.Path, environment: Mapping[str, str]) -> None:
  stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  for standard in (1, 2):
    os.dup2(stream, standard)
  os.environ.update({"XLA_FLAGS": quick.xla_flags(), **environment})
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  quick.collect_seldom()
  os.chdir(ROOT)
  program(*arguments)
