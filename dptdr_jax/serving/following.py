"""Follows the changes that other servers make to the tasks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from dptdr_jax.core.errors import DptdrError
from dptdr_jax.serving.catalog import Catalog

log = logging.getLogger(__name__)

_POLL_S = 1.0


class Following:
  """One thread, which asks for the version of the tasks every second; none where nobody else changes them."""

  def __init__(self, catalog: Catalog, catch_up: Callable[[Sequence[str]], int]):
    """`catch_up` follows changes, opens tasks of some names anew, and returns the version that it has followed."""
    self._catalog, self._catch_up = catalog, catch_up
    self._version = -1
    self._names: set[str] = set()
    self._wake, self._stopping = threading.Event(), False
    self._thread = threading.Thread(target=self._run, name="follow", daemon=True)

  def start(self) -> None:
    """Starts the thread."""
    if self._catalog.shared:
      self._thread.start()

  def wake(self, name: str) -> None:
    """A task seems to have been replaced: looks at once."""
    self._names.add(name)
    self._wake.set()

  def stop(self, timeout: float = 5.0) -> None:
    """Stops the thread."""
    self._stopping = True
    self._wake.set()
    if self._thread.is_alive():
      self._thread.join(timeout)

  def _run(self) -> None:
    reached = True
    while not self._stopping:
      self._wake.wait(_POLL_S)
      self._wake.clear()
      names, self._names = self._names, set()
      try:
        if not self._stopping and (names or self._catalog.version() != self._version):
          self._version = self._catch_up(sorted(names))
        reached = True
      except DptdrError as error:
        if reached:
          log.warning("changes of tasks cannot be followed: %s", error)
        reached = False
      except Exception:
        log.exception("following changes of tasks")
