"""Token ids as an encoder reads them, special tokens included: from memory, padded by a caller, or from a store.

Each class is a `runtime.buckets.Sequences`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dptdr_jax.data.ragged import Ragged
from dptdr_jax.data.store import TokenStore


class Lists:
  """Lists of ids in memory; `limit` is the longest that one can be."""

  def __init__(self, lists: Sequence[Sequence[int]], pad_id: int, limit: int):
    self._lists, self._pad_id, self.limit = Ragged.of(lists), pad_id, limit

  def lengths(self) -> np.ndarray:
    """Returns int64 [n]."""
    return self._lists.lengths

  def batch(self, places: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """Gathers tokens int32 [b, width], padded on the right, and lengths int32 [b]."""
    lengths = self._lists.lengths_at(places)
    tokens = np.full((len(places), width), self._pad_id, np.int32)
    tokens[np.arange(width) < lengths[:, None]] = self._lists.take(places)
    return {"tokens": tokens, "lengths": lengths.astype(np.int32)}


class Padded:
  """Ids [n, T] as a caller padded them, with lengths [n]: the caller chooses the width, and so the number of shapes."""

  def __init__(self, ids: np.ndarray, lengths: np.ndarray):
    self._ids, self._lengths, self.limit = ids, lengths.astype(np.int32), ids.shape[1]

  def lengths(self) -> np.ndarray:
    """Returns int64 [n]: the width for all."""
    return np.full(len(self._ids), self.limit, np.int64)

  def batch(self, places: np.ndarray, width: int) -> dict[str, np.ndarray]:
    return {"tokens": self._ids[places], "lengths": self._lengths[places]}


class Stored:
  """Rows of a token store, cut to `limit` tokens."""

  def __init__(self, store: TokenStore, rows: np.ndarray, limit: int):
    self._store, self._rows, self.limit = store, rows, limit

  def lengths(self) -> np.ndarray:
    """Returns int64 [n]."""
    return self._store.lengths_of(self._rows, self.limit)

  def batch(self, places: np.ndarray, width: int) -> dict[str, np.ndarray]:
    tokens, lengths = self._store.batch(self._rows[places], self.limit, width)
    return {"tokens": tokens, "lengths": lengths}
