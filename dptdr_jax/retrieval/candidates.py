"""The pool of candidates from which a query's hard negatives are drawn: memory-mapped rows, scores, ranks, sources.

A directory of arrays and a manifest, for Q queries, at most K candidates each, and S sources (retrievers):
  rows.npy             int32   [Q, K]     passage rows, −1 fills at the end of a query
  sources.npy          uint16  [Q, K]     bit s is set where source s gave the candidate
  scores.npy           float32 [Q, K, S]  its score there, −inf where the source doesn't know it
  ranks.npy            int16   [Q, K, S]  its rank there from 0, −1 where the source doesn't know it
  positive_scores.npy  float32 [Q, S]     the best score there of a judged positive, NaN where unknown
  reasons.npy          uint8   [Q, K]     why it is no negative (see Reason), 0 where it is one; of denoised pools alone
Candidates stand by their best place in any source, ties by the order of the sources: a prefix is a fair mixture of all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path, read_json

FORMAT = 1
MAX_SOURCES = 16
MAX_DEPTH = 2**15 - 1
BLOCK_ENTRIES = 1 << 18  # candidates worked on at a time: some 40 MB when merging

# dtype, and how many of the axes Q, K, S; the last two arrays may be absent
_ARRAYS = {
  "rows": (np.int32, "QK"), "sources": (np.uint16, "QK"), "scores": (np.float32, "QKS"), "ranks": (np.int16, "QKS"),
  "positive_scores": (np.float32, "QS"), "reasons": (np.uint8, "QK"),
}  # fmt: skip
MERGED = ("rows", "sources", "scores", "ranks", "positive_scores")
_OPTIONAL = ("positive_scores", "reasons")


class Reason(enum.IntEnum):
  """Why a candidate is not among the negatives; the codes in reasons.npy."""

  KEPT = 0
  SAME_TEXT = 1
  CONTAINS = 2
  NEAR_DUPLICATE = 3
  RELATIVE_MARGIN = 4
  ABSOLUTE_MARGIN = 5
  CROSS_ENCODER = 6
  PSEUDO_POSITIVE = 7
  NOT_SCORED = 8


@dataclasses.dataclass(frozen=True)
class Pool:
  """Candidates of Q queries, as the module's docstring lays them out; arrays may be memory-mapped.

  Attributes:
    rows, sources, scores, ranks: as there.
    names: the S sources, in the order of their bits.
    manifest: what else was written with it: the sources' options, counts, what denoising was applied.
    positive_scores: float32 [Q, S], or None where it was not written.
    reasons: uint8 [Q, K], or None where nothing was denoised: all candidates are negatives.
  """

  rows: np.ndarray
  sources: np.ndarray
  scores: np.ndarray
  ranks: np.ndarray
  names: tuple[str, ...]
  manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  positive_scores: np.ndarray | None = None
  reasons: np.ndarray | None = None

  def __post_init__(self):
    for name, (_, axes) in _ARRAYS.items():
      array, wanted = getattr(self, name), shape_of(axes, *self.rows.shape, len(self.names))
      if array is not None and array.shape != wanted:
        raise ValueError(f"{name} has shape {array.shape}, not {wanted} as rows and names say")

  def __len__(self) -> int:
    """Number of queries Q."""
    return len(self.rows)

  @classmethod
  def open(cls, directory: Path) -> Pool:
    """Maps a pool that was written whole.

    Raises:
      InputError: none is there, or an array is missing, truncated or of another shape or type.
    """
    directory = pathlib.Path(directory)
    manifest = read_json(directory / "manifest.json")
    if manifest.get("format") != FORMAT or manifest.get("kind") != "candidates":
      raise InputError("not a candidate pool of this version", path=directory, fix="Mine it again.")
    there = [name for name in _ARRAYS if name not in _OPTIONAL or (directory / f"{name}.npy").exists()]
    try:
      # as plain arrays: a np.memmap makes every small slice several times as slow
      arrays = {name: np.asarray(np.load(directory / f"{name}.npy", mmap_mode="r")) for name in there}
      pool = cls(**arrays, names=tuple(manifest["sources"]), manifest=manifest)
    except (FileNotFoundError, EOFError, ValueError) as error:
      raise InputError(f"candidate pool is not whole ({error})", path=directory, fix="Mine it again.") from error
    if any(array.dtype != _ARRAYS[name][0] for name, array in arrays.items()):
      raise InputError("candidate pool has arrays of another type", path=directory, fix="Mine it again.")
    return pool

  def candidates(self, query: int) -> np.ndarray:
    """The passage rows of one query that may be its negatives, best first, int32 [n]: neither fills nor removed."""
    return self.rows[query][self._is(Reason.KEPT, query)]

  def pseudo_positives(self, query: int) -> np.ndarray:
    """The passage rows of one query that a cross-encoder takes for positives, int32 [n]."""
    return self.rows[query][self._is(Reason.PSEUDO_POSITIVE, query)]

  def candidate_scores(self, query: int, source: str) -> tuple[np.ndarray, float]:
    """What a source says of `candidates(query)`: float32 [n], −inf unknown; and of the best positive, NaN unknown."""
    number = self.source_number(source)
    positive = np.nan if self.positive_scores is None else self.positive_scores[query, number]
    return self.scores[query, :, number][self._is(Reason.KEPT, query)], float(positive)

  def source_number(self, name: str) -> int:
    """The bit of a source; an unknown one is an InputError."""
    if name not in self.names:
      raise InputError("no such source in the pool", value=name, fix=f"There are {', '.join(self.names)}")
    return self.names.index(name)

  def verdicts(self, block: slice) -> np.ndarray:
    """The reasons of a block of queries in memory, uint8 [b, K]; at fills 0 too."""
    rows = self.rows[block]
    return np.zeros(rows.shape, np.uint8) if self.reasons is None else np.array(self.reasons[block])

  def kept(self, block: slice) -> np.ndarray:
    """Where in a block of queries there are negatives, bool [b, K]."""
    return (self.rows[block] >= 0) & (self.verdicts(block) == Reason.KEPT)

  def blocks(self) -> Iterator[slice]:
    """Blocks of queries whose arrays are a few megabytes."""
    return query_blocks(len(self), self.rows.shape[1])

  def _is(self, reason: Reason, query: int) -> np.ndarray:
    there = self.rows[query] >= 0
    if self.reasons is None:
      return there & (reason == Reason.KEPT)
    return there & (self.reasons[query] == reason)


def query_blocks(num_queries: int, entries: int) -> Iterator[slice]:
  """Yields slices that cover all queries, each of about BLOCK_ENTRIES / `entries` of them, at least one."""
  size = max(1, BLOCK_ENTRIES // max(1, entries))
  for start in range(0, num_queries, size):
    yield slice(start, min(num_queries, start + size))


@contextlib.contextmanager
def open_arrays(
  directory: pathlib.Path, names: Collection[str], num_queries: int, width: int, num_sources: int
) -> Iterator[dict[str, BinaryIO]]:
  """Opens .npy files of a pool behind their headers, to be written in query order.

  Not written through a memory map: on a full disk that ends in SIGBUS, without a word, where a write is an OSError.
  """
  with contextlib.ExitStack() as stack:
    streams = {}
    for name in names:
      dtype, axes = _ARRAYS[name]
      streams[name] = stack.enter_context(open(directory / f"{name}.npy", "wb"))
      shape = shape_of(axes, num_queries, width, num_sources)
      header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
      np.lib.format.write_array_header_1_0(streams[name], header)
    yield streams


def shape_of(axes: str, num_queries: int, width: int, num_sources: int) -> tuple[int, ...]:
  """The shape of an array of the axes Q, K, S."""
  sizes = {"Q": num_queries, "K": width, "S": num_sources}
  return tuple(sizes[axis] for axis in axes)
