"""Merges the runs of several retrievers into one pool of candidates, without the judged positives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dptdr_jax.core import preemption, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path
from dptdr_jax.retrieval.candidates import MAX_DEPTH, Pool, PoolWriter, query_blocks
from dptdr_jax.retrieval.denoise import Denoiser, Rule
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import FILL, Run


@dataclasses.dataclass(frozen=True)
class Source:
  """A retriever's run, and which ranks of it become candidates.

  Attributes:
    run: Q queries; its arrays may be memory-mapped.
    depth: ranks below it (from 0) are taken, as sentence-transformers' range_max and Tevatron's depth.
    first: ranks above it are skipped, as range_min: false negatives are frequent there.
    positive_scores: float32 [Q], the best score of this retriever for a judged positive of the query, NaN where
      unknown. Default: the best of those among the run's first `depth`, unknown where there is none.
  """

  run: Run
  depth: int
  first: int = 0
  positive_scores: np.ndarray | None = None

  def __post_init__(self):
    if not 0 <= self.first < self.depth <= MAX_DEPTH:
      raise InputError(f"a source's ranks must be 0 ≤ first < depth ≤ {MAX_DEPTH}", value=(self.first, self.depth))


def pool_from_runs(
  directory: Path, sources: Mapping[str, Source], positives: Qrels, rules: Sequence[Rule] = ()
) -> Pool:
  """Merges runs into a pool, leaves judged positives out and applies rules, in one pass over blocks of queries.

  A source contributes the candidates in its window of ranks. Its scores and ranks of other sources' candidates are
  written too, as far as its run goes down to `depth`: margins and SimANS need scores. Memory beside the runs and what
  the rules take stays below 100 MB.

  Args:
    directory: of the pool; one that is there is replaced.
    sources: source name → its run and window; at most MAX_SOURCES.
    positives: judgements of the Q queries; rows with a grade above 0 are left out.
    rules: applied in order, see `denoise`.

  Returns:
    The pool, memory-mapped. Its manifest counts, over all queries: candidates, entries of the runs' windows that were
    positives, queries without a candidate, queries that a source doesn't answer, candidates by combination of the
    sources that contributed them, and what the rules removed.
  """
  names, parts, num_queries = tuple(sources), list(sources.values()), len(positives)
  width = sum(source.depth - source.first for source in parts)
  counts = {"candidates": 0, "positives removed": 0, "queries without a candidate": 0}
  unanswered = np.zeros(len(parts), np.int64)
  combinations = np.zeros(2 ** len(parts), np.int64)
  denoiser = Denoiser(rules, names)
  with (
    PoolWriter(directory, num_queries, width, names) as writer,
    progress.bar("merge candidates", num_queries, "query") as shown,
  ):
    for block in query_blocks(num_queries, sum(source.depth for source in parts)):
      pool, removed = _merge_block(block, parts, positives, names)
      writer.append(denoiser(pool, block))
      counts["candidates"] += int(np.count_nonzero(pool.sources))
      counts["positives removed"] += removed
      counts["queries without a candidate"] += int((pool.sources[:, 0] == 0).sum())
      unanswered += [int((~(source.run.rows[block, :1] >= 0).any(1)).sum()) for source in parts]
      combinations += np.bincount(pool.sources.ravel(), minlength=len(combinations))
      shown.advance(block.stop - block.start)
      preemption.check("candidates will be merged again")
    return writer.finish({
      "counts": counts, "unanswered": dict(zip(names, unanswered.tolist(), strict=True)),
      "combinations": _named(combinations, names), **denoiser.counts(),
    })  # fmt: skip


class _Window(NamedTuple):
  """What one source's run holds for a block of b queries, positives left out; [E] each but the last two.

  Attributes:
    keys: see _key.
    scores, ranks: in the run.
    places: ranks within the source's window, −1 outside of it.
    positive_scores: the positives' best scores, float32 [b].
    removed: how many entries of the window were positives.
  """

  keys: np.ndarray
  scores: np.ndarray
  ranks: np.ndarray
  places: np.ndarray
  positive_scores: np.ndarray
  removed: int


def _merge_block(block: slice, sources: Sequence[Source], positives: Qrels, names: tuple[str, ...]) -> tuple[Pool, int]:
  """The candidates of a block of queries, and how many entries of the sources' windows were positives."""
  size, width = block.stop - block.start, sum(source.depth - source.first for source in sources)
  span = slice(positives.offsets[block.start], positives.offsets[block.stop])
  owners = np.repeat(np.arange(size), np.diff(positives.offsets[block.start : block.stop + 1]))
  relevant = _key(owners, positives.rows[span])[positives.grades[span] > 0]
  windows = [_window(block, source, relevant) for source in sources]

  keys, scores, ranks, places = (np.concatenate(parts) for parts in list(zip(*windows, strict=True))[:4])
  number = np.repeat(np.arange(len(sources)), [len(window.keys) for window in windows])
  inside = places >= 0
  unique, of_inside = np.unique(keys[inside], return_inverse=True)
  best = np.full(len(unique), np.iinfo(np.int64).max)
  np.minimum.at(best, of_inside, places[inside] * len(sources) + number[inside])
  owner = unique >> 32
  order = np.lexsort((best, owner))
  position = np.empty(len(unique), np.int64)
  starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=size))])
  position[order] = np.arange(len(unique)) - starts[owner[order]]

  pool = Pool(
    rows=np.full((size, width), FILL, np.int32),
    sources=np.zeros((size, width), np.uint16),
    scores=np.full((size, width, len(sources)), -np.inf, np.float32),
    ranks=np.full((size, width, len(sources)), -1, np.int16),
    reasons=np.zeros((size, width), np.uint8),
    positive_scores=np.stack([window.positive_scores for window in windows], 1),
    names=names,
  )
  pool.rows[owner, position] = unique & 0xFFFFFFFF
  at = np.searchsorted(unique, keys)  # an entry outside of all windows is not among them
  known = np.flatnonzero(at < len(unique))
  known = known[unique[at[known]] == keys[known]]
  owner, position = owner[at[known]], position[at[known]]
  number, inside = number[known], inside[known]
  pool.scores[owner, position, number] = scores[known]
  pool.ranks[owner, position, number] = ranks[known]
  np.bitwise_or.at(pool.sources, (owner[inside], position[inside]), (1 << number[inside]).astype(np.uint16))
  return pool, sum(window.removed for window in windows)


