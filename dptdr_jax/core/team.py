"""What code that shares work over processes needs to know of them; `runtime.hosts.TEAM` is the real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Team(Protocol):
  """The processes of a run.

  Attributes:
    count: how many there are.
    index: which one this is, from 0.
  """

  count: int
  index: int

  @property
  def is_main(self) -> bool:
    """Whether this is process 0, which writes shared files."""
    ...

  def barrier(self, name: str) -> None:
    """Waits until every process has come to the point called `name`."""
    ...

  def first_says(self, make: Callable[[], Any]) -> Any:
    """What `make` returns in process 0, in every process: a value that JSON can hold. The others don't call it."""
    ...


class Solo:
  """One process alone; it waits for nobody."""

  count = 1
  index = 0
  is_main = True

  def barrier(self, name: str) -> None:
    """Returns at once."""

  def first_says(self, make: Callable[[], Any]) -> Any:
    """What `make` returns."""
    return make()


SOLO: Team = Solo()
