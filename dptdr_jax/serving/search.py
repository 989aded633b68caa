"""Rankings: vectors in FAISS, and two rankings fused into one. No documents, no HTTP."""

from __future__ import annotations

import faiss
import numpy as np

from dptdr_jax.retrieval import fusion
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retrieval.search import search_ties
from dptdr_jax.serving.collections import Ranked

FUSED_DEPTH = fusion.SCALED  # of each ranking that is fused
NEIGHBOURS, EF_CONSTRUCTION, EF_SEARCH = 32, 100, 128  # of the graph
FEW = 0.05  # a filter that leaves a smaller share is searched exactly: a graph would lose its way
_EMPTY = Ranked(np.zeros(0, np.int64), np.zeros(0, np.float32))


class VectorIndex:
  """Vectors by row, exact or in an HNSW graph. Not thread-safe.

  A place is where FAISS keeps a vector. Removed places are masked out, and dropped when they are half of all.
  """

  def __init__(self, width: int, approximate: bool):
    self._width, self._approximate = width, approximate
    self._fill(np.zeros(0, np.int64), np.zeros((0, width), np.float32))

  def _fill(self, rows: np.ndarray, vectors: np.ndarray) -> None:
    if self._approximate:
      self._index = faiss.IndexHNSWFlat(self._width, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
      self._index.hnsw.efConstruction = EF_CONSTRUCTION
      self._flat = faiss.downcast_index(self._index.storage)
    else:
      self._index = self._flat = faiss.IndexFlatIP(self._width)
    self._rows = np.zeros(0, np.int64)
    self._live = np.zeros(0, bool)
    self._places: dict[int, int] = {}
    self.add(rows, vectors)

  def __len__(self) -> int:
    return len(self._places)

  def __contains__(self, row: int) -> bool:
    return row in self._places

  def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
    """Adds vectors float32 [n, H] of rows that are not in the index."""
    first = self._flat.ntotal
    if not len(rows):
      return
    self._index.add(np.ascontiguousarray(vectors, np.float32))
    self._rows, self._live = _grown(self._rows, first + len(rows)), _grown(self._live, first + len(rows))
    self._rows[first : first + len(rows)], self._live[first : first + len(rows)] = rows, True
    self._places.update(zip(map(int, rows), range(first, first + len(rows)), strict=True))

  def remove(self, rows: list[int]) -> None:
    """Removes those of some rows that are there."""
    places = [self._places.pop(row) for row in rows if row in self._places]
    self._live[places] = False
    dead = self._flat.ntotal - len(self)
    if dead > max(1000, len(self)):
      kept = np.flatnonzero(self._live[: self._flat.ntotal])
      vectors = self._flat.reconstruct_batch(kept) if len(kept) else np.zeros((0, self._width), np.float32)
      self._fill(self._rows[kept], vectors)

  def search(self, vector: np.ndarray, k: int, rows: np.ndarray | None = None) -> Ranked:
    """The k largest inner products, among some rows if they are given.

    Exact search orders equal scores by the order in which they were added, across rank k as well.
    """
    total = self._flat.ntotal
    allowed = self._live[:total]
    if rows is not None:
      places = [self._places[row] for row in rows.tolist() if row in self._places]
      allowed = np.zeros(total, bool)
      allowed[places] = True
    count = int(allowed.sum()) if rows is not None else len(self)
    if not count:
      return _EMPTY
    selector = None if count == total else faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
    if self._approximate and count >= FEW * total:
      index, parameters = self._index, faiss.SearchParametersHNSW(efSearch=max(EF_SEARCH, 2 * k))
      if selector is not None:
        parameters.sel = selector
    else:
      index, parameters = self._flat, faiss.SearchParameters(sel=selector) if selector is not None else None
    run = search_ties(
      lambda queries, depth: index.search(queries, depth, params=parameters), vector[None].astype(np.float32),
      min(k, count), count,
    )  # fmt: skip
    kept = run.rows[0] >= 0
    return Ranked(self._rows[run.rows[0][kept]], run.scores[0][kept])


def _grown(array: np.ndarray, size: int) -> np.ndarray:
  """The array, or one twice as long with the same beginning."""
  if size <= len(array):
    return array
  larger = np.zeros(max(size, 2 * len(array), 1024), array.dtype)
  larger[: len(array)] = array
  return larger


def fused(vector: Ranked, bm25: Ranked, weight: float | None) -> Ranked:
  """Both rankings in one, see `retrieval.fusion`: weight · vector + (1 − weight) · bm25, or by reciprocal ranks."""
  rows, places = np.unique(np.concatenate([bm25.rows, vector.rows]), return_inverse=True)
  ends = places[: len(bm25.rows)], places[len(bm25.rows) :]
  runs = [Run.ranked(part[None], ranked.scores[None]) for part, ranked in zip(ends, (bm25, vector), strict=True)]
  made = fusion.reciprocal_ranks(runs, len(rows)) if weight is None else fusion.weighted(*runs, weight, len(rows))
  kept = made.rows[0] >= 0
  return Ranked(rows[made.rows[0][kept]], made.scores[0][kept])
