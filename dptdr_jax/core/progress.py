"""Progress on standard error for everything that takes more than seconds.

All stages report through `bar` or `track`, so that a test can watch how far a run has come.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm

T = TypeVar("T")


class Bar:
  """A progress bar; `advance(n)` counts n more, `note(...)` shows figures behind it."""

  def __init__(self, description: str, total: int | None, unit: str, initial: int):
    self.description, self.done = description, initial
    self._tqdm = tqdm.tqdm(
      desc=description, total=total, unit=unit, initial=initial, file=sys.stderr, dynamic_ncols=True,
      mininterval=0.5 if sys.stderr.isatty() else 15.0, unit_scale=unit not in ("step", "shard"),
    )  # fmt: skip

  def advance(self, n: int = 1) -> None:
    """Counts n more."""
    self.done += n
    self._tqdm.update(n)

  def note(self, **figures: object) -> None:
    """Shows figures behind the bar."""
    self._tqdm.set_postfix(figures, refresh=False)

  def close(self) -> None:
    """Ends the bar's line."""
    self._tqdm.close()


class Silent:
  """Takes what a Bar takes and shows nothing."""

  def advance(self, n: int = 1) -> None:
    """Does nothing."""


@contextlib.contextmanager
def bar(description: str, total: int | None = None, unit: str = "item", initial: int = 0) -> Iterator[Bar]:
  """A progress bar for the length of a `with` block."""
  shown = Bar(description, total, unit, initial)
  try:
    yield shown
  finally:
    shown.close()


@contextlib.contextmanager
def silent() -> Iterator[Silent]:
  """A bar that shows nothing, for work that is over before anyone looks."""
  yield Silent()


def track(items: Iterable[T], description: str, total: int | None = None, unit: str = "item") -> Iterator[T]:
  """Yields `items` and shows how many have gone by."""
  if total is None and hasattr(items, "__len__"):
    total = len(items)  # type: ignore[arg-type]
  with bar(description, total, unit) as shown:
    for item in items:
      yield item
      shown.advance()


def say(text: str) -> None:
  """Writes a line, or several, to standard output: what a run has to tell at its end."""
  sys.stdout.write(f"{text}\n")
  sys.stdout.flush()
