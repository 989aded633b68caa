"""Locks that end with the process that holds them, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from dptdr_jax.core import preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
  """Holds DIR/lock for the length of a `with` block.

  Raises:
    InputError: another process holds it; says which, where and since when.
  """

  def refuse(holder: str) -> None:
    raise InputError(f"another run is at work in this directory ({holder})", path=directory,
                     fix="Wait for it, stop it, or name another --workdir")  # fmt: skip

  with held(pathlib.Path(directory, "lock"), on_wait=refuse):
    yield


@contextlib.contextmanager
def held(path: Path, *, wait_s: float = 0.1, on_wait: Callable[[str], None] = lambda holder: None) -> Iterator[None]:
  """Holds a lock file, after waiting for whoever holds it; removes it at the end.

  Args:
    wait_s: seconds between two attempts.
    on_wait: told once who holds it.

  Raises:
    Preempted: SIGTERM came while it waited.
  """
  path, told = pathlib.Path(path), False
  while True:
    with _opened(path) as stream:
      if _taken(stream, path):
        if not _is_at(stream, path):
          continue  # its last holder has removed it
        _sign(stream)
        try:
          yield
        finally:
          path.unlink(missing_ok=True)
        return
    if not told:
      on_wait(_holder(path))
      told = True
    preemption.check(f"waiting for {path}")
    time.sleep(wait_s)


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[TextIO]:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Never through a link: what it names may be somebody else's file.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
  except OSError as error:
    reason = "a link is in its place" if error.errno == errno.ELOOP else error.strerror
    raise InputError(f"the lock cannot be opened ({reason})", path=path) from error
  with os.fdopen(descriptor, "r+", encoding="utf-8") as stream:
    yield stream


def _taken(stream: TextIO, path: pathlib.Path) -> bool:
  # The system's lock (flock), not the file's presence: nothing has to be removed after SIGKILL or a power cut.
  try:
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    _log.warning("%s cannot be locked (%s): a second run would not be noticed", path, error)
  return True


def _is_at(stream: TextIO, path: pathlib.Path) -> bool:
  try:
    return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
  except FileNotFoundError:
    return False


def _sign(stream: TextIO) -> None:
  stream.truncate(0)
  about = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
  stream.write(json.dumps(about) + "\n")
  stream.flush()


def _holder(path: pathlib.Path) -> str:
  try:
    about = json.loads(path.read_text(encoding="utf-8"))
    return f"process {about['process']} on {about['host']}, since {about['since']}"
  except (OSError, ValueError, KeyError, TypeError):
    return "unknown"
