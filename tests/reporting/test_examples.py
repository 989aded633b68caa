"""Which queries a report shows."""

import types

import numpy as np
import pytest

from dptdr_jax.reporting import examples


@pytest.fixture
def choose(passages, split_of):
  def chosen(positives, rows, count):
    rows = np.array(rows, np.int32)
    run = types.SimpleNamespace(rows=rows, scores=np.where(rows < 0, -np.inf, 2.0 - np.arange(rows.shape[1])))
    return examples.choose(split_of(*positives), passages, run, count)

  return chosen


def test_half_of_the_queries_are_right_where_there_are_enough(choose):
  chosen = choose([[0]] * 6 + [[1]] * 2, [[0, 1]] * 8, 4)
  assert [(one["query"][6], one["right"]) for one in chosen] == [("0", True), ("3", True), ("6", False), ("7", False)]
  assert sum(one["right"] for one in choose([[0]] * 6 + [[1]], [[0, 1]] * 7, 4)) == 3
  assert len(choose([[0]] * 3, [[0, 1]] * 3, 12)) == 3


def test_an_example_has_the_rank_and_the_wanted_passage(choose):
  ranked, missing, unjudged = choose([[4, 3], [7], []], [[1, 2, 0, 3], [0, 1, -1, -1], [0, 1, 2, 3]], 3)
  assert (ranked["rank"], ranked["right"], ranked["wanted"]["id"]) == (4, False, "p4")
  assert [(hit["id"], hit["relevant"]) for hit in ranked["top"]] == [("p1", False), ("p2", False), ("p0", False)]
  assert missing["rank"] is None and [hit["score"] for hit in missing["top"]] == [2.0, 1.0], "fills are left out"
  assert unjudged["wanted"] is None and not unjudged["right"]
