"""Exact maximum inner product search over passages on disk, in bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import faiss
import numpy as np

from dptdr_jax.core import preemption, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.runs import Run

# (queries [n, H], k) → (scores [n, k], rows [n, k]), as faiss gives them
Search = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
_RESULT_ENTRIES = 1 << 23  # of one call to faiss: 100 MB of scores and rows


def search_exact(
  queries: np.ndarray,
  passages: Embeddings | np.ndarray,
  k: int,
  *,
  block_rows: int = 131_072,
  threads: int | None = None,
) -> Run:
  """Finds the k passages of largest inner product for each query, each passage read from disk once.

  Passages go by in blocks; faiss searches a block for all queries, and its best are merged with the best so far. Equal
  scores stand by ascending row, also where they straddle rank k. (Equal vectors have equal scores only as far as the
  matrix product sums them in one order; it may differ in the last bit between blocks.)

  Peak memory beside the queries: a block (block_rows · H · 4 bytes: 200 MB for H = 384), twice the run (2 · 8 · Q · k
  bytes: what was found so far and in the block), and up to 300 MB.

  Args:
    queries: float32 [Q, H].
    passages: embeddings on disk, or float32 [C, H].
    k: depth; beyond C there are −1 fills.
    block_rows: passages a block.
    threads: faiss' threads; None: all cores.

  Returns:
    A run [Q, k].
  """
  queries = checked_queries(queries, passages.shape[1] if isinstance(passages, np.ndarray) else passages.width)
  if k < 1:
    raise ValueError(f"k = {k} is not a depth")
  best = Run.empty(len(queries), k)
  with faiss_threads(threads), progress.bar("exact search", len(passages), "passage") as shown:
    for first, block in _blocks(passages, block_rows):

      def search(some: np.ndarray, depth: int, block: np.ndarray = block) -> tuple[np.ndarray, np.ndarray]:
        return faiss.knn(some, block, depth, metric=faiss.METRIC_INNER_PRODUCT)

      merge(best, search_ties(search, queries, min(k, len(block)), len(block)), first)
      shown.advance(len(block))
      preemption.check("the search will begin again")
  return best


def search_ties(search: Search, queries: np.ndarray, k: int, count: int) -> Run:
  """Searches so that equal scores stand by ascending row, which faiss leaves open.

  One rank more than k is asked for: where it scores less than rank k, the k are the right ones. Where it ties, more are
  asked for, fourfold each time, until the tie's end is seen.

  Args:
    search: a search over `count` passages.
    queries: float32 [Q, H].
    k: depth, at most `count`.
    count: passages.

  Returns:
    A run [Q, k].
  """
  run = Run.empty(len(queries), k)
  _settle(search, queries, np.arange(len(queries)), min(k + 1, count), count, run)
  return run


def _settle(search: Search, queries: np.ndarray, of: np.ndarray, depth: int, count: int, run: Run) -> None:
  """Searches for the queries `of` and writes them into `run`; deeper for those whose tie at rank k is left open."""
  size = max(1, _RESULT_ENTRIES // depth)
  for some in (of[start : start + size] for start in range(0, len(of), size)):
    scores, rows = search(queries[some], depth)
    run.rows[some], run.scores[some] = _ordered(rows, scores, run.depth)
    if depth < count:
      open_ended = (scores[:, run.depth - 1] == scores[:, -1]) & (rows[:, -1] >= 0)
      if open_ended.any():
        _settle(search, queries, some[open_ended], min(4 * depth, count), count, run)


def merge(best: Run, found: Run, first_row: int) -> None:
  """Merges what a later block found into the best so far, in place; ties stay by row, for rows only grow.

  Args:
    best: [Q, K].
    found: [Q, K'], rows counted from `first_row`, which is beyond every row of `best`.
  """
  for start in range(0, len(best), 4096):  # bounds the copies
    part = slice(start, start + 4096)
    scores = np.concatenate([best.scores[part], found.scores[part]], 1)
    rows = np.concatenate([best.rows[part], np.where(found.rows[part] < 0, -1, found.rows[part] + first_row)], 1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, : best.depth]
    best.rows[part] = np.take_along_axis(rows, order, 1)
    best.scores[part] = np.take_along_axis(scores, order, 1)


def checked_queries(queries: np.ndarray, width: int) -> np.ndarray:
  """Queries as faiss wants them: float32 [Q, H], rows in one piece."""
  if queries.ndim != 2 or queries.shape[1] != width:
    raise InputError(f"queries have shape {queries.shape}, passages have width {width}")
  _check_finite(queries, "query")
  return np.ascontiguousarray(queries, np.float32)


@contextlib.contextmanager
def faiss_threads(threads: int | None) -> Iterator[None]:
  """Sets faiss' number of threads for the length of a `with` block; None leaves it."""
  before = faiss.omp_get_max_threads()
  if threads is not None:
    faiss.omp_set_num_threads(threads)
  try:
    yield
  finally:
    faiss.omp_set_num_threads(before)


def _blocks(passages: Embeddings | np.ndarray, rows: int) -> Iterator[tuple[int, np.ndarray]]:
  if isinstance(passages, Embeddings):
    yield from passages.blocks(rows)
    return
  for first in range(0, len(passages), rows):
    block = np.ascontiguousarray(passages[first : first + rows], np.float32)
    _check_finite(block, "passage", first)
    yield first, block


def _check_finite(vectors: np.ndarray, what: str, first: int = 0) -> None:
  """Raises InputError for NaN and infinity; embeddings on disk have none."""
  finite = np.isfinite(vectors).all(axis=1)
  if not finite.all():
    row = first + int(np.argmin(finite))
    fix = "Look for NaN in what encodes."
    raise InputError(f"a {what} vector has a number that is not finite", value=f"row {row}", fix=fix)


def _ordered(rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows and scores of faiss' result as a run has them. Only queries with a tie or a fill are sorted again."""
  rows, all_rows = rows[:, :k].astype(np.int32), rows
  unsure = np.flatnonzero((scores[:, 1:] >= scores[:, :-1]).any(1) | (all_rows < 0).any(1))
  if len(unsure):
    again = Run.ranked(all_rows[unsure], scores[unsure], k)
    scores = scores[:, :k].copy()
    rows[unsure], scores[unsure] = again.rows, again.scores
  return rows, scores[:, :k]
