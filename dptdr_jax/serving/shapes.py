"""The shapes of batches: few enough to compile all of them before the first request."""

from __future__ import annotations

import bisect
import dataclasses
import functools

_STEP = 16  # widths are multiples of it
_SHRINK = 4  # from one number of rows to the next
_SMALLEST = 32  # tokens of a batch for which no smaller one is worth compiling


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Widths and numbers of rows.

  Attributes:
    longest: tokens of the longest text.
    batch_tokens: tokens of a full batch on one device, with padding.
    devices: they share the rows evenly.
  """

  longest: int
  batch_tokens: int
  devices: int = 1

  @functools.cached_property
  def widths(self) -> tuple[int, ...]:
    """16, 32, 64, 96, 128, 192, 256, 384, … up to the longest text."""
    longest = -(-self.longest // _STEP) * _STEP
    widths, power = [_STEP, 2 * _STEP], 4 * _STEP
    while widths[-1] < longest:
      widths += [power, power * 3 // 2]
      power *= 2
    return (*(width for width in widths if width < longest), longest)

  def width(self, tokens: int) -> int:
    """The width for a text."""
    return self.widths[bisect.bisect_left(self.widths, tokens)]

  def sizes(self, width: int) -> list[int]:
    """The numbers of rows of batches of one width, the smallest first: each is a quarter of the next one."""
    rows = max(1, self.batch_tokens // width)
    sizes = [rows]
    while rows > 1 and rows * width > _SMALLEST:
      rows = max(1, rows // _SHRINK)
      sizes.append(rows)
    return [size * self.devices for size in reversed(sizes)]

  def full(self, width: int) -> int:
    """Rows of a full batch."""
    return self.sizes(width)[-1]

  def size(self, width: int, rows: int) -> int:
    """Rows of the smallest batch that holds so many."""
    sizes = self.sizes(width)
    return sizes[bisect.bisect_left(sizes, rows)]

  def rows(self, width: int, waiting: int) -> int:
    """How many of the waiting rows form a batch: so many that at most half of it is padding."""
    size = self.size(width, min(waiting, self.full(width)))
    smaller = [other for other in self.sizes(width) if other < size]
    return smaller[-1] if smaller and 2 * waiting < size else min(waiting, size)

  def all(self) -> list[tuple[int, int]]:
    """Every (width, rows) that a batch can have."""
    return [(width, size) for width in self.widths for size in self.sizes(width)]
