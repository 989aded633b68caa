"""Several retrievers' runs into one pool of candidates, without the judged positives, in bounded memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dptdr_jax.core import preemption, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path, atomic_directory, write_json
from dptdr_jax.retrieval.candidates import FORMAT, MAX_DEPTH, MAX_SOURCES, MERGED, Pool, open_arrays, query_blocks
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import FILL, Run


@dataclasses.dataclass(frozen=True)
class Source:
  """A retriever's run and what is taken of it.

  Attributes:
    run: Q queries; its arrays may be memory-mapped.
    depth: ranks below it (from 0) are taken, as sentence-transformers' range_max and Tevatron's depth.
    first: ranks above it are skipped, as range_min: where false negatives stand.
    quota: at most so many candidates of a query, the best of the window that are no positives; None: all.
    positive_scores: float32 [Q], the best score that this retriever gives to a judged positive of the query, NaN where
      unknown. Default: the best of those that its run holds above `depth`, which is the same number where it holds
      one, and unknown where it doesn't.
  """

  run: Run
  depth: int
  first: int = 0
  quota: int | None = None
  positive_scores: np.ndarray | None = None

  def __post_init__(self):
    if not 0 <= self.first < self.depth <= MAX_DEPTH:
      raise InputError(f"a source's ranks go from 0 ≤ first < depth ≤ {MAX_DEPTH}", value=(self.first, self.depth))
    if self.quota is not None and self.quota < 1:
      raise InputError("a source's quota is at least 1", value=self.quota, fix="None is without a limit")
    if self.positive_scores is not None and self.positive_scores.shape != (len(self.run),):
      raise ValueError(f"positive scores {self.positive_scores.shape} for a run of {len(self.run)} queries")

  @property
  def most(self) -> int:
    """The most candidates that it can give to a query."""
    window = self.depth - self.first
    return window if self.quota is None else min(window, self.quota)


def pool_from_runs(
  directory: Path, sources: Mapping[str, Source], positives: Qrels, *, width: int | None = None
) -> Pool:
  """Merges what several retrievers found into one pool, without the passages judged relevant; writes it atomically.

  A source gives the candidates in its window of ranks, up to its quota. What it says of a candidate that another one
  gives is written too, as far as its run goes down to `depth`: margins and SimANS want scores. A query that a source
  doesn't answer stays in, and one that no source answers keeps its (empty) place. Works through the queries in blocks:
  memory beyond the runs stays below 100 MB.

  Args:
    directory: replaced if it exists.
    sources: source name → what is taken of it; at most 16.
    positives: judgements of the Q queries; rows with a grade above 0 are left out.
    width: K; default the sum of what the sources can give, so that nothing is cut.

  Returns:
    The pool, memory-mapped. Its manifest counts, over all queries: candidates, entries of the runs' windows that were
    positives, queries without a candidate, queries that a source doesn't answer, and candidates by combination of the
    sources that gave them.
  """
  names, parts, num_queries = list(sources), list(sources.values()), len(positives)
  if not 1 <= len(parts) <= MAX_SOURCES:
    raise InputError(f"a pool takes 1 to {MAX_SOURCES} sources", value=len(parts))
  if any(len(source.run) != num_queries for source in parts):
    raise ValueError(f"runs of {[len(source.run) for source in parts]} queries, judgements of {num_queries}")
  width = sum(source.most for source in parts) if width is None else width
  counts = {"candidates": 0, "positives removed": 0, "queries without a candidate": 0}
  unanswered = np.zeros(len(parts), np.int64)
  combinations = np.zeros(2 ** len(parts), np.int64)
  with atomic_directory(directory) as partial, progress.bar("merge candidates", num_queries, "query") as shown:
    with open_arrays(partial, MERGED, num_queries, width, len(parts)) as streams:
      for block in query_blocks(num_queries, sum(source.depth for source in parts)):
        arrays, removed = _merge_block(block, parts, positives, width)
        for name, stream in streams.items():
          stream.write(arrays[name].tobytes())
        bits = arrays["sources"]
        counts["candidates"] += int(np.count_nonzero(bits))
        counts["positives removed"] += removed
        counts["queries without a candidate"] += int((bits[:, 0] == 0).sum())
        unanswered += [int((~(source.run.rows[block, :1] >= 0).any(1)).sum()) for source in parts]
        combinations += np.bincount(bits.ravel(), minlength=len(combinations))
        shown.advance(block.stop - block.start)
        preemption.check("candidates will be merged again")
    manifest = {
      "format": FORMAT, "kind": "candidates", "sources": names,
      "options": {name: {key: getattr(source, key) for key in ("depth", "first", "quota")}
                  for name, source in sources.items()},
      "counts": counts, "unanswered": dict(zip(names, unanswered.tolist(), strict=True)),
      "combinations": _named(combinations, names),
    }  # fmt: skip
    write_json(partial / "manifest.json", manifest)
  return Pool.open(directory)


class _Found(NamedTuple):
  """What one source's run holds for a block of queries, positives left out; [E] each but the last two.

  Keys (_key), scores, ranks, and the places that it gives them in the pool, −1 where it doesn't; the positives' best
  scores float32 [b]; and how many entries of its window were positives.
  """

  keys: np.ndarray
  scores: np.ndarray
  ranks: np.ndarray
  places: np.ndarray
  positive_scores: np.ndarray
  removed: int


def _merge_block(
  block: slice, sources: Sequence[Source], positives: Qrels, width: int
) -> tuple[dict[str, np.ndarray], int]:
  """The arrays of a block of queries, and how many entries of the runs' windows were positives."""
  size = block.stop - block.start
  span = slice(positives.offsets[block.start], positives.offsets[block.stop])
  owners = np.repeat(np.arange(size), np.diff(positives.offsets[block.start : block.stop + 1]))
  relevant = _key(owners, positives.rows[span])[positives.grades[span] > 0]
  found = [_find(block, source, relevant) for source in sources]

  keys, scores, ranks, places = (np.concatenate(parts) for parts in list(zip(*found, strict=True))[:4])
  number = np.repeat(np.arange(len(sources)), [len(part.keys) for part in found])
  gives = places >= 0
  unique, of_given = np.unique(keys[gives], return_inverse=True)
  best = np.full(len(unique), np.iinfo(np.int64).max)
  np.minimum.at(best, of_given, places[gives] * len(sources) + number[gives])
  owner = unique >> 32
  order = np.lexsort((best, owner))
  position = np.empty(len(unique), np.int64)
  starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=size))])
  position[order] = np.arange(len(unique)) - starts[owner[order]]

  arrays = {
    "rows": np.full((size, width), FILL, np.int32),
    "sources": np.zeros((size, width), np.uint16),
    "scores": np.full((size, width, len(sources)), -np.inf, np.float32),
    "ranks": np.full((size, width, len(sources)), -1, np.int16),
    "positive_scores": np.stack([part.positive_scores for part in found], 1),
  }
  fits = position < width
  arrays["rows"][owner[fits], position[fits]] = unique[fits] & 0xFFFFFFFF
  at = np.searchsorted(unique, keys)  # an entry that nobody gives is not among them
  known = np.flatnonzero(at < len(unique))
  known = known[unique[at[known]] == keys[known]]
  known = known[fits[at[known]]]
  owner, position, number, gives = owner[at[known]], position[at[known]], number[known], gives[known]
  arrays["scores"][owner, position, number] = scores[known]
  arrays["ranks"][owner, position, number] = ranks[known]
  np.bitwise_or.at(arrays["sources"], (owner[gives], position[gives]), (1 << number[gives]).astype(np.uint16))
  return arrays, sum(part.removed for part in found)


