"""The pool of candidates from which a query's hard negatives are drawn: memory-mapped rows, scores, ranks, sources.

A directory of arrays and a manifest, for Q queries, at most K candidates each, and S sources (retrievers):
  rows.npy             int32   [Q, K]     passage rows, −1 fills at the end of a query.
  sources.npy          uint16  [Q, K]     bit s is set where source s contributed the candidate.
  scores.npy           float32 [Q, K, S]  its score in source s, −inf where unknown.
  ranks.npy            int16   [Q, K, S]  its rank in source s from 0, −1 where unknown.
  reasons.npy          uint8   [Q, K]     why it was removed from the negatives (see Reason), 0 where it was not.
  positive_scores.npy  float32 [Q, S]     the best score of a judged positive in source s, NaN where unknown.
Candidates are ordered by their best rank in any source, ties by the order of the sources: a prefix mixes all fairly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from dptdr_jax.core import files, shards
from dptdr_jax.core.errors import InputError

MAX_SOURCES = 16
MAX_DEPTH = 2**15 - 1
BLOCK_ENTRIES = 1 << 18  # candidates worked on at a time: some 40 MB when merging

_FORMAT = 2
_KIND = "candidates"
_AGAIN = "Mine it again"

# dtype, and which of the axes Q, K, S
_ARRAYS = {
  "rows": (np.int32, "QK"), "sources": (np.uint16, "QK"), "scores": (np.float32, "QKS"), "ranks": (np.int16, "QKS"),
  "reasons": (np.uint8, "QK"), "positive_scores": (np.float32, "QS"),
}  # fmt: skip


class Reason(enum.IntEnum):
  """Why a candidate is not among the negatives; the codes in reasons.npy (3 and 5 were rules that are gone)."""

  KEPT = 0
  SAME_TEXT = 1
  CONTAINS = 2
  RELATIVE_MARGIN = 4
  CROSS_ENCODER = 6
  PSEUDO_POSITIVE = 7
  NOT_SCORED = 8


@dataclasses.dataclass(frozen=True)
class Pool:
  """Candidates of Q queries; the arrays are those of the module's docstring and may be memory-mapped.

  Attributes:
    names: the S sources, in the order of their bits.
    manifest: counts, and "denoising": the rules that were applied.
  """

  rows: np.ndarray
  sources: np.ndarray
  scores: np.ndarray
  ranks: np.ndarray
  reasons: np.ndarray
  positive_scores: np.ndarray
  names: tuple[str, ...]
  manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __len__(self) -> int:
    """Number of queries Q."""
    return len(self.rows)

  @classmethod
  def open(cls, directory: files.Path) -> Pool:
    """Opens a pool.

    Raises:
      InputError: there is none, or an array is missing, cut, or of another shape or dtype.
    """
    path = pathlib.Path(directory, "manifest.json")
    manifest = files.read_json(path)
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("kind")) != (_FORMAT, _KIND):
      raise InputError("not a candidate pool of this version", path=path, fix=_AGAIN)
    names, sizes = manifest.get("sources"), (manifest.get("queries"), manifest.get("width"))
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not named or not all(type(size) is int and size >= 0 for size in sizes):
      raise InputError("sources, queries and width are not as a pool has them", path=path, fix=_AGAIN)
    arrays = {}
    for name, (dtype, shape) in _layout(*sizes, len(names)).items():
      arrays[name] = array = shards.mapped(path.with_name(f"{name}.npy"))
      if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise InputError(f"array is {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}",
                         path=path.with_name(f"{name}.npy"), fix=_AGAIN)  # fmt: skip
    return cls(**arrays, names=tuple(names), manifest=manifest)

  def part(self, block: slice) -> Pool:
    """The pool of some queries."""
    return Pool(*(getattr(self, name)[block] for name in _ARRAYS), self.names, self.manifest)

  def candidates(self, query: int) -> np.ndarray:
    """The passage rows of one query that may be its negatives, best first, int32 [n]: neither fills nor removed."""
    return self.rows[query][self._is(Reason.KEPT, query)]

  def pseudo_positives(self, query: int) -> np.ndarray:
    """The passage rows of one query that a cross-encoder takes for positives, int32 [n]."""
    return self.rows[query][self._is(Reason.PSEUDO_POSITIVE, query)]

  def candidate_scores(self, query: int, source: str) -> tuple[np.ndarray, float]:
    """The scores in a source of `candidates(query)`, float32 [n], −inf unknown; of the best positive, NaN unknown."""
    number = self.source_number(source)
    return self.scores[query, :, number][self._is(Reason.KEPT, query)], float(self.positive_scores[query, number])

  def source_number(self, name: str) -> int:
    """The bit of a source; an unknown one is an InputError."""
    if name not in self.names:
      raise InputError("no such source in the pool", value=name, fix=f"There are {', '.join(self.names)}")
    return self.names.index(name)

  def kept(self, block: slice) -> np.ndarray:
    """Which candidates of a block of queries are negatives, bool [b, K]."""
    return self._is(Reason.KEPT, block)

  def blocks(self) -> Iterator[slice]:
    """Blocks of queries whose arrays are a few megabytes."""
    return query_blocks(*self.rows.shape)

  def _is(self, reason: Reason, queries: int | slice) -> np.ndarray:
    return (self.rows[queries] >= 0) & (self.reasons[queries] == reason)


def query_blocks(num_queries: int, entries: int) -> Iterator[slice]:
  """Yields slices that cover all queries, each of about BLOCK_ENTRIES / `entries` of them, at least one."""
  size = max(1, BLOCK_ENTRIES // max(1, entries))
  for start in range(0, num_queries, size):
    yield slice(start, min(num_queries, start + size))


class PoolWriter:
  """Writes a pool in blocks of queries; `with PoolWriter(…) as writer`. The manifest is written last.

  Not through a memory map: on a full disk that ends in SIGBUS, where a write is an OSError.
  """

  def __init__(self, directory: files.Path, num_queries: int, width: int, names: tuple[str, ...]):
    """Writes into a directory that is made if it is missing; a pool in it is replaced."""
    self._directory = pathlib.Path(directory)
    self._layout = _layout(num_queries, width, len(names))
    self._about = {"format": _FORMAT, "kind": _KIND, "sources": list(names), "queries": num_queries, "width": width}
    self._stack = contextlib.ExitStack()
    self._streams: dict[str, BinaryIO] = {}

  def __enter__(self) -> PoolWriter:
    self._directory.mkdir(parents=True, exist_ok=True)
    (self._directory / "manifest.json").unlink(missing_ok=True)
    for name, (dtype, shape) in self._layout.items():
      stream = self._stack.enter_context(open(self._directory / f"{name}.npy", "wb"))
      header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
      np.lib.format.write_array_header_1_0(stream, header)
      self._streams[name] = stream
    return self

  def __exit__(self, *error: object) -> None:
    self._stack.close()

  def append(self, part: Pool) -> None:
    """Writes the next queries."""
    for name, stream in self._streams.items():
      stream.write(np.ascontiguousarray(getattr(part, name), self._layout[name][0]).tobytes())

  def finish(self, manifest: Mapping[str, Any]) -> Pool:
    """Writes the manifest, with these entries more, and opens the pool."""
    self._stack.close()
    files.write_json(self._directory / "manifest.json", {**manifest, **self._about})
    return Pool.open(self._directory)


def _layout(num_queries: int, width: int, num_sources: int) -> dict[str, tuple[type, tuple[int, ...]]]:
  """dtype and shape of each array."""
  sizes = {"Q": num_queries, "K": width, "S": num_sources}
  return {name: (dtype, tuple(sizes[axis] for axis in axes)) for name, (dtype, axes) in _ARRAYS.items()}
