"""Relevance judgements by row: which passages are relevant for which query, without a dictionary of ids."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Qrels:
  """Judgements of Q queries: those of query q are the slice offsets[q]:offsets[q + 1].

  Attributes:
    offsets: int64 [Q + 1].
    rows: int32 [J], passage rows, ascending within a query.
    grades: int32 [J], above 0 is relevant (binary sets have 1; TREC Deep Learning has 0 to 3).
  """

  offsets: np.ndarray
  rows: np.ndarray
  grades: np.ndarray

  @classmethod
  def from_triples(cls, queries: np.ndarray, passages: np.ndarray, grades: np.ndarray, num_queries: int) -> Qrels:
    """Sorts judgements by query and passage.

    Args:
      queries: int [J], query rows in 0 … num_queries − 1.
      passages: int [J], passage rows.
      grades: int [J]. Where a pair is judged twice the last one counts.
      num_queries: Q; a query without a judgement has an empty slice.
    """
    queries, passages, grades = np.asarray(queries), np.asarray(passages), np.asarray(grades)
    order = np.lexsort((np.arange(len(queries)), passages, queries))
    queries, passages, grades = queries[order], passages[order], grades[order]
    last = np.ones(len(queries), bool)
    last[:-1] = (queries[1:] != queries[:-1]) | (passages[1:] != passages[:-1])
    counts = np.bincount(queries[last].astype(np.int64), minlength=num_queries)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return cls(offsets, passages[last].astype(np.int32), grades[last].astype(np.int32))

  def __len__(self) -> int:
    """Number of queries, judged or not."""
    return len(self.offsets) - 1

  def of(self, query: int) -> tuple[np.ndarray, np.ndarray]:
    """Passage rows and grades judged for one query."""
    span = slice(self.offsets[query], self.offsets[query + 1])
    return self.rows[span], self.grades[span]

  def judged(self) -> np.ndarray:
    """Rows of the queries that have a judgement, int64, ascending."""
    return np.flatnonzero(np.diff(self.offsets))
