"""The cross-encoder: what it scores of a pool and of a run, and what its scores do."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from dptdr_jax import CrossEncoder
from dptdr_jax.core import preemption
from dptdr_jax.data.prepare import Corpus, Split
from dptdr_jax.data.store import TokenStore
from dptdr_jax.pipeline import mine, rerank, train
from dptdr_jax.reranker import probabilities
from dptdr_jax.retrieval.candidates import Pool, Reason
from dptdr_jax.retrieval.runs import Run


def test_dev_figures_are_written(whole):
  lines = [json.loads(line) for line in (whole.workdir / "cross/metrics.jsonl").read_text().splitlines()]
  (figures,) = [{name for name in line if name.startswith("dev/")} for line in lines if "dev/pairs" in line]
  assert figures == {"dev/RR@10", "dev/pairs", "dev/accuracy"}
  encoder = CrossEncoder.load(whole.workdir / "cross/model")
  assert encoder.settings.pair_length == 48 and encoder.spec.length == 4
  assert json.loads((whole.workdir / "cross/facts.json").read_text())["trained"] == encoder.num_parameters


def ranked(path) -> dict[str, list[str]]:
  """Passage ids by query of a run file."""
  lines = [line.split() for line in path.read_text().splitlines()]
  return {query: [line[2] for line in group] for query, group in itertools.groupby(lines, lambda line: line[0])}


def test_first_passages_are_ranked_by_the_encoder_and_the_others_stay(whole):
  first, again = (ranked(whole.workdir / f"evaluate/runs/{name}.dev.trec") for name in ("train2", "reranked"))
  encoder = CrossEncoder.load(whole.workdir / "cross/model")
  queries = {query.id: query.text for query in Split(whole.workdir / "prepare/splits/dev", "dev").queries.read()}
  corpus = {p.id: (p.title, p.text) for p in Corpus(whole.workdir / "prepare/corpus").passages.read()}
  for query, passages in first.items():
    assert sorted(again[query][:10]) == sorted(passages[:10]) and again[query][10:] == passages[10:]
    scores = encoder.score([queries[query]] * 10, [corpus[passage] for passage in again[query][:10]])
    assert (np.diff(scores) <= 1e-6).all()
  assert first != again


def test_passages_surely_relevant_are_told_apart_by_their_logits(whole, tmp_path, monkeypatch):
  node = whole.nodes("reranked_run")[0]
  logits = np.array([[20.0, 25.0, 22.0]], np.float32)
  assert (probabilities(logits) == 1).all()
  run = Run(np.array([[5, 6, 7, 8]], np.int32), np.array([[4.0, 3.0, 2.0, 1.0]], np.float32))
  monkeypatch.setattr(rerank, "logits_of", lambda directory: logits)
  monkeypatch.setattr(rerank, "run_of", lambda ref, making: run)
  rerank.build_reranked(node.inputs, whole.making(node, tmp_path))
  np.testing.assert_array_equal(Run.open(tmp_path / "run").rows, [[6, 7, 5, 8]])


def test_first_candidates_of_a_pool_are_scored_in_shards(whole, tmp_path, monkeypatch):
  node = next(node for node in whole.nodes("pair_scores") if node.inputs.candidates is not None)
  scored = rerank.logits_of(whole.path(node) / "scores")[:]
  pool = Pool.open(whole.store().path(node.inputs.candidates) / "pool")
  kept = pool.kept(slice(None))
  known = ~np.isnan(scored)
  assert scored.shape == pool.rows.shape and not (known & ~kept).any()
  np.testing.assert_array_equal(known.sum(1), np.minimum(kept.sum(1), 5))
  encoder = CrossEncoder.load(whole.workdir / "cross/model")
  stores = [TokenStore(whole.store().path(ref) / "tokens") for ref in (node.inputs.queries, node.inputs.corpus)]
  query, place = np.nonzero(known)
  expected = encoder.logits_stored(*stores, query, pool.rows[query, place])
  np.testing.assert_allclose(scored[query, place], expected, atol=1e-5)

  making, size = whole.making(node, tmp_path / "parts"), pool.rows.shape[1]
  monkeypatch.setattr(rerank, "_SHARD_PAIRS", 6 * size)
  scores = lambda: sorted((tmp_path / "parts/scores").glob("scores-*.npy"))  # noqa: E731
  with monkeypatch.context() as stopped, pytest.raises(preemption.Preempted, match="after 3 of 6 shards"):
    stopped.setattr(preemption, "asked", lambda: len(scores()) == 3)
    rerank.build_scores(node.inputs, making)
  before = {path: path.stat().st_mtime_ns for path in scores()}
  rerank.build_scores(node.inputs, making)
  assert len(scores()) == 6 and before == {path: path.stat().st_mtime_ns for path in before}
  np.testing.assert_allclose(rerank.logits_of(making.directory / "scores")[:], scored, atol=1e-5)


def test_denoising_removes_by_thresholds_and_counts_what_was_not_scored(whole, tmp_path):
  node = whole.node("mine1")
  pool = Pool.open(whole.path(node) / "pool")
  known = probabilities(rerank.logits_of(whole.store().path(node.inputs.scores) / "scores")[:])
  for reason, expected in (
    (Reason.PSEUDO_POSITIVE, known > 0.504), (Reason.CROSS_ENCODER, (known >= 0.5) & (known <= 0.504)),
  ):  # fmt: skip
    np.testing.assert_array_equal(pool.reasons == reason, expected, err_msg=str(reason))
    assert expected.any()
  assert ((pool.reasons == Reason.NOT_SCORED) & ~np.isnan(known)).sum() == 0 < (pool.reasons == Reason.NOT_SCORED).sum()
  inputs = node.inputs.model_copy(update={"thresholds": mine.Thresholds(negative_below=0.0, positive_above=1.0)})
  mine.build_pool(inputs, whole.making(node, tmp_path))
  assert not Pool.open(tmp_path / "pool").kept(slice(None)).any()


def test_pseudo_positives_are_positives_and_nobodys_negatives(whole, tmp_path):
  node, pool = whole.node("train2"), Pool.open(whole.workdir / "mine1/pool")
  making, split = whole.making(node, tmp_path), Split(whole.workdir / "prepare/splits/train", "train")
  groups = train._groups(node.inputs, making, split, 64)
  believed = [pool.pseudo_positives(query) for query in range(len(pool))]
  assert sum(map(len, believed)) > 0
  firsts = set()
  for query, rows in enumerate(believed):
    assert set(rows) <= set(groups.positives(query))
    for epoch in range(4):
      group = groups.group(query, epoch)
      assert not set(group[1:]) & set(rows)
      firsts |= {(query, int(group[0]))} if group[0] in rows else set()
  assert firsts, "some are trained on as positives"
