"""Lists of different lengths as one flat array and offsets: how ids, tokens and judgements are kept."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Sequence

import numpy as np

from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.shards import mapped


def offsets_of(lengths: np.ndarray) -> np.ndarray:
  """Turns lengths [n] into offsets int64 [n + 1], so that list i is flat[offsets[i]:offsets[i + 1]]."""
  offsets = np.zeros(len(lengths) + 1, np.int64)
  np.cumsum(lengths, out=offsets[1:])
  return offsets


def gather(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Concatenates flat[start:start + length] for all `starts` and `lengths`, int64 [n] each, without a loop."""
  ends = np.cumsum(lengths)
  total = int(ends[-1]) if len(ends) else 0
  shifts = np.repeat(starts - (ends - lengths), lengths)
  return flat[shifts + np.arange(total, dtype=np.int64)]


def opened(path: pathlib.Path, kinds: str = "iu", length: int | None = None) -> np.ndarray:
  """Opens a .npy file of so many whole numbers memory-mapped; `kinds` are numpy's letters of the dtypes.

  Raises:
    InputError: the file is missing or cut, or holds another kind of array.
  """
  array = mapped(path)
  if array.ndim != 1 or array.dtype.kind not in kinds or length not in (None, len(array)):
    wanted = "" if length is None else f"{length} "
    raise InputError(f"one row of {wanted}whole numbers expected, not {array.dtype} {array.shape}", path=path)
  return array


class Ragged:
  """Lists of numbers by row: `len(ragged)` rows, `ragged[row]` → array, in memory or memory-mapped.

  Attributes:
    flat: all lists, one after the other.
    offsets: int64 [n + 1].
  """

  def __init__(self, flat: np.ndarray, offsets: np.ndarray):
    self.flat, self.offsets = flat, offsets

  @classmethod
  def of(cls, lists: Sequence[Sequence[int]], dtype: type = np.int32) -> Ragged:
    """Copies lists into one array."""
    offsets = offsets_of(np.fromiter(map(len, lists), np.int64, len(lists)))
    return cls(np.fromiter(itertools.chain.from_iterable(lists), dtype, int(offsets[-1])), offsets)

  @classmethod
  def open(cls, directory: pathlib.Path, name: str) -> Ragged:
    """Opens offsets.npy and NAME.npy memory-mapped.

    Raises:
      InputError: a file is missing or cut, or they do not belong together.
    """
    offsets = open_offsets(directory)
    return cls(opened(directory / f"{name}.npy", length=int(offsets[-1])), offsets)

  def save(self, directory: pathlib.Path, name: str) -> None:
    """Writes what `open` reads."""
    np.save(directory / "offsets.npy", self.offsets)
    np.save(directory / f"{name}.npy", self.flat)

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def __getitem__(self, row: int) -> np.ndarray:
    return self.flat[self.offsets[row] : self.offsets[row + 1]]

  @property
  def lengths(self) -> np.ndarray:
    """Int64 [n]."""
    return np.diff(self.offsets)

  def lengths_at(self, rows: np.ndarray) -> np.ndarray:
    """Returns int64: the lengths of `rows`."""
    return self.offsets[rows + 1] - self.offsets[rows]

  def heads(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the first `counts` numbers of each of `rows`, one row after the other."""
    return gather(self.flat, self.offsets[rows], counts)

  def take(self, rows: np.ndarray) -> np.ndarray:
    """Returns all numbers of `rows`, one row after the other."""
    return self.heads(rows, self.lengths_at(rows))


def open_offsets(directory: pathlib.Path) -> np.ndarray:
  """Opens offsets.npy; an InputError if it is missing, cut, or no offsets."""
  offsets = opened(directory / "offsets.npy", "i")
  if not len(offsets) or offsets[0] != 0 or offsets[-1] < 0:
    raise InputError("offsets begin with 0", path=directory / "offsets.npy")
  return offsets


class RowLists(Ragged):
  """For every query row a list of passage rows, with a value for each where there are values; memory-mapped."""

  def __init__(self, directory: pathlib.Path, count: int, *, valued: bool = False):
    """Opens what `write_lists` wrote.

    Args:
      count: number of queries that there must be.
      valued: whether there are values.

    Raises:
      InputError: a file is missing or cut, or they do not belong together.
    """
    offsets = open_offsets(directory)
    super().__init__(opened(directory / "rows.npy", length=int(offsets[-1])), offsets)
    if count != len(self):
      raise InputError(f"lists of {count} queries expected, not of {len(self)}", path=directory / "offsets.npy")
    self._values = Ragged(opened(directory / "values.npy", length=len(self.flat)), offsets) if valued else None

  def rows(self, query_row: int) -> np.ndarray:
    """Returns the passage rows of a query, int64 [n], in the order in which they were written."""
    return self[query_row].astype(np.int64)

  def values(self, query_row: int) -> np.ndarray:
    """Returns the value of each passage row (the grade of a judgement), int64 [n]."""
    return self._values[query_row].astype(np.int64)

  def triples(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns all lists, one after the other: query rows, passage rows and values (1 without values), int64 each."""
    queries = np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)
    values = np.ones_like(queries) if self._values is None else self._values.flat.astype(np.int64)
    return queries, self.flat.astype(np.int64), values


def write_lists(
  directory: pathlib.Path, count: int, queries: np.ndarray, rows: np.ndarray, values: np.ndarray | None = None
) -> None:
  """Writes pairs (queries[i], rows[i]) grouped by query, the order within a query kept.

  Args:
    directory: removed first, with what a killed writer left there.
    count: number of query rows.
    queries, rows: int [n].
    values: int [n]; None: the lists have no values.
  """
  files.remove(directory)
  directory.mkdir(parents=True)
  order = np.argsort(queries, kind="stable")
  Ragged(rows[order].astype(np.int32), offsets_of(np.bincount(queries, minlength=count))).save(directory, "rows")
  if values is not None:
    np.save(directory / "values.npy", values[order].astype(np.int32))
