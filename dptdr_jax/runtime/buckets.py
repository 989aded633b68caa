"""Sequences of many lengths through one jitted function: by length, in few shapes, fetched while the devices work."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from dptdr_jax.core import preemption, progress
from dptdr_jax.runtime.mesh import put_batch

ON_CPU, ON_ACCELERATOR = 2048, 16_384  # tokens at a time: what fits a CPU's cache, what fills an accelerator
_BUCKET = 16  # lengths are padded to a multiple of it, so that few shapes are compiled
_AHEAD = 2  # batches that may be on the devices while the host builds the next


class Sequences(Protocol):
  """Token sequences, numbered from 0."""

  @property
  def limit(self) -> int:
    """The largest possible length, and the largest width of a batch."""
    ...

  def lengths(self) -> np.ndarray:
    """Number of tokens of each, int64 [n]."""
    ...

  def batch(self, places: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """Arrays of some of them, a row each, padded to `width`."""
    ...


def map_sequences(
  function: Callable[[dict[str, Any]], Any],
  sequences: Sequences,
  mesh: Mesh,
  shape: tuple[int, ...] = (),
  *,
  batch_tokens: int = 0,
  description: str = "",
  unit: str = "text",
  advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
  """Returns what `function` gives for each sequence, float32 [n, *shape], in their order.

  Args:
    function: a batch on the mesh, rows sharded → [B, *shape]; returns at once, as jitted functions do.
    batch_tokens: tokens of a device at a time, padding included; 0: by the device.
    description: of the progress bar, which counts `unit`s; '': no bar.
    advance: called with the number of sequences that were done since, for a caller's own bar.

  Raises:
    Preempted: SIGTERM came; nothing is kept.
  """
  lengths = sequences.lengths()
  batch_tokens = batch_tokens or (ON_CPU if mesh.devices.flat[0].platform == "cpu" else ON_ACCELERATOR)
  results = np.empty((len(lengths), *shape), np.float32)
  running: collections.deque = collections.deque()

  def fetch() -> None:
    places, result = running.popleft()
    results[places] = np.asarray(result)[: len(places)]
    shown.advance(len(places))
    advance(len(places))

  with progress.bar(description, len(results), unit) as shown:
    for places, width, size in plan(lengths, sequences.limit, batch_tokens, mesh.size):
      batch = _fill(sequences.batch(places, width), size)
      running.append((places, function(put_batch(batch, mesh))))
      if len(running) > _AHEAD:
        fetch()
      preemption.check(f"{description or 'this part'} begins again with its last unfinished shard")
    while running:
      fetch()
  return results


def plan(lengths: np.ndarray, limit: int, batch_tokens: int, devices: int) -> Iterator[tuple[np.ndarray, int, int]]:
  """Yields (places, width, size) of batches, longest first, so that what does not fit fails at once.

  Each width has one `size`: rows with filling. A batch that its width does not fill takes the longest sequences of the
  next width, so only the last batch is not full. That one is filled to a power of two, so a single query is cheap.
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
  """Fills arrays to `size` rows with copies of their first row; their results are dropped."""
  return {
    name: np.concatenate([value, np.repeat(value[:1], size - len(value), 0)]) if len(value) < size else value
    for name, value in batch.items()
  }
