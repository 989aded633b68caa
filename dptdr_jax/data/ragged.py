"""Rows of different lengths as one flat array and offsets: how ids, tokens and judgements lie on disk."""

from __future__ import annotations

import numpy as np


def offsets_of(lengths: np.ndarray) -> np.ndarray:
  """Turns lengths [n] into offsets int64 [n + 1], so that row i is flat[offsets[i]:offsets[i + 1]]."""
  offsets = np.zeros(len(lengths) + 1, np.int64)
  np.cumsum(lengths, out=offsets[1:])
  return offsets


def gather(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Concatenates flat[start:start + length] over all rows without a loop.

  Args:
    flat: any one-dimensional array, memory-mapped or not.
    starts: int64 [n]; lengths: int64 [n].
  """
  ends = np.cumsum(lengths)
  total = int(ends[-1]) if len(ends) else 0
  shifts = np.repeat(starts - (ends - lengths), lengths)
  return flat[shifts + np.arange(total, dtype=np.int64)]
