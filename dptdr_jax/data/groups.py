"""Training groups: for a query one positive and G − 1 negatives, by passage row.

Every choice is drawn from a counter-based generator with a key of its own, so that a group is a function of
(seed, stage, epoch, query row): no global state, no order of calls.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

from dptdr_jax.core.errors import InputError

_log = logging.getLogger(__name__)

_PURPOSES = {"order": 0, "positive": 1, "negatives": 2, "fill": 3, "spans": 4, "sample": 5}


class Negatives(Protocol):
  """Negatives of each query: RowLists, or a pool of candidates with −1 fills.

  For SimANS they also have `scores(query_row)` → (float [n], float): a retriever's scores of `rows(query_row)`, −inf if
  it has none, and the best score of the query's positives, NaN if that is unknown.
  """

  def rows(self, query_row: int) -> np.ndarray:
    """Returns int [n] passage rows, best first; negative numbers are fills."""
    ...


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How G − 1 negatives are chosen in an epoch from a query's list (best first, without fills and positives).

  Attributes:
    strategy:
      "window": the list is shuffled once per query; epoch e takes G − 1 from place e·(G − 1) on, around the end, so
        that every negative is used once before one comes again. As the original.
      "random": G − 1 drawn anew each epoch.
      "top": the first G − 1, the same in every epoch.
      "simans": drawn anew each epoch without replacement, p ∝ exp(−a·(s − s⁺ − b)²) of score s and positive's score s⁺
        (SimANS, arXiv 2210.11773). Candidates without a score come last; if s⁺ is unknown, all are equally likely.
        Negatives without any scores are drawn as by "random".
    last: only the first so many of the list; None: all. Tevatron's "30 random of the top 200" is random, last = 200.
    a, b: SimANS' sharpness, in 1 / score², and shift, in scores: p is a normal curve around s⁺ + b with deviation
      1 / √(2a), 1 by default. For cosines, a = 200 makes it 0.05.
  """

  strategy: Literal["window", "random", "top", "simans"] = "window"
  last: int | None = None
  a: float = 0.5
  b: float = 0.0


def generator(seed: int, stage: str, purpose: str, epoch: int, item: int) -> np.random.Generator:
  """Returns the Philox stream of (seed, stage, purpose, epoch, item); streams never overlap."""
  stage_word = int.from_bytes(hashlib.blake2b(stage.encode(), digest_size=8).digest(), "little")
  counter = [0, _PURPOSES[purpose], epoch, item]  # the first word counts the draws
  return np.random.Generator(np.random.Philox(key=[seed % 2**64, stage_word], counter=counter))


class TrainGroups:
  """Draws groups; by default as the original does.

  The positive rotates with the epoch from a start drawn per query, or is always the first one. A query with fewer than
  G − 1 negatives gets all of them in every epoch, and random passages of the corpus, others in each epoch. (The
  original repeats its negatives, which adds nothing to a loss that masks duplicates.) Positives are never negatives,
  even if `negatives` names them. No row comes twice, unless the corpus is too small.

  Args:
    positives: positives(query_row) → int64 rows, at least one.
    negatives: see Negatives; None: random passages.
    num_passages: C.
    group_size: G; 1: in-batch negatives alone.
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
    sampling: Sampling | None = None,
  ):
    self._sampling = sampling or Sampling()
    if self._sampling.strategy == "simans" and negatives is not None and not hasattr(negatives, "scores"):
      _log.info("%s: these negatives have no scores, which SimANS needs; they are drawn at random", stage)
      self._sampling = dataclasses.replace(self._sampling, strategy="random")
    self._positives, self._negatives = positives, negatives
    self.num_passages, self.group_size = num_passages, group_size
    self._seed, self._stage, self._first = seed, stage, positive == "first"

  def at(self, step: int) -> TrainGroups:
    """Returns the groups of a step: these. (Negatives that are mined again during training change with the step.)"""
    return self

  def positives(self, query_row: int) -> np.ndarray:
    """Returns the rows that are relevant to a query, int64, which are never its negatives."""
    return self._positives(query_row)

  def group(self, query_row: int, epoch: int) -> np.ndarray:
    """Returns int64 [G]: a positive, then negatives."""
    positives = self._positives(query_row)
    start = 0
    if not self._first and len(positives) > 1:
      start = int(self._generator("positive", 0, query_row).integers(len(positives))) + epoch
    chosen = positives[start % len(positives)]
    return np.concatenate([[chosen], self._chosen(query_row, epoch, positives)]).astype(np.int64)

  def _chosen(self, query_row: int, epoch: int, barred: np.ndarray) -> np.ndarray:
    count = self.group_size - 1
    if not count:
      return np.empty(0, np.int64)
    negatives = np.empty(0, np.int64)
    if self._negatives is not None:
      rows = self._negatives.rows(query_row)
      allowed = np.flatnonzero((rows >= 0) & ~(rows[:, None] == barred).any(axis=1))
      # A dataset's own negatives may come twice.
      allowed = allowed[np.sort(np.unique(rows[allowed], return_index=True)[1])][: self._sampling.last]
      negatives = rows[self._ordered(allowed, query_row, epoch, count)]
    if len(negatives) >= count:
      return negatives[:count]
    return self._fill(negatives, barred, count, query_row, epoch)

  def _ordered(self, places: np.ndarray, query_row: int, epoch: int, count: int) -> np.ndarray:
    """Returns places in the list of negatives in the order in which this epoch takes them."""
    strategy = self._sampling.strategy
    if strategy == "top":
      return places
    if strategy == "window":
      shuffled = self._generator("negatives", 0, query_row).permutation(places)
      return np.roll(shuffled, -epoch * count) if len(places) >= count else shuffled
    random = self._generator("sample", epoch, query_row)
    if strategy == "random":
      return random.permutation(places)
    scores, positive = self._negatives.scores(query_row)
    # Gumbel top-k: the largest of log p + independent Gumbel draws are a draw without replacement (arXiv 1903.06059).
    keys = random.gumbel(size=len(places))
    known = np.isfinite(scores[places]) & np.isfinite(positive)
    distances = np.asarray(scores, np.float64)[places[known]] - positive - self._sampling.b
    keys[known] -= self._sampling.a * np.square(distances)
    return places[np.lexsort((-keys, ~known))]

  def _fill(self, negatives: np.ndarray, barred: np.ndarray, count: int, query_row: int, epoch: int) -> np.ndarray:
    """Adds random rows until there are `count`, none barred and, if the corpus allows, none twice."""
    forbidden = {int(row) for row in barred}
    allowed = self.num_passages - len(forbidden)
    if allowed < 1:
      raise InputError("every passage of the corpus is a positive of one query, so that it has no negatives",
                       value=f"training query {query_row + 1}")  # fmt: skip
    random = self._generator("fill", epoch, query_row)
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
