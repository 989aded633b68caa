"""Vectors on disk: .npy shards, ids and a JSON manifest, never pickles; see core.shards.

`vectors-00000.npy`, … hold the vectors in the order of the corpus, `ids.npy` the ids as an array of UTF-8 bytes;
`manifest.json` is written last.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dptdr_jax.core import files, marks, remote, shards, store
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.team import SOLO, Team

_FORMAT = 1
_KIND = "embeddings"
_DTYPES = ("float32", "float16")
_BLOCK = 65_536  # ids in memory at a time
_AGAIN = "Remove it and encode again: whole shards are kept"


class Embeddings:
  """Vectors that `write_vectors` finished, memory-mapped.

  Attributes:
    directory: where they are.
    count: C.
    width: H.
    dtype: "float32" or "float16", as stored; all methods return float32.
    source: what the vectors depend on, as the writer was told.
  """

  def __init__(self, directory: files.Path):
    """Opens all shards; those of a URL are fetched into the cache first.

    Raises:
      InputError: not finished, or a shard is missing, cut, or of another shape.
    """
    self.directory = remote.staged(directory)
    manifest = shards.read_manifest(self.directory, kind=_KIND)
    width, dtype, source = (manifest.get(name) for name in ("width", "dtype", "source"))
    if manifest.get("format") != _FORMAT or type(width) is not int or width < 1 or dtype not in _DTYPES:
      raise InputError("not embeddings of this version", path=self.directory / shards.MANIFEST)
    self.count: int = manifest["count"]
    self.width, self.dtype = width, dtype
    self.source: dict[str, Any] = source if isinstance(source, dict) else {}
    arrays = _arrays(width, dtype)
    self._vectors = shards.Shards(self.directory, self.count, manifest["shard_rows"], arrays)["vectors"]

  def __len__(self) -> int:
    """C."""
    return self.count

  def ids(self) -> list[str]:
    """The C ids, by row."""
    path = self.directory / "ids.npy"
    ids = shards.mapped(path)
    if ids.shape != (self.count,) or ids.dtype.kind != "S":
      raise InputError(f"ids are {ids.dtype} {ids.shape}, not bytes {(self.count,)}", path=path, fix=_AGAIN)
    try:
      return [name.decode() for name in ids.tolist()]
    except UnicodeDecodeError as error:
      raise InputError("an id is not UTF-8", path=path, fix=_AGAIN) from error

  def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, float32 [≤ rows, H]) in order; a block never spans shards. Holds one block in memory."""
    for first, block in self._vectors.blocks(rows):
      yield first, np.ascontiguousarray(block, np.float32)

  def take(self, rows: np.ndarray) -> np.ndarray:
    """The vectors of some rows, float32 [n, H]."""
    return self._vectors.take(rows).astype(np.float32, copy=False)


def write_vectors(
  directory: files.Path, *, ids: Sequence[str], width: int, source: Mapping[str, Any],
  make: Callable[[range], np.ndarray], dtype: str = "float32", shard_rows: int = 100_000, team: Team = SOLO,
  what: str = "encode",
) -> Embeddings:  # fmt: skip
  """Makes the vectors of C texts shard by shard; what an earlier attempt left is kept.

  Args:
    directory: of these vectors alone.
    ids: C, by row.
    width: H.
    source: what the vectors depend on, as JSON has it; kept in the manifest.
    make: rows → their vectors, float [n, H].
    dtype: float32; or float16, which halves the disk and keeps about 3 digits.
    team: the processes that take turns at the shards.

  Raises:
    InputError: a vector is not finite, or not in the range of float16; an id ends in NUL; the directory holds
      something else.
  """
  if dtype not in _DTYPES:
    raise InputError(f"embeddings are stored as {' or '.join(_DTYPES)}", value=dtype)
  about = {"format": _FORMAT, "kind": _KIND, "width": width, "dtype": dtype, "source": dict(source)}
  if team.is_main:
    marks.check_replaceable(directory, _is_ours)
    _write_ids(pathlib.Path(directory, "ids.npy"), ids)  # before hours of work: some ids are refused

  def checked(rows: range) -> dict[str, np.ndarray]:
    return {"vectors": _stored(make(rows), rows, dtype)}

  shards.share_out(directory, len(ids), shard_rows, _arrays(width, dtype), checked, about=about, team=team, what=what)
  return Embeddings(directory)


def _is_ours(directory: pathlib.Path) -> bool:
  """Whether a directory holds vectors, perhaps unfinished ones."""
  inside = {path.name for path in directory.iterdir()}
  described = (files.fields_in(directory / name).get("kind") for name in (shards.MANIFEST, shards.PLAN))
  return _KIND in described or inside <= {"ids.npy", "ids.npy.partial", store.BEGUN}


def _arrays(width: int, dtype: str) -> shards.Arrays:
  return {"vectors": (dtype, (width,))}


def _stored(vectors: np.ndarray, rows: range, dtype: str) -> np.ndarray:
  with np.errstate(over="ignore"):  # a number beyond float16 becomes inf and is reported below
    stored = np.ascontiguousarray(vectors, dtype)
  wrong = np.flatnonzero(~np.isfinite(stored).all(axis=1))
  if len(wrong):
    raise InputError(f"the vector of passage row {rows[wrong[0]]} has a number that {dtype} cannot hold",
                     fix="Store float32, or look for NaN in the encoder")  # fmt: skip
  return stored


def _write_ids(path: pathlib.Path, ids: Sequence[str]) -> None:
  """An array of bytes, written block by block. Its entries end at their last byte that is not NUL."""
  longest = max((len(name.encode()) for name in ids), default=0)
  kind = np.dtype((np.bytes_, max(1, longest)))
  header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (len(ids),)}
  with files.atomic_path(path) as partial, open(partial, "wb") as stream:
    np.lib.format.write_array_header_1_0(stream, header)
    for start in range(0, len(ids), _BLOCK):
      block = [ids[row] for row in range(start, min(start + _BLOCK, len(ids)))]
      if ending := [name for name in block if name.endswith("\0")]:
        raise InputError("an id ends in NUL and would be read without it", path=path, value=ending[0],
                         fix="Rename it")  # fmt: skip
      stream.write(np.array([name.encode() for name in block], kind).tobytes())
