"""Measures against small cases and ir-measures' own providers."""

from __future__ import annotations

import math

import ir_measures
import numpy as np
import pytest
import scipy.stats
from ir_measures import Qrel, ScoredDoc

from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval.measures import bootstrap_interval, evaluate, randomisation_test
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import Run


def test_three_queries_by_hand():
  run = Run(np.array([[4, 5, 6], [6, 5, 4], [5, -1, -1]], np.int32), np.array([[3, 2, 1], [3, 2, 1], [1, 0, 0]], "f"))
  qrels = Qrels.from_triples(np.array([0, 0, 1, 2]), np.array([5, 9, 6, 4]), np.array([1, 1, 1, 1]), 3)
  got = evaluate(run, qrels, ["RR@10", "R@1", "R@3", "Success@2", "AP", "nDCG@3"])
  ideal = 1 + 1 / math.log2(3)
  expected = {
    "RR@10": [1 / 2, 1, 0],
    "R@1": [0, 1, 0],
    "R@3": [1 / 2, 1, 0],
    "Success@2": [1, 1, 0],
    "AP": [1 / 4, 1, 0],
    "nDCG@3": [1 / math.log2(3) / ideal, 1, 0],
  }
  for name, values in expected.items():
    np.testing.assert_allclose(got.values[name], values, atol=1e-9, err_msg=name)
  assert got.means()["RR@10"] == pytest.approx(1 / 2)


def test_query_without_a_result_counts_zero_and_unjudged_one_is_left_out():
  run = Run.ranked(np.array([[-1, -1], [1, 0], [0, 1]]), np.array([[0, 0], [2, 1], [2.0, 1]]))
  qrels = Qrels.from_triples(np.array([0, 2]), np.array([0, 0]), np.array([1, 1]), 3)
  got = evaluate(run, qrels, ["RR@10", "R@20", "nDCG@10"])
  assert got.queries.tolist() == [0, 2]
  assert got.values["RR@10"].tolist() == [0, 1]
  assert got.means() == {"RR@10": 0.5, "R@20": 0.5, "nDCG@10": 0.5}


def test_ties_are_ordered_as_in_the_run():
  # As a string "10" comes before "9": trec_eval and msmarco_eval would each swap one of these.
  qrels = Qrels.from_triples(np.array([0, 1]), np.array([9, 10]), np.array([1, 1]), 2)
  run = Run(np.array([[9, 10], [9, 10]], np.int32), np.ones((2, 2), np.float32))
  got = evaluate(run, qrels, ["RR@10", "RR", "nDCG@10"])
  assert got.values["RR@10"].tolist() == [1, 1 / 2]
  assert got.values["RR"].tolist() == [1, 1 / 2]
  assert got.values["nDCG@10"].tolist() == pytest.approx([1, 1 / math.log2(3)])


NAMES = ["RR@10", "RR", "R@5", "R@100", "nDCG@10", "AP", "Success@5", "RR(rel=2)@10", "R(rel=2)@20", "AP(rel=2)"]


def test_agrees_with_ir_measures_on_graded_judgements():
  generator = np.random.default_rng(3)
  num_queries, num_passages, depth = 30, 400, 60
  scores = generator.random((num_queries, num_passages)).astype(np.float32)  # no ties
  run = Run.ranked(np.tile(np.arange(num_passages), (num_queries, 1)), scores, depth)
  run.rows[4:6], run.scores[4:6] = -1, -np.inf
  pairs = np.argwhere(generator.random((num_queries, num_passages)) < 0.03)
  pairs = pairs[pairs[:, 0] != 11]
  qrels = Qrels.from_triples(*pairs.T, generator.integers(0, 4, len(pairs)), num_queries)
  got = evaluate(run, qrels, NAMES)

  judgements = [Qrel(f"q{q}", f"p{p}", int(g)) for q in range(num_queries) for p, g in zip(*qrels.of(q), strict=True)]
  docs = [ScoredDoc(f"q{q}", f"p{run.rows[q, i]}", float(run.scores[q, i]))
          for q in range(num_queries) for i in range(depth) if run.rows[q, i] >= 0]  # fmt: skip
  measures = {name: ir_measures.parse_measure(name) for name in NAMES}
  means = ir_measures.calc_aggregate(measures.values(), judgements, docs)
  for name, measure in measures.items():
    assert got.means()[name] == pytest.approx(means[measure], abs=1e-9), name
  each = {(m.query_id, m.measure): m.value for m in ir_measures.iter_calc(measures.values(), judgements, docs)}
  for name, measure in measures.items():
    for query, value in zip(got.queries, got.values[name], strict=True):
      assert value == pytest.approx(each[f"q{query}", measure], abs=1e-9)


@pytest.mark.parametrize("name", ["MRR at 10", "recall@10", "RR(rell=2)@10", "Success"])
def test_unknown_measure_is_named(name):
  qrels = Qrels.from_triples(np.array([0]), np.array([0]), np.array([1]), 1)
  with pytest.raises(InputError, match="measure"):
    evaluate(Run.empty(1, 5), qrels, [name])


def test_no_judged_query_is_an_error():
  nothing = np.zeros(0, np.int64)
  with pytest.raises(InputError, match="no judged query"):
    evaluate(Run.empty(2, 5), Qrels.from_triples(nothing, nothing, nothing, 2), ["RR@10"])


def test_query_with_negative_grades_alone_counts_zero():
  qrels = Qrels.from_triples(np.array([0, 1]), np.array([0, 1]), np.array([-2, 1]), 2)
  run = Run(np.array([[0, 1], [0, 1]], np.int32), np.array([[2, 1], [2, 1]], np.float32))
  got = evaluate(run, qrels, ["RR@10", "nDCG@10", "R@5", "AP"])
  assert all(values.tolist()[0] == 0 < values[1] for values in got.values.values())


def test_bootstrap_interval_is_close_to_the_normal_one():
  values = np.random.default_rng(0).normal(0.5, 0.2, 400)
  low, high = bootstrap_interval(values)
  half = 1.96 * values.std() / 20
  assert low == pytest.approx(values.mean() - half, abs=0.002)
  assert high == pytest.approx(values.mean() + half, abs=0.002)
  assert bootstrap_interval(values) == (low, high)
  assert bootstrap_interval(np.full(5, 0.25)) == bootstrap_interval(np.full(1, 0.25)) == (0.25, 0.25)


def test_randomisation_test_is_scipy_s_and_that_of_all_sign_patterns():
  a, b = np.array([0.9, 0.8, 0.7, 0.9, 0.2, 0.6]), np.array([0.5, 0.9, 0.1, 0.4, 0.1, 0.3])
  signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
  exact = (np.abs(signs @ (a - b)) >= abs((a - b).sum()) - 1e-12).mean()
  assert randomisation_test(a, b) == pytest.approx(exact, abs=0.01)
  generator = np.random.default_rng(0)
  pair = generator.normal(0.5, 0.2, (2, 100)) + [[0], [0.05]]
  drawn = scipy.stats.permutation_test(
    pair, lambda x, y, axis: np.abs((x - y).mean(axis)), permutation_type="samples", vectorized=True, n_resamples=9999,
    alternative="greater", rng=generator,
  )  # fmt: skip
  assert 0.05 < drawn.pvalue < 0.8 and randomisation_test(*pair) == pytest.approx(drawn.pvalue, abs=0.02)
  assert randomisation_test(a, a) == 1.0
  many = np.tile(a, 40), np.tile(b, 40)
  assert randomisation_test(*many) == randomisation_test(*many[::-1]) < 0.001
