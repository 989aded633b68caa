"""Candidate pools against a pool that a slow loop makes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval import candidates
from dptdr_jax.retrieval.candidates import Pool, Reason
from dptdr_jax.retrieval.merge import Source, pool_from_runs
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import Run, write_run

NONE = np.zeros(0, np.int64)


def random_run(seed: int, queries: int, passages: int, depth: int) -> Run:
  generator = np.random.default_rng(seed)
  rows = np.stack([generator.permutation(passages)[:depth] for _ in range(queries)])
  rows[generator.random(rows.shape) < 0.2] = -1
  rows[0] = -1  # a query that no source answers
  return Run.ranked(rows, generator.normal(size=rows.shape))


def no_positives(queries: int) -> Qrels:
  return Qrels.from_triples(NONE, NONE, NONE, queries)


def by_hand(sources, positives, query):
  """[(row, sources that contribute it, {source: (rank, score)})] in the pool's order; the positives' best scores."""
  relevant = {int(row) for row, grade in zip(*positives.of(query), strict=True) if grade > 0}
  known, given, best = {}, {}, {}
  for number, source in enumerate(sources.values()):
    for rank, row in enumerate(source.run.rows[query, : source.depth].tolist()):
      score = source.run.scores[query, rank]
      if row >= 0 and row in relevant:
        best[number] = max(best.get(number, -np.inf), score)
      elif row >= 0:
        known.setdefault(row, {})[number] = (rank, score)
        if rank >= source.first:
          given.setdefault(row, {})[number] = rank - source.first
  order = sorted(given, key=lambda row: min((place, number) for number, place in given[row].items()))
  return [(row, set(given[row]), known[row]) for row in order], best


@pytest.mark.parametrize(
  "options", [[{}, {}, {}], [{"first": 2}, {}, {"first": 4}], [{"depth": 12, "first": 3}, {"depth": 1}, {"depth": 30}]]
)
def test_pool_is_that_of_a_slow_loop(tmp_path, monkeypatch, options):
  monkeypatch.setattr(candidates, "BLOCK_ENTRIES", 170)  # a few queries a block
  queries, depth = 20, 8
  sources = {
    name: Source(random_run(seed, queries, 30, 12), **{"depth": depth, **options[seed]})
    for seed, name in enumerate(["bm25", "dense", "other"])
  }
  pairs = np.argwhere(np.random.default_rng(9).random((queries, 30)) < 0.15)
  positives = Qrels.from_triples(*pairs.T, np.arange(len(pairs)) % 3, queries)
  pool = pool_from_runs(tmp_path / "pool", sources, positives)
  assert pool.names == ("bm25", "dense", "other")
  assert pool.rows.shape == (queries, sum(source.depth - source.first for source in sources.values()))
  assert isinstance(pool.rows.base, np.memmap) and not pool.reasons.any()
  for query in range(queries):
    expected, best = by_hand(sources, positives, query)
    assert pool.candidates(query).tolist() == [row for row, _, _ in expected]
    assert (pool.rows[query, len(expected) :] == -1).all() and (pool.sources[query, len(expected) :] == 0).all()
    np.testing.assert_array_equal(
      pool.positive_scores[query], np.array([best.get(number, np.nan) for number in range(3)], np.float32)
    )
    for place, (_, given, of) in enumerate(expected):
      assert pool.sources[query, place] == sum(1 << source for source in given)
      for source in range(3):
        rank, score = of.get(source, (-1, -np.inf))
        assert pool.ranks[query, place, source] == rank
        assert pool.scores[query, place, source] == score
    scores, positive = pool.candidate_scores(query, "dense")
    np.testing.assert_array_equal(scores, pool.scores[query, : len(expected), 1])
    np.testing.assert_equal(positive, float(pool.positive_scores[query, 1]))
  assert len(pool) == queries and not len(pool.candidates(0))
  assert pool.manifest["unanswered"]["bm25"] >= 1


def test_manifest_counts_candidates_and_removed_positives(tmp_path):
  rows = np.array([[0, 1, 2], [3, -1, -1]], np.int32)
  scores = np.array([[3, 2, 1], [1, -np.inf, -np.inf]], np.float32)
  dense = Run(np.roll(rows, 1, 1)[:, [1, 0, 2]], scores)
  sources = {"bm25": Source(Run(rows, scores), 2), "dense": Source(dense, 2, first=1)}
  positives = Qrels.from_triples(np.array([0, 1]), np.array([2, 3]), np.array([1, 1]), 2)
  manifest = pool_from_runs(tmp_path / "p", sources, positives).manifest
  # bm25 has 0, 1 | 3, dense 0, 2 | 3 and its first rank is skipped; the positives 2 and 3 are left out
  assert manifest["counts"] == {"candidates": 2, "positives removed": 2, "queries without a candidate": 1}
  assert manifest["combinations"] == {"bm25": 2} and (manifest["denoising"], manifest["kept"]) == ([], 2)
  assert manifest["unanswered"] == {"bm25": 0, "dense": 0}


def test_query_that_a_source_lacks_stays_in_the_pool(tmp_path):
  largest = 2**31 - 1  # a row that is no fill
  full = Run(np.array([[4, 5], [largest, 0]], np.int32), np.array([[2, 1], [2, 1]], np.float32))
  sources = {"file": Source(Run.empty(2, 0), 9), "bm25": Source(full, 2)}
  pool = pool_from_runs(tmp_path / "p", sources, no_positives(2))
  assert [pool.candidates(query).tolist() for query in range(2)] == [[4, 5], [largest, 0]]
  assert pool.manifest["unanswered"] == {"file": 2, "bm25": 0}


def test_runs_on_disk_and_given_positive_scores(tmp_path):
  run = random_run(3, 9, 30, 12)
  mapped = write_run(tmp_path / "run", 9, 12, lambda part: Run(run.rows[list(part)], run.scores[list(part)]), size=4)
  known = np.arange(9, dtype=np.float32)
  known[2:4] = np.nan, -np.inf
  pool = pool_from_runs(tmp_path / "p", {"a": Source(mapped, 8, positive_scores=known)}, no_positives(9))
  np.testing.assert_array_equal(pool.positive_scores[:, 0], [0, 1, np.nan, np.nan, 4, 5, 6, 7, 8])
  again = pool_from_runs(tmp_path / "q", {"a": Source(run, 8)}, no_positives(9))
  np.testing.assert_array_equal(pool.rows, again.rows)
  assert np.isnan(again.positive_scores).all()


def test_reasons_remove_candidates():
  rows = np.array([[5, 6, 7, 8, -1]], np.int32)
  reasons = np.array([[0, Reason.SAME_TEXT, Reason.PSEUDO_POSITIVE, 0, 0]], np.uint8)
  scores = np.array([[9, 8, 7, 6, -np.inf]], np.float32)[..., None]
  unknown = np.full((1, 1), np.nan, np.float32)
  pool = Pool(rows, (rows >= 0).astype(np.uint16), scores, np.zeros((1, 5, 1), np.int16), reasons, unknown, ("a",))
  assert pool.candidates(0).tolist() == [5, 8] and pool.pseudo_positives(0).tolist() == [7]
  assert pool.candidate_scores(0, "a")[0].tolist() == [9, 6] and np.isnan(pool.candidate_scores(0, "a")[1])
  assert pool.kept(slice(0, 1)).tolist() == [[True, False, False, True, False]]
  with pytest.raises(InputError, match="no such source in the pool: 'b'. There are a"):
    pool.candidate_scores(0, "b")


@pytest.mark.parametrize(("depth", "first"), [(40_000, 0), (5, 5)])
def test_impossible_ranks_are_named(depth, first):
  with pytest.raises(InputError, match=rf"first < depth ≤ 32767: \({first}, {depth}\)"):
    Source(random_run(0, 4, 10, 5), depth, first=first)


@pytest.mark.parametrize("name", ["rows", "sources", "scores", "ranks", "reasons", "positive_scores"])
def test_damage_names_the_file(tmp_path, name):
  pool_from_runs(tmp_path, {"a": Source(random_run(0, 4, 10, 5), 5)}, no_positives(4))
  path = tmp_path / f"{name}.npy"
  whole = path.read_bytes()
  for damaged in (whole[:-1], whole[:30], b"", whole.replace(b"(4", b"(3"), whole.replace(b"'<", b"'>"), None):
    if damaged != whole:  # the order of bytes is not said of a byte
      path.unlink() if damaged is None else path.write_bytes(damaged)
      with pytest.raises(InputError) as error:
        Pool.open(tmp_path)
      assert error.value.path == path


def test_damaged_manifest_is_named(tmp_path):
  pool_from_runs(tmp_path, {"a": Source(random_run(0, 4, 10, 5), 5)}, no_positives(4))
  path = tmp_path / "manifest.json"
  whole = json.loads(path.read_text())
  for damaged in ([], whole | {"format": 1}, whole | {"sources": "a"}, whole | {"width": -1}, whole | {"queries": "4"}):
    path.write_text(json.dumps(damaged))
    with pytest.raises(InputError) as error:
      Pool.open(tmp_path)
    assert error.value.path == path
  path.unlink()
  with pytest.raises(InputError, match="no such file"):
    Pool.open(tmp_path)
