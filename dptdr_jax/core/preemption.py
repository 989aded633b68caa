"""SIGTERM, which schedulers send before they take a machine, and Ctrl-C: finish the step, save, exit with status 75."""

from __future__ import annotations

import signal
import threading

EXIT_STATUS = 75  # sysexits' EX_TEMPFAIL: the same command may succeed later

_asked = threading.Event()


class Preempted(Exception):
  """Raised after SIGTERM, at a point where everything is saved.

  Attributes:
    agreed: True: all processes of the run raise it together; False: the others have not been told yet.
  """

  def __init__(self, where: str, agreed: bool = False):
    super().__init__(where)
    self.agreed = agreed


def install() -> None:
  """Sets a flag on SIGTERM and on Ctrl-C; loops poll it. A second Ctrl-C interrupts at once."""
  signal.signal(signal.SIGTERM, _hear)
  signal.signal(signal.SIGINT, _hear)


def _hear(number: int, _: object) -> None:
  if number == signal.SIGINT and asked():
    raise KeyboardInterrupt
  _asked.set()


def asked() -> bool:
  """Whether SIGTERM or Ctrl-C has come."""
  return _asked.is_set()


def check(where: str) -> None:
  """Raises Preempted after SIGTERM; call it where the run can stop and later resume from what is on disk."""
  if asked():
    raise Preempted(where)
