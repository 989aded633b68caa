"""Rows of different lengths as one flat array and offsets: how ids, tokens and judgements lie on disk."""

from __future__ import annotations

import pathlib

import numpy as np

from dptdr_jax.core.errors import InputError


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


def mapped(path: str | pathlib.Path) -> np.ndarray:
  """Opens a .npy file memory-mapped, as a plain array: np.memmap makes every small slice several times as slow.

  Raises:
    InputError: it is not there, or not whole.
  """
  try:
    return np.asarray(np.load(path, mmap_mode="r"))
  except (OSError, ValueError, EOFError) as error:
    raise InputError(f"not a whole array ({error})", path=path) from error


class RowLists:
  """For every query row a list of passage rows, and a value for each where there are values; memory-mapped.

  `lists.rows(query_row)` → int64 [n], `lists.values(query_row)` → int64 [n], `len(lists)` → number of queries.
  """

  def __init__(self, directory: str | pathlib.Path):
    directory = pathlib.Path(directory)
    self.offsets, self._rows = mapped(directory / "offsets.npy"), mapped(directory / "rows.npy")
    valued = directory / "values.npy"
    self._values = mapped(valued) if valued.is_file() else None

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def rows(self, query_row: int) -> np.ndarray:
    """Returns the passage rows of a query, in the source's order."""
    return self._rows[self.offsets[query_row] : self.offsets[query_row + 1]].astype(np.int64)

  def values(self, query_row: int) -> np.ndarray:
    """Returns what stands with each passage row (the grade of a judgement)."""
    if self._values is None:
      raise ValueError("these lists have no values")
    return self._values[self.offsets[query_row] : self.offsets[query_row + 1]].astype(np.int64)

  def flat(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns all lists, one behind the other: query rows, passage rows and values (1 where there are none), int64."""
    queries = np.repeat(np.arange(len(self), dtype=np.int64), np.diff(self.offsets))
    values = np.ones_like(queries) if self._values is None else self._values.astype(np.int64)
    return queries, self._rows.astype(np.int64), values


def write_lists(
  directory: str | pathlib.Path, count: int, queries: np.ndarray, rows: np.ndarray, values: np.ndarray | None = None
) -> RowLists:
  """Writes pairs (queries[i], rows[i]) grouped by query, the order within a query kept, and opens them.

  Args:
    directory: made here.
    count: number of query rows.
    queries, rows: int [n]; values: int [n] or None.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True)
  order = np.argsort(queries, kind="stable")
  np.save(directory / "offsets.npy", offsets_of(np.bincount(queries, minlength=count)))
  np.save(directory / "rows.npy", rows[order].astype(np.int32))
  if values is not None:
    np.save(directory / "values.npy", values[order].astype(np.int32))
  return RowLists(directory)