def _window(block: slice, source: Source, relevant: np.ndarray) -> _Window:
  """Reads a block of a source's run; `relevant` are the keys of the positives."""
  rows = np.asarray(source.run.rows[block, : source.depth])
  owner, rank = np.nonzero(rows >= 0)  # by query, then rank
  keys = _key(owner, rows[owner, rank])
  scores = np.asarray(source.run.scores[block, : source.depth])[owner, rank]
  judged, inside = np.isin(keys, relevant), rank >= source.first
  if source.positive_scores is None:
    best = np.full(len(rows), np.nan, np.float32)
    np.fmax.at(best, owner[judged], scores[judged])
  else:
    best = np.asarray(source.positive_scores[block], np.float32)
    best = np.where(np.isfinite(best), best, np.nan)
  kept, places = ~judged, np.where(inside, rank - source.first, -1)
  return _Window(keys[kept], scores[kept], rank[kept], places[kept], best, int((judged & inside).sum()))


def _key(owner: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """One number for a (query of the block, passage) pair."""
  return owner.astype(np.int64) << 32 | rows.astype(np.int64)


def _named(combinations: np.ndarray, names: Sequence[str]) -> dict[str, int]:
  present = np.flatnonzero(combinations[1:]) + 1  # 0 bits is a fill
  return {
    " + ".join(name for bit, name in enumerate(names) if bits >> bit & 1): int(combinations[bits]) for bits in present
  }
