"""Exact maximum inner product search over passages on disk, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import faiss
import numpy as np

from dptdr_jax.core import preemption, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.runs import Run

# (queries [n, H], k) → (scores [n, k], rows [n, k]), as faiss returns them
Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
_RESULT_ENTRIES = 1 << 23  # of one call to faiss: 100 MB of scores and rows
_PASSAGES = 131_072  # searched at a time
_MERGED = 4096  # queries merged at a time


def search_exact(queries: np.ndarray, passages: Embeddings | np.ndarray, k: int) -> Run:
  """Finds the k passages of largest inner product for each query; each passage is read from disk once.

  Equal scores are ordered by ascending row, also across rank k. (Equal vectors have equal scores only if the matrix
  product sums them in one order; the last bit may differ between blocks.) Peak memory beside the queries: a block
  (200 MB for H = 384), twice the run (2 · 8 · Q · k bytes), and up to 300 MB.

  Args:
    queries: float32 [Q, H].
    passages: embeddings on disk, or float32 [C, H].
    k: depth; beyond C there are −1 fills.

  Returns:
    A run [Q, k].
  """
  queries = checked_queries(queries, passages.shape[1] if isinstance(passages, np.ndarray) else passages.width)
  if k < 1:
    raise ValueError(f"k = {k} is not a depth")
  best = Run.empty(len(queries), k)
  with progress.bar("exact search", len(passages), "passage") as shown:
    for first, block in _blocks(passages):

      def search(some: np.ndarray, depth: int, block: np.ndarray = block) -> tuple[np.ndarray, np.ndarray]:
        return faiss.knn(some, block, depth, metric=faiss.METRIC_INNER_PRODUCT)

      merge(best, search_ties(search, queries, min(k, len(block)), len(block)), first)
      shown.advance(len(block))
      preemption.check("the search will begin again")
  return best


def search_ties(search: Search, queries: np.ndarray, k: int, count: int) -> Run:
  """Searches with equal scores ordered by ascending row, which faiss does not promise.

  It asks for one rank more than k: if that scores less than rank k, the k are right. Otherwise it asks for four times
  as many, again and again, until it sees where the tie ends.

  Args:
    search: a search over `count` passages.
    queries: float32 [Q, H].
    k: depth, at most `count`.
  """
  run = Run.empty(len(queries), k)
  _resolve(search, queries, np.arange(len(queries)), min(k + 1, count), count, run)
  return run


def _resolve(search: Search, queries: np.ndarray, of: np.ndarray, depth: int, count: int, run: Run) -> None:
  """Searches for the queries `of` and writes them into `run`; deeper for those with a tie across rank k."""
  size = max(1, _RESULT_ENTRIES // depth)
  for some in (of[start : start + size] for start in range(0, len(of), size)):
    scores, rows = search(queries[some], depth)
    run.rows[some], run.scores[some] = _ordered(rows, scores, run.depth)
    if depth < count:
      open_ended = (scores[:, run.depth - 1] == scores[:, -1]) & (rows[:, -1] >= 0)
      if open_ended.any():
        _resolve(search, queries, some[open_ended], min(4 * depth, count), count, run)


def merge(best: Run, other: Run, first_row: int) -> None:
  """Merges the results of a later block, whose first passage has row `first_row`, into the best so far, in place."""
  for start in range(0, len(best), _MERGED):  # bounds the copies
    part = slice(start, start + _MERGED)
    scores = np.concatenate([best.scores[part], other.scores[part]], 1)
    rows = np.concatenate([best.rows[part], np.where(other.rows[part] < 0, -1, other.rows[part] + first_row)], 1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, : best.depth]
    best.rows[part] = np.take_along_axis(rows, order, 1)
    best.scores[part] = np.take_along_axis(scores, order, 1)


def checked_queries(queries: np.ndarray, width: int) -> np.ndarray:
  """Queries as faiss wants them: float32 [Q, H], contiguous.

  Raises:
    InputError: they have another width, or a number that is not finite.
  """
  if queries.ndim != 2 or queries.shape[1] != width:
    raise InputError(f"queries have shape {queries.shape}, passages have width {width}")
  _check_finite(queries, "query")
  return np.ascontiguousarray(queries, np.float32)


def _blocks(passages: Embeddings | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
  if isinstance(passages, Embeddings):
    yield from passages.blocks(_PASSAGES)
    return
  for first in range(0, len(passages), _PASSAGES):
    block = np.ascontiguousarray(passages[first : first + _PASSAGES], np.float32)
    _check_finite(block, "passage", first)
    yield first, block


def _check_finite(vectors: np.ndarray, what: str, first: int = 0) -> None:
  """Raises InputError for NaN and infinity; embeddings on disk have none."""
  finite = np.isfinite(vectors).all(axis=1)
  if not finite.all():
    row = first + int(np.argmin(finite))
    fix = "Look for NaN in the encoder"
    raise InputError(f"a {what} vector has a number that is not finite", value=f"row {row}", fix=fix)


def _ordered(rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows and scores of faiss' result in a run's order. Only queries with a tie or a fill are sorted again."""
  rows, all_rows = rows[:, :k].astype(np.int32), rows
  unsure = np.flatnonzero((scores[:, 1:] >= scores[:, :-1]).any(1) | (all_rows < 0).any(1))
  if len(unsure):
    again = Run.ranked(all_rows[unsure], scores[unsure], k)
    scores = scores[:, :k].copy()
    rows[unsure], scores[unsure] = again.rows, again.scores
  return rows, scores[:, :k]
