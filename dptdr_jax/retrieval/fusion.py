"""Fusion: one ranking from two runs.

A weighted sum of scores, scaled to 0 … 1 for each query, wins over reciprocal ranks where one run is much better than
the other (docs/results.md); reciprocal ranks need no judgements.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dptdr_jax.retrieval import measures
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import Run

SCALED = 200  # best passages of a query whose scores are scaled; those below count as 0
_RANK_CONSTANT = 60  # Cormack, Clarke and Büttcher 2009
WEIGHTS = tuple(step / 20 for step in range(21))
_BLOCK = 1024  # queries at a time


def weighted(first: Run, second: Run, weight: float, depth: int) -> Run:
  """Ranks by (1 - weight) · first + weight · second, of scores scaled to 0 … 1 for each query.

  For example, of scores (4, 2) and (0.9, 0.8, 0.5) the scaled ones are (1, 0) and (1, 0.75, 0). Equal scores stand by
  ascending row.

  Args:
    first, second: runs of the same Q queries.
    weight: of the second, 0 … 1.
    depth: K of the result.
  """
  return _fused([(first, _scaled, 1 - weight), (second, _scaled, weight)], depth)


def reciprocal_ranks(runs: Sequence[Run], depth: int) -> Run:
  """Ranks by the sum of 1 / (60 + rank) over the runs, ranks from 1 (Cormack, Clarke and Büttcher 2009)."""
  return _fused([(run, _reciprocal, 1.0) for run in runs], depth)


def choose_weight(first: Run, second: Run, qrels: Qrels, measure: str) -> tuple[float, float]:
  """The weight of the second run that gives the highest mean of a measure, and that mean; of equal ones the middle."""
  depth = max(measures.cutoff(measure), 1)
  means = [measures.evaluate(weighted(first, second, weight, depth), qrels, [measure]).means()[measure]
           for weight in WEIGHTS]  # fmt: skip
  best = np.flatnonzero(np.isclose(means, max(means), rtol=0, atol=1e-12))
  return WEIGHTS[int(best[len(best) // 2])], float(max(means))


def _scaled(rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
  """Scores of the best SCALED passages of each query from 1 down to 0; 0 for the others, float64 [b, K]."""
  known = (rows >= 0) & (np.arange(rows.shape[1]) < SCALED)
  values = np.where(known, scores, np.nan).astype(np.float64)
  with np.errstate(invalid="ignore"):
    low = np.nanmin(values, axis=1, keepdims=True, initial=np.inf)
    high = np.nanmax(values, axis=1, keepdims=True, initial=-np.inf)
  span = np.where(high > low, high - low, 1.0)
  # A single score, or several equal ones: 1, as for the best.
  scaled = np.where(high > low, (values - low) / span, 1.0)
  return np.where(known, scaled, 0.0)


def _reciprocal(rows: np.ndarray, _: np.ndarray) -> np.ndarray:
  return np.where(rows >= 0, 1.0 / (_RANK_CONSTANT + 1 + np.arange(rows.shape[1])), 0.0)


def _fused(parts: Sequence[tuple], depth: int) -> Run:
  """Sums what each part's function makes of its scores, times its weight, by passage."""
  count = len(parts[0][0])
  if any(len(run) != count for run, _, _ in parts):
    raise ValueError(f"runs of {[len(run) for run, _, _ in parts]} queries")
  fused = Run.empty(count, depth)
  for start in range(0, count, _BLOCK):
    block = slice(start, min(start + _BLOCK, count))
    rows = np.concatenate([np.asarray(run.rows[block]) for run, _, _ in parts], axis=1)
    values = np.concatenate([weight * score(np.asarray(run.rows[block]), np.asarray(run.scores[block]))
                             for run, score, weight in parts], axis=1)  # fmt: skip
    merged = Run.ranked(*_summed(rows, values), depth)
    fused.rows[block, : merged.depth], fused.scores[block, : merged.depth] = merged.rows, merged.scores
  return fused


def _summed(rows: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Adds up the values of a query's equal rows: the first of them keeps the sum, the others become fills."""
  order = np.argsort(rows, axis=1, kind="stable")
  rows, values = np.take_along_axis(rows, order, 1), np.take_along_axis(values, order, 1)
  first = np.ones(rows.shape, bool)
  first[:, 1:] = rows[:, 1:] != rows[:, :-1]
  groups = np.cumsum(first.ravel()) - 1
  totals = np.bincount(groups, weights=values.ravel())
  return np.where(first, rows, -1), np.where(first, totals[groups].reshape(rows.shape), -np.inf)
