"""Sequences of many lengths through one jitted function: in order of length, in few shapes, fetched a step behind."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from dptdr_jax.core import preemption, progress
from dptdr_jax.runtime.mesh import put_batch

BATCH_TOKENS = 16384  # tokens a device takes at a time, padding included
_BUCKET = 16  # lengths are padded to a multiple: few shapes to compile
_AHEAD = 2  # batches that may be under way on the devices while the host builds the next


class Sequences(Protocol):
  """Token sequences by place."""

  @property
  def limit(self) -> int:
    """The longest that one can be, and the widest that a batch gets."""
    ...

  def lengths(self) -> np.ndarray:
    """Tokens of each, int64 [n]."""
    ...

  def batch(self, places: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """Arrays of some of them, one row each, padded to `width`."""
    ...


def map_sequences(
  function: Callable[[dict[str, Any]], Any],
  sequences: Sequences,
  mesh: Mesh,
  shape: tuple[int, ...] = (),
  *,
  batch_tokens: int = BATCH_TOKENS,
  description: str = "",
  unit: str = "text",
  advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
  """Returns what `function` gives for each sequence, float32 [n, *shape], in their order.

  Args:
    function: of a batch on the mesh, rows sharded, to an array [B, *shape]; returns at once, as jitted ones do.
    batch_tokens: a device's tokens at a time, padding included.
    description: of the progress bar, which counts in `unit`s; '' for none.
    advance: told how many more are done, where a caller shows its own.

  Raises:
    Preempted: SIGTERM came; nothing of it is kept.
  """
  lengths = sequences.lengths()
  results = np.empty((len(lengths), *shape), np.float32)
  under_way: collections.deque = collections.deque()

  def fetch() -> None:
    places, result = under_way.popleft()
    results[places] = np.asarray(result)[: len(places)]
    shown.advance(len(places))
    advance(len(places))

  with progress.bar(description, len(results), unit) if description else progress.silent() as shown:
    for places, width, size in plan(lengths, sequences.limit, batch_tokens, mesh.size):
      batch = _fill(sequences.batch(places, width), size)
      under_way.append((places, function(put_batch(batch, mesh))))
      if len(under_way) > _AHEAD:
        fetch()
      preemption.check(f"{description or 'what was computed'} will begin again, from the last whole part")
    while under_way:
      fetch()
  return results


def plan(lengths: np.ndarray, limit: int, batch_tokens: int, devices: int) -> Iterator[tuple[np.ndarray, int, int]]:
  """Yields (places, width, size), longest first, so that what does not fit fails at once; `size` rows with filling.

  A width has one full size; a batch that its width does not fill takes the longest of the next one. So the last batch
  alone is not full: it is filled to a power of two, and a lone query doesn't pay for a batch.
  """
  widths = np.minimum(-(-lengths // _BUCKET) * _BUCKET, limit)
  order, start = np.argsort(-widths, kind="stable"), 0
  while start < len(order):
    width = int(widths[order[start]])
    full = max(1, batch_tokens // width) * devices
    places = order[start : start + full]
    yield places, width, min(full, devices * 2 ** int(np.ceil(np.log2(-(-len(places) // devices)))))
    start += len(places)


def _fill(batch: dict[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
  """Fills arrays to `size` rows with copies of their first row, whose results nobody reads."""
  return {
    name: np.concatenate([value, np.repeat(value[:1], size - len(value), 0)]) if len(value) < size else value
    for name, value in batch.items()
  }
