"""Vectors on disk: .npy shards, ids and a JSON manifest, never pickles.

Shard s holds rows [s · shard_rows, (s + 1) · shard_rows) of the corpus, the last one what is left. A shard is whole or
absent, so an interrupted encoding goes on with the missing ones; `manifest.json` stands there when all is.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dptdr_jax.core import files, manifest, remote
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path, atomic_path, read_json, remove, write_json

_FORMAT = 1
_DTYPES = ("float32", "float16")
_BLOCK = 65_536  # ids that are in memory at a time
_AGAIN = "Remove it and encode again: the whole shards are kept."


class EmbeddingWriter:
  """Writes C vectors of H numbers shard by shard, in any order, by one process or several on different shards."""

  def __init__(
    self, directory: Path, *, count: int, width: int, source: Mapping[str, Any], shard_rows: int = 100_000,
    dtype: str = "float32", begins: bool = True,
  ):  # fmt: skip
    """Begins, or goes on with what an interrupted writer of the same arguments left.

    Args:
      directory: what lies there from other arguments is removed.
      count: C.
      width: H.
      source: what the vectors depend on (retriever hash, lengths, …), as JSON has it; kept in the manifest.
      shard_rows: rows a shard.
      dtype: float32 or float16, which halves the disk and costs about 3 digits.
      begins: False: another process begins, and this one touches nothing before it writes.
    """
    if dtype not in _DTYPES:
      raise InputError(f"embeddings are stored as {' or '.join(_DTYPES)}", value=dtype)
    self.directory = pathlib.Path(directory)
    self.plan = {
      "format": _FORMAT, "kind": "embeddings", "count": count, "width": width, "dtype": dtype,
      "shard_rows": shard_rows, "source": dict(source),
    }  # fmt: skip
    begun, finished = self.directory / "begun.json", self.directory / "manifest.json"
    if not begins or manifest.read(finished) == self.plan:
      return
    if manifest.read(begun) != self.plan:
      remove(self.directory)
      write_json(begun, self.plan)

  @property
  def num_shards(self) -> int:
    """Number of shards."""
    return -(-self.plan["count"] // self.plan["shard_rows"])

  def rows(self, shard: int) -> range:
    """The corpus rows of a shard."""
    start = shard * self.plan["shard_rows"]
    return range(start, min(start + self.plan["shard_rows"], self.plan["count"]))

  def missing(self) -> list[int]:
    """The shards that are not written, or no longer whole."""
    return [shard for shard in range(self.num_shards) if not self._is_whole(shard)]

  def write(self, shard: int, vectors: np.ndarray) -> None:
    """Writes one shard, atomically.

    Args:
      shard: its number.
      vectors: float [len(rows(shard)), H].

    Raises:
      InputError: a vector is not finite, or not in the range of float16.
    """
    expected = (len(self.rows(shard)), self.plan["width"])
    if vectors.shape != expected:
      raise ValueError(f"shard {shard} has vectors of shape {vectors.shape}, not {expected}")
    with np.errstate(over="ignore"):  # a number beyond float16 becomes inf and is reported below
      stored = np.ascontiguousarray(vectors, self.plan["dtype"])
    wrong = np.flatnonzero(~np.isfinite(stored).all(1))
    if len(wrong):
      raise InputError(
        f"the vector of passage row {self.rows(shard)[wrong[0]]} has a number that {self.plan['dtype']} cannot hold",
        path=_shard_path(self.directory, shard), fix="Store float32, or look for NaN in what encodes.",
      )  # fmt: skip
    with atomic_path(_shard_path(self.directory, shard)) as partial, open(partial, "wb") as stream:
      np.save(stream, stored)

  def _is_whole(self, shard: int) -> bool:
    try:
      vectors = _load(_shard_path(self.directory, shard))
    except InputError:
      return False
    return vectors.shape == (len(self.rows(shard)), self.plan["width"])

  def finish(self, ids: Sequence[str]) -> Embeddings:
    """Writes the ids [C], a block at a time, and the manifest, which says that all is whole."""
    missing = self.missing()
    if missing or len(ids) != self.plan["count"]:
      raise ValueError(f"missing shards {missing[:8]}, {len(ids)} ids for {self.plan['count']} vectors")
    if (self.directory / "begun.json").is_file():
      kind = np.dtype((np.bytes_, max((len(name.encode()) for name in ids), default=1)))
      header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (len(ids),)}
      with atomic_path(self.directory / "ids.npy") as partial, open(partial, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, len(ids), _BLOCK):
          block = range(start, min(start + _BLOCK, len(ids)))
          stream.write(np.array([ids[row].encode() for row in block], kind).tobytes())
      files.rename(self.directory / "begun.json", self.directory / "manifest.json")
    return Embeddings(self.directory)


class Embeddings:
  """Vectors that a finished writer left, memory-mapped.

  Attributes:
    count: C.
    width: H.
    dtype: "float32" or "float16", as stored; what is read out is float32.
    source: what the vectors depend on.
  """

  def __init__(self, directory: Path):
    """Opens and checks every shard's size, shape and dtype; those of a URL are fetched into the cache first.

    Raises:
      InputError: not finished, or a shard is missing, truncated, or of another shape.
    """
    self.directory = remote.staged(directory)
    if not (self.directory / "manifest.json").is_file():
      raise InputError("no finished embeddings (no manifest.json)", path=directory, fix="Let the encoding end first.")
    self.manifest = read_json(self.directory / "manifest.json")
    if self.manifest.get("format") != _FORMAT or self.manifest.get("kind") != "embeddings":
      raise InputError("not embeddings of this version", path=self.directory / "manifest.json")
    self.count: int = self.manifest["count"]
    self.width: int = self.manifest["width"]
    self.dtype: str = self.manifest["dtype"]
    self.source: dict[str, Any] = self.manifest["source"]
    size = self.manifest["shard_rows"]
    self._starts = range(0, self.count, size)
    self._shards = [
      self._open(number, min(size, self.count - start)) for number, start in enumerate(self._starts)
    ]  # fmt: skip

  def __len__(self) -> int:
    """C."""
    return self.count

  def ids(self) -> list[str]:
    """The C ids, by row."""
    ids = _load(self.directory / "ids.npy")
    if ids.shape != (self.count,):
      raise InputError(f"{len(ids)} ids for {self.count} vectors", path=self.directory / "ids.npy", fix=_AGAIN)
    return [name.decode() for name in ids]

  def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, float32 [≤ rows, H]) in order; a block never spans shards. Holds one block in memory."""
    for start, shard in zip(self._starts, self._shards, strict=True):
      for first in range(0, len(shard), rows):
        yield start + first, np.ascontiguousarray(shard[first : first + rows], np.float32)

  def take(self, rows: np.ndarray) -> np.ndarray:
    """The vectors of some rows, float32 [n, H]."""
    rows = np.asarray(rows)
    if len(rows) and (rows.min() < 0 or rows.max() >= self.count):
      raise ValueError(f"rows go from {rows.min()} to {rows.max()}, there are {self.count} vectors")
    vectors = np.empty((len(rows), self.width), np.float32)
    shards, places = np.divmod(rows, self.manifest["shard_rows"])
    for shard in np.unique(shards):
      of_shard = shards == shard
      vectors[of_shard] = self._shards[shard][places[of_shard]]
    return vectors

  def _open(self, number: int, rows: int) -> np.ndarray:
    path = _shard_path(self.directory, number)
    vectors = _load(path)
    if vectors.shape != (rows, self.width) or vectors.dtype != self.dtype:
      raise InputError(
        f"shard is {vectors.dtype} {vectors.shape}, its manifest says {self.dtype} {(rows, self.width)}",
        path=path, fix=_AGAIN,
      )  # fmt: skip
    return vectors


def _shard_path(directory: pathlib.Path, shard: int) -> pathlib.Path:
  return directory / f"vectors-{shard:05d}.npy"


def _load(path: pathlib.Path) -> np.ndarray:
  if not path.is_file():
    raise InputError("embedding shard is missing", path=path, fix=_AGAIN)
  try:
    return np.load(path, mmap_mode="r" if os.path.getsize(path) else None)
  except (ValueError, EOFError, OSError) as error:
    raise InputError(f"embedding shard is truncated or broken ({error})", path=path, fix=_AGAIN) from error
