"""A compact table of ids on disk: row → id by offsets, id → row by sorted hashes; 21 million ids take 0.7 GB."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from dptdr_jax.core.errors import DptdrError, InputError
from dptdr_jax.core.shards import mapped
from dptdr_jax.data.ragged import Ragged, offsets_of, opened

_PRIME = np.uint64(0x100000001B3)  # FNV-1a, 64 bits: http://www.isthe.com/chongo/tech/comp/fnv/
_BASIS = 0xCBF29CE484222325
_CHUNK = 1 << 16


class DuplicateId(DptdrError):
  """Two rows have the same id. `row` is the second of them, from 0."""

  def __init__(self, value: str, row: int):
    super().__init__(f"duplicate id {value!r}")
    self.value, self.row = value, row


class IdTable:
  """Reads a table that `IdTableWriter` wrote, memory-mapped: `len(table)`, `table[row]` → id.

  Raises:
    InputError: a file is missing or cut, or they do not belong together.
  """

  def __init__(self, directory: str | pathlib.Path):
    directory = pathlib.Path(directory)
    self._ids = Ragged.open(directory, "bytes")
    self._hashes = opened(directory / "hashes.npy", length=len(self))
    self._sorted_rows = opened(directory / "rows.npy", length=len(self))
    seed = mapped(directory / "seed.npy")
    if seed.shape or seed.dtype != np.uint64:
      raise InputError("not the seed of hashes", path=directory / "seed.npy")
    self._seed = int(seed)

  def __len__(self) -> int:
    return len(self._ids)

  def __getitem__(self, row: int) -> str:
    return self._ids[row].tobytes().decode()

  def ids(self, rows: Iterable[int]) -> list[str]:
    """Returns the ids of `rows`."""
    return [self[int(row)] for row in rows]

  def rows(self, ids: Sequence[str]) -> np.ndarray:
    """Returns int64 [n]: the row of each id, −1 for an id that is not in the table."""
    parts = [self._rows_of_chunk(ids[start : start + _CHUNK]) for start in range(0, len(ids), _CHUNK)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)

  def _rows_of_chunk(self, ids: Sequence[str]) -> np.ndarray:
    if not len(self):
      return np.full(len(ids), -1, np.int64)
    asked = _encoded(ids)
    lengths = asked.lengths
    place = np.searchsorted(self._hashes, _hash(asked, self._seed))
    rows = self._sorted_rows[np.minimum(place, len(self) - 1)].astype(np.int64)
    # Hashes in the table are distinct, but an unknown id may share one: compare the bytes.
    same_length = np.flatnonzero(self._ids.lengths_at(rows) == lengths)
    sizes = lengths[same_length]
    wrong = offsets_of(self._ids.take(rows[same_length]) != asked.take(same_length))
    ends = np.cumsum(sizes)
    equal = wrong[ends] == wrong[ends - sizes]
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
    encoded = _encoded(self._pending)
    self._chunks.append(encoded.flat)
    self._lengths.append(encoded.lengths)
    self._pending = []

  def write(self, directory: str | pathlib.Path) -> IdTable:
    """Writes the table into `directory` (made here) and opens it; raises DuplicateId."""
    self._flush()
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True)
    ids = Ragged(np.concatenate(self._chunks), offsets_of(np.concatenate(self._lengths)))
    seed, hashes, order = _sorted_hashes(ids)
    ids.save(directory, "bytes")
    for name, array in (("hashes", hashes), ("rows", order), ("seed", np.uint64(seed))):
      np.save(directory / f"{name}.npy", array)
    return IdTable(directory)


def _sorted_hashes(ids: Ragged) -> tuple[int, np.ndarray, np.ndarray]:
  """Returns (seed, sorted hashes, rows in that order); two different ids with one hash make it try the next seed."""
  seed = 0
  while True:
    hashes = _hash(ids, seed)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    equal = np.flatnonzero(hashes[1:] == hashes[:-1])
    if not len(equal):
      return seed, hashes, order.astype(np.int32 if len(order) < 2**31 else np.int64)
    pairs = [(int(order[at]), int(order[at + 1])) for at in equal]
    doubled = [second for first, second in pairs if ids[first].tobytes() == ids[second].tobytes()]
    if doubled:
      row = min(doubled)
      raise DuplicateId(ids[row].tobytes().decode(), row)
    seed += 1


def _hash(ids: Ragged, seed: int) -> np.ndarray:
  """FNV-1a over each row's bytes, vectorised over rows in chunks; uint64 [n]."""
  result = np.empty(len(ids), np.uint64)
  for start in range(0, len(result), _CHUNK):
    edges = ids.offsets[start : start + _CHUNK + 1]
    begin, lengths = edges[:-1], np.diff(edges)
    values = np.full(len(begin), (_BASIS + seed * 0x9E3779B97F4A7C15) % 2**64, np.uint64)
    for position in range(int(lengths.max(initial=0))):
      longer = np.flatnonzero(lengths > position)
      values[longer] = (values[longer] ^ ids.flat[begin[longer] + position].astype(np.uint64)) * _PRIME
    result[start : start + len(values)] = values
  return result


def _encoded(ids: Sequence[str]) -> Ragged:
  """The UTF-8 bytes of ids, uint8."""
  encoded = [value.encode() for value in ids]
  lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
  return Ragged(np.frombuffer(b"".join(encoded), np.uint8), offsets_of(lengths))
