"""Candidate pools against a pool made by hand with dictionaries."""

import numpy as np
import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval import candidates
from dptdr_jax.retrieval.candidates import Pool, pool_from_runs
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import Run


def random_run(seed: int, queries: int, passages: int, depth: int) -> Run:
  generator = np.random.default_rng(seed)
  rows = np.stack([generator.permutation(passages)[:depth] for _ in range(queries)])
  rows[generator.random(rows.shape) < 0.2] = -1
  rows[0] = -1  # a query that nobody answers
  return Run.ranked(rows, generator.normal(size=rows.shape))


def by_hand(runs, positives, query, depth):
  relevant = {int(row) for row, grade in zip(*positives.of(query), strict=True) if grade > 0}
  found = {}
  for source, run in enumerate(runs.values()):
    for rank, row in enumerate(run.rows[query, :depth].tolist()):
      if row >= 0 and row not in relevant:
        found.setdefault(row, {})[source] = (rank, run.scores[query, rank])
  order = sorted(found, key=lambda row: min((rank, source) for source, (rank, _) in found[row].items()))
  return [(row, found[row]) for row in order]


@pytest.mark.parametrize("width", [None, 5])
def test_pool_is_the_one_made_by_hand(tmp_path, monkeypatch, width):
  monkeypatch.setattr(candidates, "_BLOCK", 7)
  queries, depth = 20, 8
  runs = {name: random_run(seed, queries, 30, 12) for seed, name in enumerate(["bm25", "dense", "other"])}
  pairs = np.argwhere(np.random.default_rng(9).random((queries, 30)) < 0.15)
  positives = Qrels.from_triples(*pairs.T, np.arange(len(pairs)) % 3, queries)
  pool = pool_from_runs(tmp_path / "pool", runs, positives, depth=depth, width=width)
  assert pool.names == ("bm25", "dense", "other")
  assert pool.rows.shape == (queries, width or depth * 3)
  assert isinstance(pool.rows, np.memmap)
  for query in range(queries):
    expected = by_hand(runs, positives, query, depth)[: pool.rows.shape[1]]
    assert pool.candidates(query).tolist() == [row for row, _ in expected]
    assert (pool.rows[query, len(expected) :] == -1).all() and (pool.sources[query, len(expected) :] == 0).all()
    for place, (_, of) in enumerate(expected):
      assert pool.sources[query, place] == sum(1 << source for source in of)
      for source in range(3):
        rank, score = of.get(source, (-1, -np.inf))
        assert pool.ranks[query, place, source] == rank
        assert pool.scores[query, place, source] == score
  assert len(pool) == queries and not len(pool.candidates(0))


def test_counts_tell_what_happened(tmp_path):
  rows = np.array([[0, 1, 2], [3, -1, -1]], np.int32)
  scores = np.array([[3, 2, 1], [1, -np.inf, -np.inf]], np.float32)
  runs = {"bm25": Run(rows, scores), "dense": Run(np.roll(rows, 1, 1)[:, [1, 0, 2]], scores)}
  positives = Qrels.from_triples(np.array([0, 1]), np.array([2, 3]), np.array([1, 1]), 2)
  manifest = pool_from_runs(tmp_path / "p", runs, positives, depth=2).manifest
  # bm25: 0, 1 | 3    dense: 0, 2 | 3; the positives 2 and 3 go
  assert manifest["counts"] == {"candidates": 2, "positives removed": 3, "queries without a candidate": 1}
  assert manifest["combinations"] == {"bm25": 1, "bm25 + dense": 1}


def test_the_largest_row_keeps_its_place(tmp_path):
  run = Run(np.array([[2**31 - 1, 0]], np.int32), np.array([[2, 1]], np.float32))
  nothing = np.zeros(0, np.int64)
  pool = pool_from_runs(tmp_path / "p", {"a": run}, Qrels.from_triples(nothing, nothing, nothing, 1), depth=2)
  assert pool.candidates(0).tolist() == [2**31 - 1, 0]


def test_bad_arguments_and_damage_are_named(tmp_path):
  run = random_run(0, 4, 10, 5)
  nothing = np.zeros(0, np.int64)
  positives = Qrels.from_triples(nothing, nothing, nothing, 4)
  with pytest.raises(InputError, match="1 to 16 sources"):
    pool_from_runs(tmp_path / "p", {str(i): run for i in range(17)}, positives, depth=5)
  with pytest.raises(InputError, match="depths 1 to 32767"):
    pool_from_runs(tmp_path / "p", {"a": run}, positives, depth=40_000)
  with pytest.raises(ValueError, match="runs of"):
    pool_from_runs(tmp_path / "p", {"a": random_run(0, 3, 10, 5)}, positives, depth=5)
  pool_from_runs(tmp_path / "p", {"a": run}, positives, depth=5)
  path = tmp_path / "p" / "scores.npy"
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(InputError, match="not whole"):
    Pool.open(tmp_path / "p")
  with pytest.raises(InputError, match="no such file"):
    Pool.open(tmp_path / "none")
