"""SIGTERM, as schedulers send it before they take a machine: finish the step, save, exit with a status of its own."""

from __future__ import annotations

import signal
import threading

EXIT_STATUS = 75  # sysexits' EX_TEMPFAIL: the same command may succeed later

_asked = threading.Event()


class Preempted(Exception):
  """Raised at a point where everything is saved, after SIGTERM.

  Attributes:
    agreed: all processes of the run raise it together; else this one has still to tell the others.
  """

  def __init__(self, where: str, agreed: bool = False):
    super().__init__(where)
    self.agreed = agreed


def install() -> None:
  """Makes SIGTERM a wish that the run's loops ask for, instead of sudden death."""
  signal.signal(signal.SIGTERM, lambda number, frame: _asked.set())


def asked() -> bool:
  """Whether SIGTERM has come."""
  return _asked.is_set()


def check(where: str) -> None:
  """Raises Preempted when SIGTERM has come; call it where the run can end and go on from what is on disk."""
  if asked():
    raise Preempted(where)