def _find(block: slice, source: Source, relevant: np.ndarray) -> _Found:
  """Reads a block of a source's run; `relevant` are the keys of the positives."""
  rows = np.asarray(source.run.rows[block, : source.depth])
  owner, rank = np.nonzero(rows >= 0)  # by query, then rank
  keys = _key(owner, rows[owner, rank])
  scores = np.asarray(source.run.scores[block, : source.depth])[owner, rank]
  judged, in_window = np.isin(keys, relevant), rank >= source.first
  if source.positive_scores is None:
    best = np.full(len(rows), np.nan, np.float32)
    np.fmax.at(best, owner[judged], scores[judged])
  else:
    best = np.asarray(source.positive_scores[block], np.float32)
    best = np.where(np.isfinite(best), best, np.nan)
  gives = in_window & ~judged
  if source.quota is not None:
    before = np.concatenate([[0], np.cumsum(gives)])  # candidates of the block before each entry
    begins = np.searchsorted(owner, np.arange(len(rows)))
    gives &= before[:-1] - before[begins[owner]] < source.quota
  places = np.where(gives, rank - source.first, -1)
  kept = ~judged
  return _Found(keys[kept], scores[kept], rank[kept], places[kept], best, int((judged & in_window).sum()))


def _key(owner: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """One number for a (query of the block, passage) pair."""
  return owner.astype(np.int64) << 32 | rows.astype(np.int64)


def _named(combinations: np.ndarray, names: Sequence[str]) -> dict[str, int]:
  found = np.flatnonzero(combinations[1:]) + 1  # 0 bits is a fill
  return {
    " + ".join(name for bit, name in enumerate(names) if combination >> bit & 1): int(combinations[combination])
    for combination in found
  }
