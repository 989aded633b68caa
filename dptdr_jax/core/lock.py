"""One run at a time in a directory: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import platform
import time
from collections.abc import Iterator

from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
  """Holds DIR/lock for the length of a `with` block.

  The lock is the operating system's (flock), not the file's presence: nothing has to be removed after a SIGKILL or a
  power cut. The file says who held it last. Where the file system has no locks a warning says so, and nothing is held.

  Raises:
    InputError: another process holds it; says which, where and since when.
  """
  path = pathlib.Path(directory, "lock")
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "a+", encoding="utf-8") as stream:
    try:
      fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise InputError(
        f"another run is at work in this directory ({_holder(path)})", path=directory,
        fix="Wait for it, stop it, or name another --workdir",
      ) from None  # fmt: skip
    except OSError as error:
      _log.warning("%s cannot be locked (%s): a second run in this directory would not be refused", path, error)
    stream.truncate(0)
    about = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
    stream.write(json.dumps(about) + "\n")
    stream.flush()
    yield


def _holder(path: pathlib.Path) -> str:
  try:
    about = json.loads(path.read_text(encoding="utf-8"))
    return f"process {about['process']} on {about['host']}, since {about['since']}"
  except (OSError, ValueError, KeyError):
    return "it has not said which"
