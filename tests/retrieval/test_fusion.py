"""Fusion of two runs, against sums made by hand."""

import numpy as np
import pytest

from dptdr_jax.retrieval import fusion
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import Run


def run(*queries: dict[int, float]) -> Run:
  width = max(map(len, queries))
  rows, scores = np.full((len(queries), width), -1), np.full((len(queries), width), -np.inf)
  for place, query in enumerate(queries):
    rows[place, : len(query)], scores[place, : len(query)] = list(query), list(query.values())
  return Run.ranked(rows, scores)


FIRST, SECOND = run({7: 4.0, 3: 2.0}), run({3: 0.9, 5: 0.8, 9: 0.5})


def test_weighted_sum_of_scaled_scores():
  fused = fusion.weighted(FIRST, SECOND, 0.5, depth=4)
  assert fused.rows.tolist() == [[3, 7, 5, 9]]  # .5 · 0 + .5 · 1, .5 · 1, .5 · .75, 0; equal ones by row
  np.testing.assert_allclose(fused.scores, [[0.5, 0.5, 0.375, 0.0]])


def test_weights_of_0_and_1_rank_as_one_run_does():
  assert fusion.weighted(FIRST, SECOND, 0.0, depth=1).rows.tolist() == [[7]]
  assert fusion.weighted(FIRST, SECOND, 1.0, depth=3).rows.tolist() == [[3, 5, 7]]  # 7 and 9 have 0: by row


def test_reciprocal_ranks():
  fused = fusion.reciprocal_ranks([FIRST, SECOND], depth=4)
  assert fused.rows.tolist() == [[3, 7, 5, 9]]
  np.testing.assert_allclose(fused.scores, [[1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63]], rtol=1e-6)


def test_query_that_one_run_does_not_answer_has_the_others_passages():
  fused = fusion.weighted(run({}, {1: 3.0}), run({4: 1.0}, {}), 0.3, depth=2)
  assert fused.rows.tolist() == [[4, -1], [1, -1]]
  np.testing.assert_allclose(fused.scores[:, 0], [0.3, 0.7])


def test_scores_below_the_best_200_count_as_0():
  long = run({row: 1000.0 - row for row in range(250)})
  fused = fusion.weighted(long, run({249: 1.0}), 0.1, depth=250)
  assert fused.rows[0, 0] == 0 and 249 in fused.rows[0, :200]
  assert (fused.scores[0, -49:] == 0).all()


def test_weight_is_chosen_by_the_measure_in_the_middle_of_the_best():
  qrels = Qrels.from_triples(np.array([0]), np.array([3]), np.array([1]), 1)
  weight, value = fusion.choose_weight(FIRST, SECOND, qrels, "RR@10")
  assert value == 1.0 and weight == 0.75  # the positive is first from .5 on


def test_runs_of_other_queries_are_refused():
  with pytest.raises(ValueError, match="queries"):
    fusion.weighted(FIRST, run({1: 1.0}, {2: 1.0}), 0.5, depth=1)
