"""A compact table of ids on disk: row → id by offsets, id → row by sorted hashes; 21 million ids are 0.7 GB."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from dptdr_jax.core.errors import DptdrError
from dptdr_jax.data import ragged

_PRIME = np.uint64(0x100000001B3)  # FNV-1a, 64 bits: http://www.isthe.com/chongo/tech/comp/fnv/
_BASIS = 0xCBF29CE484222325
_CHUNK = 1 << 16


class DuplicateId(DptdrError):
  """An id stands twice. `row` is the second row that has it, from 0."""

  def __init__(self, value: str, row: int):
    super().__init__(f"duplicate id {value!r}")
    self.value, self.row = value, row


class IdTable:
  """Reads a table that `IdTableWriter` wrote; everything is memory-mapped.

  `len(table)`, `table[row]` → id, `table.ids(rows)` → list of ids, `table.rows(ids)` → int64 rows, −1 where unknown.
  """

  def __init__(self, directory: str | pathlib.Path):
    directory = pathlib.Path(directory)
    self._bytes = ragged.mapped(directory / "bytes.npy")
    self._offsets = ragged.mapped(directory / "offsets.npy")
    self._hashes = ragged.mapped(directory / "hashes.npy")
    self._sorted_rows = ragged.mapped(directory / "rows.npy")
    self._seed = int(np.load(directory / "seed.npy"))

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def __getitem__(self, row: int) -> str:
    if not 0 <= row < len(self):
      raise IndexError(f"row {row} of a table of {len(self)}")
    return self._bytes[self._offsets[row] : self._offsets[row + 1]].tobytes().decode()

  def ids(self, rows: Iterable[int]) -> list[str]:
    """Returns the ids of `rows`."""
    return [self[int(row)] for row in rows]

  def rows(self, ids: Sequence[str]) -> np.ndarray:
    """Returns int64 [n]: the row of each id, −1 for an id that is not here."""
    found = [self._rows_of_chunk(ids[start : start + _CHUNK]) for start in range(0, len(ids), _CHUNK)]
    return np.concatenate(found) if found else np.empty(0, np.int64)

  def _rows_of_chunk(self, ids: Sequence[str]) -> np.ndarray:
    if not len(self):
      return np.full(len(ids), -1, np.int64)
    flat, offsets = _pack(ids)
    lengths = np.diff(offsets)
    place = np.searchsorted(self._hashes, _hash(flat, offsets, self._seed))
    rows = self._sorted_rows[np.minimum(place, len(self) - 1)].astype(np.int64)
    # Hashes of the table differ from each other, yet an unknown id may share one: compare the bytes.
    same_length = np.flatnonzero(self._offsets[rows + 1] - self._offsets[rows] == lengths)
    theirs = ragged.gather(self._bytes, self._offsets[rows[same_length]], lengths[same_length])
    ours = ragged.gather(flat, offsets[same_length], lengths[same_length])
    wrong = np.concatenate([[0], np.cumsum(theirs != ours)])
    ends = np.cumsum(lengths[same_length])
    equal = wrong[ends] == wrong[ends - lengths[same_length]]
    result = np.full(len(ids), -1, np.int64)
    result[same_length[equal]] = rows[same_length[equal]]
    return result


class IdTableWriter:
  """Collects ids in compact memory (their bytes and 8 bytes each) and writes the table at the end."""

  def __init__(self) -> None:
    self._chunks: list[np.ndarray] = []
    self._lengths: list[np.ndarray] = []
    self._pending: list[str] = []

  def append(self, value: str) -> None:
    """Adds the id of the next row."""
    self._pending.append(value)
    if len(self._pending) == _CHUNK:
      self._flush()

  def _flush(self) -> None:
    flat, offsets = _pack(self._pending)
    self._chunks.append(flat)
    self._lengths.append(np.diff(offsets))
    self._pending = []

  def write(self, directory: str | pathlib.Path) -> IdTable:
    """Writes the table into `directory` (made here) and opens it; raises DuplicateId."""
    self._flush()
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True)
    flat = np.concatenate(self._chunks)
    offsets = ragged.offsets_of(np.concatenate(self._lengths))
    seed, hashes, order = _sorted_hashes(flat, offsets)
    for name, array in (("bytes", flat), ("offsets", offsets), ("hashes", hashes), ("rows", order)):
      np.save(directory / f"{name}.npy", array)
    np.save(directory / "seed.npy", np.uint64(seed))
    return IdTable(directory)


def _sorted_hashes(flat: np.ndarray, offsets: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
  """Returns (seed, sorted hashes, rows in that order); two different ids with one hash make it try the next seed."""
  seed = 0
  while True:
    hashes = _hash(flat, offsets, seed)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    twins = np.flatnonzero(hashes[1:] == hashes[:-1])
    if not len(twins):
      return seed, hashes, order.astype(np.int32 if len(order) < 2**31 else np.int64)
    pairs = [(int(order[at]), int(order[at + 1])) for at in twins]
    ids = [[flat[offsets[row] : offsets[row + 1]].tobytes() for row in pair] for pair in pairs]
    doubled = [(pair[1], both[1]) for pair, both in zip(pairs, ids, strict=True) if both[0] == both[1]]
    if doubled:
      row, value = min(doubled)
      raise DuplicateId(value.decode(), row)
    seed += 1


def _hash(flat: np.ndarray, offsets: np.ndarray, seed: int) -> np.ndarray:
  """FNV-1a over each row's bytes, vectorised over rows in chunks; uint64 [n]."""
  result = np.empty(len(offsets) - 1, np.uint64)
  for start in range(0, len(result), _CHUNK):
    begin, end = offsets[start : start + _CHUNK], offsets[start + 1 : start + _CHUNK + 1]
    begin = begin[: len(end)]
    values = np.full(len(end), (_BASIS + seed * 0x9E3779B97F4A7C15) % 2**64, np.uint64)
    for position in range(int((end - begin).max(initial=0))):
      longer = np.flatnonzero(end - begin > position)
      values[longer] = (values[longer] ^ flat[begin[longer] + position].astype(np.uint64)) * _PRIME
    result[start : start + len(values)] = values
  return result


def _pack(ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  encoded = [value.encode() for value in ids]
  flat = np.frombuffer(b"".join(encoded), np.uint8)
  return flat, ragged.offsets_of(np.fromiter(map(len, encoded), np.int64, len(encoded)))
