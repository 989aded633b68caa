"""Signs of a bad pool, on small pools."""

from __future__ import annotations

import numpy as np

from dptdr_jax.retrieval import candidates
from dptdr_jax.retrieval.candidates import Pool, Reason
from dptdr_jax.retrieval.pool_checks import suspicions


def pool_of(rows, sources=None, scores=None, reasons=None, positive_scores=None, names=("bm25", "dense")) -> Pool:
  rows = np.array(rows, np.int32)
  wide = (*rows.shape, len(names))
  return Pool(
    rows, np.array((rows >= 0) if sources is None else sources, np.uint16),
    np.full(wide, -np.inf, np.float32) if scores is None else np.array(scores, np.float32).reshape(wide),
    np.full(wide, -1, np.int16), np.zeros(rows.shape, np.uint8) if reasons is None else np.array(reasons, np.uint8),
    np.array(np.zeros((len(rows), len(names))) if positive_scores is None else positive_scores, np.float32), names,
  )  # fmt: skip


def test_sound_pool_is_not_suspicious():
  sources, scores = [[1, 2], [3, 2]], [[[5, -np.inf], [-np.inf, 3]], [[9, 2], [-np.inf, 3]]]
  assert suspicions(pool_of([[1, 2], [3, 4]], sources, scores, positive_scores=[[6, 4], [9, np.nan]])) == []


def test_what_makes_a_pool_suspicious(monkeypatch):
  monkeypatch.setattr(candidates, "BLOCK_ENTRIES", 2)
  rows, sources = [[1, 2], [3, 4], [-1, -1]], [[1, 1], [1, 1], [0, 0]]
  scores = np.full((3, 2, 2), -np.inf)
  scores[:2, :, 0] = [[5, 3], [8, 7]]
  lines = suspicions(pool_of(rows, sources, scores, positive_scores=[[4, 1], [6, 1], [0, 0]]))
  assert len(lines) == 3
  assert lines[0].startswith("75% of the negatives that bm25 retrieved score above the positive")
  assert lines[1].startswith("1 of 3 queries (33.3%) have no negative")
  assert lines[2].startswith("bm25 alone contributed 100% of the negatives, though there are 2 sources")


def test_source_that_retrieves_few_positives_is_suspicious(monkeypatch):
  monkeypatch.setattr(candidates, "BLOCK_ENTRIES", 2)
  rows, sources = [[1, 2], [3, 4], [5, 6], [7, -1]], [[1, 2], [1, 2], [1, 2], [2, 0]]
  scores = np.full((4, 2, 2), -np.inf)
  scores[:3, 0, 0], scores[:3, 1, 1], scores[3, 0, 1] = 5, 3, 3
  positive = np.array([[6, 4], [np.nan, 4], [np.nan, 4], [np.nan, 4]])  # the last query bm25 doesn't answer
  (line,) = suspicions(pool_of(rows, sources, scores, positive_scores=positive))
  assert line == "bm25 retrieves no positive for 67% of the queries that it answers: its margin cannot apply there"
  positive[1, 0] = 6
  assert suspicions(pool_of(rows, sources, scores, positive_scores=positive)) == []


def test_removed_candidates_are_not_suspicious():
  rows, scores = [[1, 2]], np.array([[[5], [1]]])
  above = {"scores": scores, "positive_scores": [[4]], "names": ("dense",)}
  assert suspicions(pool_of([[1, -1]], scores=scores, positive_scores=[[4]], names=("dense",)))
  assert suspicions(pool_of(rows, **above, reasons=[[Reason.RELATIVE_MARGIN, 0]])) == []
  assert len(suspicions(pool_of(rows, **above, reasons=[[Reason.RELATIVE_MARGIN] * 2]))) == 1  # now empty
