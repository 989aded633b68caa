"""What code that shares work over processes needs to know of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Team:
  """The processes of a run: a single one here; `runtime.hosts.TEAM` is of several.

  Attributes:
    count: how many there are.
    index: which one this is, from 0.
  """

  count = 1
  index = 0

  @property
  def is_main(self) -> bool:
    """Whether this is process 0, which writes shared files."""
    return self.index == 0

  def barrier(self, name: str) -> None:
    """Waits until every process has come to the point called `name`."""

  def first_says(self, make: Callable[[], Any]) -> Any:
    """What `make` returns in process 0, in every process: a value that JSON can hold. The others don't call it."""
    return make()


SOLO = Team()
