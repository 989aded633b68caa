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


class Bar(tqdm.tqdm):
  """A progress bar."""

  def advance(self, n: int = 1) -> None:
    """Counts n more."""
    self.update(n)

  def note(self, **figures: object) -> None:
    """Shows figures behind the bar."""
    self.set_postfix(figures, refresh=False)


class Silent:
  """Takes what a Bar takes and shows nothing."""

  def advance(self, n: int = 1) -> None:
    """Does nothing."""


@contextlib.contextmanager
def bar(description: str, total: int | None = None, unit: str = "item", initial: int = 0) -> Iterator[Bar | Silent]:
  """A progress bar for the length of a `with` block; without a description nothing is shown."""
  if not description:
    yield Silent()
    return
  with Bar(
    desc=description, total=total, unit=unit, initial=initial, file=sys.stderr, dynamic_ncols=True,
    mininterval=0.5 if sys.stderr.isatty() else 15.0, unit_scale=unit not in ("step", "shard"),
  ) as shown:  # fmt: skip
    yield shown


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
