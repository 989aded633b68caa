"""Training groups: for a query one positive and G − 1 negatives, by passage row (method.md, "passages for a query").

Every choice is drawn from a counter-based generator keyed by what it belongs to, so that a group is a function of
(seed, stage, epoch, query row) and nothing else: no global state, no order of calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

_PURPOSES = {"order": 0, "positive": 1, "negatives": 2, "fill": 3, "spans": 4}


class Negatives(Protocol):
  """Where a query's negatives come from: RowLists, or a pool of candidates with −1 fills."""

  def rows(self, query_row: int) -> np.ndarray:
    """Returns int [n] passage rows, best first; negative numbers are fills."""
    ...


def generator(seed: int, stage: str, purpose: str, epoch: int, item: int) -> np.random.Generator:
  """Returns the Philox stream of (seed, stage, purpose, epoch, item); streams never overlap."""
  stage_word = int.from_bytes(hashlib.blake2b(stage.encode(), digest_size=8).digest(), "little")
  counter = [0, _PURPOSES[purpose], epoch, item]  # the first word counts the draws
  return np.random.Generator(np.random.Philox(key=[seed % 2**64, stage_word], counter=counter))


class TrainGroups:
  """Draws groups as the original does.

  The positive rotates with the epoch from a start drawn per query, or is always the first. Negatives are shuffled once
  per query; epoch e takes the window of G − 1 from e·(G − 1) on, around the end. The first epochs thus see every
  negative once before one comes again.

  A query with fewer negatives than G − 1 keeps them all in every epoch and is filled with passages drawn at random
  from the corpus, other ones each epoch (the original repeats its negatives, which adds nothing to a loss that masks
  duplicates). Positives are never negatives, whatever the source of negatives says, and no row comes twice; only a
  corpus too small for that repeats its rows.

  Args:
    positives: positives(query_row) → int64 rows, at least one.
    negatives: see Negatives; None for random passages alone.
    num_passages: C.
    group_size: G; 1 for in-batch negatives alone.
    positive: "rotate" or "first".
  """

  def __init__(
    self,
    positives: Callable[[int], np.ndarray],
    negatives: Negatives | None,
    *,
    num_passages: int,
    group_size: int,
    seed: int,
    stage: str,
    positive: Literal["rotate", "first"] = "rotate",
  ):
    self._positives, self._negatives = positives, negatives
    self.num_passages, self.group_size = num_passages, group_size
    self._seed, self._stage, self._first = seed, stage, positive == "first"

  def group(self, query_row: int, epoch: int) -> np.ndarray:
    """Returns int64 [G]: a positive, then negatives."""
    positives = self._positives(query_row)
    start = 0
    if not self._first and len(positives) > 1:
      start = int(self._generator("positive", 0, query_row).integers(len(positives))) + epoch
    chosen = positives[start % len(positives)]
    return np.concatenate([[chosen], self._window(query_row, epoch, positives)]).astype(np.int64)

  def _window(self, query_row: int, epoch: int, barred: np.ndarray) -> np.ndarray:
    count = self.group_size - 1
    if not count:
      return np.empty(0, np.int64)
    negatives = np.empty(0, np.int64) if self._negatives is None else self._negatives.rows(query_row)
    negatives = negatives[(negatives >= 0) & ~(negatives[:, None] == barred).any(axis=1)]
    negatives = self._generator("negatives", 0, query_row).permutation(negatives)
    if len(negatives) >= count:
      return np.take(negatives, np.arange(epoch * count, (epoch + 1) * count), mode="wrap")
    return self._fill(negatives, barred, count, self._generator("fill", epoch, query_row))

  def _fill(self, negatives: np.ndarray, barred: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Adds random rows until there are `count`, none barred and, where the corpus allows, none twice."""
    forbidden = {int(row) for row in barred}
    allowed = self.num_passages - len(forbidden)
    if allowed < 1:
      raise ValueError("every passage of the corpus is a positive of one query: there is nothing to contrast it with")
    rows = [int(row) for row in negatives]
    used = forbidden | set(rows)
    while len(rows) < count:
      if len(used) >= self.num_passages:
        used = set(forbidden)
      row = int(random.integers(self.num_passages))
      if row not in used:
        used.add(row)
        rows.append(row)
    return np.array(rows, np.int64)

  def _generator(self, purpose: str, epoch: int, query_row: int) -> np.random.Generator:
    return generator(self._seed, self._stage, purpose, epoch, query_row)
