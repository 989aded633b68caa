"""The pool of candidates from which a query's hard negatives are drawn: memory-mapped rows, scores, ranks, sources.

A directory of four arrays and a manifest, for Q queries, at most K candidates each, and S sources (retrievers):
  rows.npy     int32   [Q, K]     passage rows, −1 fills at the end of a query
  sources.npy  uint16  [Q, K]     bit s is set where source s found the candidate
  scores.npy   float32 [Q, K, S]  its score there, −inf where the source didn't find it
  ranks.npy    int16   [Q, K, S]  its rank there from 0, −1 where the source didn't find it
Candidates stand by their best rank in any source, ties by the order of the sources: a prefix is a fair mixture of all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from dptdr_jax.core import progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path, atomic_directory, read_json, write_json
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import FILL, Run

_FORMAT = 1
_BLOCK = 4096  # queries merged at a time
_ARRAYS = {"rows": np.int32, "sources": np.uint16, "scores": np.float32, "ranks": np.int16}
MAX_SOURCES = 16
MAX_DEPTH = 2**15 - 1


@dataclasses.dataclass(frozen=True)
class Pool:
  """Candidates of Q queries, as the module's docstring lays them out; arrays may be memory-mapped.

  Attributes:
    rows, sources, scores, ranks: the four arrays.
    names: the S sources, in the order of their bits.
    manifest: what else was written with it: depth, counts.
  """

  rows: np.ndarray
  sources: np.ndarray
  scores: np.ndarray
  ranks: np.ndarray
  names: tuple[str, ...]
  manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    wide = (*self.rows.shape, len(self.names))
    if self.sources.shape != self.rows.shape or self.scores.shape != wide or self.ranks.shape != wide:
      raise ValueError(f"rows {self.rows.shape}, sources {self.sources.shape}, scores {self.scores.shape} and ranks "
                       f"{self.ranks.shape} of {len(self.names)} sources do not fit")  # fmt: skip

  def __len__(self) -> int:
    """Number of queries Q."""
    return len(self.rows)

  @classmethod
  def open(cls, directory: Path) -> Pool:
    """Maps a pool that was written whole.

    Raises:
      InputError: none is there, or an array is truncated or of another shape.
    """
    manifest = read_json(pathlib.Path(directory, "manifest.json"))
    if manifest.get("format") != _FORMAT or manifest.get("kind") != "candidates":
      raise InputError("not a candidate pool of this version", path=directory, fix="Mine it again.")
    try:
      arrays = {name: np.load(pathlib.Path(directory, f"{name}.npy"), mmap_mode="r") for name in _ARRAYS}
      pool = cls(**arrays, names=tuple(manifest["sources"]), manifest=manifest)
    except (OSError, ValueError) as error:
      raise InputError(f"candidate pool is not whole ({error})", path=directory, fix="Mine it again.") from error
    if any(arrays[name].dtype != dtype for name, dtype in _ARRAYS.items()):
      raise InputError("candidate pool has arrays of another type", path=directory, fix="Mine it again.")
    return pool

  def candidates(self, query: int) -> np.ndarray:
    """The passage rows of one query, int32, without fills."""
    rows = self.rows[query]
    return rows[: np.count_nonzero(rows >= 0)]


def pool_from_runs(
  directory: Path, runs: Mapping[str, Run], positives: Qrels, *, depth: int, width: int | None = None
) -> Pool:
  """Merges what several retrievers found into one pool, without the passages judged relevant; writes it atomically.

  A query that no source answers keeps its (empty) place. Works through the queries in blocks: memory holds the runs
  and some 100 bytes an entry of 4,096 queries.

  Args:
    directory: replaced if it exists.
    runs: source name → run of the Q queries; at most 16.
    positives: judgements of the Q queries; rows with a grade above 0 are left out.
    depth: the ranks taken from each run, before the positives are removed.
    width: K; default depth · S, so that nothing is cut.

  Returns:
    The pool, memory-mapped. Its manifest counts, over all queries: candidates, positives removed, queries without a
    candidate, and candidates by combination of sources.
  """
  num_queries = len(positives)
  if not 1 <= len(runs) <= MAX_SOURCES or not 1 <= depth <= MAX_DEPTH:
    raise InputError(f"a pool takes 1 to {MAX_SOURCES} sources and depths 1 to {MAX_DEPTH}", value=(len(runs), depth))
  if any(len(run) != num_queries for run in runs.values()):
    raise ValueError(f"runs of {[len(run) for run in runs.values()]} queries, judgements of {num_queries}")
  width = depth * len(runs) if width is None else width
  counts = {"candidates": 0, "positives removed": 0, "queries without a candidate": 0}
  combinations = np.zeros(2 ** len(runs), np.int64)
  with atomic_directory(directory) as partial:
    with _open_arrays(partial, num_queries, width, len(runs)) as streams:
      for start in progress.track(range(0, num_queries, _BLOCK), "merge candidates", unit="block"):
        block = slice(start, min(num_queries, start + _BLOCK))
        arrays, removed = _merge_block(block, list(runs.values()), positives, depth, width)
        for name, stream in streams.items():
          stream.write(arrays[name].tobytes())
        bits = arrays["sources"]
        counts["candidates"] += int(np.count_nonzero(bits))
        counts["positives removed"] += removed
        counts["queries without a candidate"] += int((bits[:, 0] == 0).sum())
        combinations += np.bincount(bits.ravel(), minlength=len(combinations))
    manifest = {"format": _FORMAT, "kind": "candidates", "sources": list(runs), "depth": depth, "counts": counts,
                "combinations": _named(combinations, list(runs))}  # fmt: skip
    write_json(partial / "manifest.json", manifest)
  return Pool.open(directory)


@contextlib.contextmanager
def _open_arrays(
  directory: pathlib.Path, num_queries: int, width: int, num_sources: int
) -> Iterator[dict[str, BinaryIO]]:
  """Opens the four .npy files behind their headers, to be written in query order.

  Not written through a memory map: on a full disk that ends in SIGBUS, without a word, where a write is an OSError.
  """
  with contextlib.ExitStack() as stack:
    streams = {}
    for name, dtype in _ARRAYS.items():
      streams[name] = stack.enter_context(open(directory / f"{name}.npy", "wb"))
      shape = (num_queries, width) if name in ("rows", "sources") else (num_queries, width, num_sources)
      header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
      np.lib.format.write_array_header_1_0(streams[name], header)
    yield streams


def _merge_block(
  block: slice, runs: Sequence[Run], positives: Qrels, depth: int, width: int
) -> tuple[dict[str, np.ndarray], int]:
  """The four arrays of a block of queries, and how many entries of the runs were positives."""
  size = block.stop - block.start
  keys, scores, ranks, sources = _entries(block, runs, depth)
  span = slice(positives.offsets[block.start], positives.offsets[block.stop])
  owners = np.repeat(np.arange(size), np.diff(positives.offsets[block.start : block.stop + 1]))
  relevant = positives.grades[span] > 0
  judged = np.isin(keys, _key(owners, positives.rows[span])[relevant])
  keys, scores, ranks, sources = keys[~judged], scores[~judged], ranks[~judged], sources[~judged]

  unique, place = np.unique(keys, return_inverse=True)
  best = np.full(len(unique), np.iinfo(np.int64).max)
  np.minimum.at(best, place, ranks * len(runs) + sources)
  owner = unique >> 32
  order = np.lexsort((best, owner))
  position = np.empty(len(unique), np.int64)
  starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=size))])
  position[order] = np.arange(len(unique)) - starts[owner[order]]

  arrays = {
    "rows": np.full((size, width), FILL, np.int32),
    "sources": np.zeros((size, width), np.uint16),
    "scores": np.full((size, width, len(runs)), -np.inf, np.float32),
    "ranks": np.full((size, width, len(runs)), -1, np.int16),
  }
  kept = position < width
  arrays["rows"][owner[kept], position[kept]] = unique[kept] & 0xFFFFFFFF
  kept = kept[place]
  owner, position, sources = owner[place][kept], position[place][kept], sources[kept]
  arrays["scores"][owner, position, sources] = scores[kept]
  arrays["ranks"][owner, position, sources] = ranks[kept]
  np.bitwise_or.at(arrays["sources"], (owner, position), (1 << sources).astype(np.uint16))
  return arrays, int(judged.sum())


def _entries(block: slice, runs: Sequence[Run], depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Keys, scores, ranks and source numbers [E] of all that the runs found for a block of queries."""
  keys, scores, ranks, sources = [], [], [], []
  for source, run in enumerate(runs):
    rows = run.rows[block, :depth]
    owner, rank = np.nonzero(rows >= 0)
    keys.append(_key(owner, rows[owner, rank]))
    scores.append(run.scores[block, :depth][owner, rank])
    ranks.append(rank)
    sources.append(np.full(len(rank), source))
  return np.concatenate(keys), np.concatenate(scores), np.concatenate(ranks), np.concatenate(sources)


def _key(owner: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """One number for a (query of the block, passage) pair."""
  return owner.astype(np.int64) << 32 | rows.astype(np.int64)


def _named(combinations: np.ndarray, names: Sequence[str]) -> dict[str, int]:
  found = np.flatnonzero(combinations[1:]) + 1  # 0 bits is a fill
  return {
    " + ".join(name for bit, name in enumerate(names) if combination >> bit & 1): int(combinations[combination])
    for combination in found
  }
