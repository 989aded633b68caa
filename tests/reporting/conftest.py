"""Passages, queries, and a pool of three queries in which everything happens."""

import types

import numpy as np
import pytest

from dptdr_jax.reporting import negatives
from dptdr_jax.retrieval.candidates import Pool, Reason


class Split:
  def __init__(self, *positives):
    self.name, self._positives = "train", positives
    self.trainable = np.flatnonzero([len(rows) for rows in positives])
    self.queries = [types.SimpleNamespace(text=f"query {row} <b>?") for row in range(len(positives))]

  def __len__(self):
    return len(self._positives)

  def positives(self, row):
    return np.array(self._positives[row], np.int64)


@pytest.fixture(scope="session")
def split_of():
  return Split


@pytest.fixture(scope="session")
def passages():
  return [types.SimpleNamespace(id=f"p{row}", title="T & <i>" if row else "", text="x" * 400) for row in range(8)]


@pytest.fixture(scope="session")
def about(passages):
  """`negatives.summary` of the pool."""
  no, margin, same = -np.inf, Reason.RELATIVE_MARGIN, Reason.SAME_TEXT
  bm25 = [[9.5, 8, no, 5], [3, 2, no, no], [1, 1, no, no]]
  dense = [[0.99, 0.99, 0.99, 0.5], [no, no, no, no], [0.2, 0.1, 0.3, no]]
  margins = {"rule": "margins", "relative": 0.9, "unjudged": 0}
  pool = Pool(
    rows=np.array([[0, 1, 2, 3], [0, 1, -1, -1], [4, 5, 6, -1]], np.int32),
    sources=np.full((3, 4), 3, np.uint16),
    scores=np.stack([bm25, dense], 2).astype(np.float32),
    ranks=np.zeros((3, 4, 2), np.int16),
    names=("bm25", "dense"),
    manifest={
      "counts": {"candidates": 9_000, "positives removed": 3, "queries without a candidate": 0},
      "combinations": {"bm25": 2, "bm25 + dense": 7},
      "unanswered": {"bm25": 0, "dense": 1},
      "denoising": [
        {"rule": "text", "removed": {"SAME_TEXT": {"all": 1, "bm25": 1, "dense": 1}}, "unjudged": 2},
        margins | {"source": "bm25", "removed": {"RELATIVE_MARGIN": {"all": 1, "bm25": 1, "dense": 1}}},
        margins | {"source": "dense", "removed": {"RELATIVE_MARGIN": {"all": 2, "bm25": 1, "dense": 2}}},
      ],
      "kept": 5,
      "emptied": 0,
    },
    positive_scores=np.array([[10, 1], [np.nan, np.nan], [-1, 0.4]], np.float32),
    reasons=np.array([[margin, margin, margin, 0], [0, 0, 0, 0], [0, same, 0, 0]], np.uint8),
  )
  split = Split([5, 6], [], [7])
  return negatives.summary(pool, passages, split, separator=" ", pseudo_positives=False, warnings=["<odd>"])
