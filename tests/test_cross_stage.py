"""The stage: it learns a toy task, a resumed run ends the same, pools are scored by shards that outlive a kill."""

from __future__ import annotations

import importlib
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
from support import tiny

from dptdr_jax import CrossEncoder, pipeline
from dptdr_jax.core import preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.preemption import Preempted
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.reranker import probabilities
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.retrieval.merge import Source, pool_from_runs
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.stages import common, cross
from dptdr_jax.stages.layout import Layout

ROOT = pathlib.Path(__file__).parents[1]


def write_data(directory: pathlib.Path) -> None:
  """What is relevant starts with one word, what is not with another; the rest is the query's words either way."""
  (directory / "qrels").mkdir(parents=True)
  generator = np.random.default_rng(0)
  drawn = [text.split() for _, text in tiny.sentences(16, 6, seed=3)]
  corpus = [{"_id": f"p{row}", "title": "", "text": " ".join(["prime", *words])} for row, words in enumerate(drawn)]
  for row in range(80):
    words = generator.permutation(drawn[row % 16])
    corpus.append({"_id": f"n{row}", "title": "", "text": " ".join(["socket", *words])})
  (directory / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in corpus))
  lines = {"train": [], "dev": []}
  with open(directory / "queries.jsonl", "w", encoding="utf-8") as stream:
    for number in range(48):
      words = generator.permutation(drawn[number % 16])[:3]
      stream.write(json.dumps({"_id": f"q{number}", "text": " ".join(words)}) + "\n")
      lines["dev" if number % 3 == 0 else "train"].append(f"q{number}\tp{number % 16}\t1\n")
  for split, judged in lines.items():
    (directory / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(config, workdir) with prepare, a pool of BM25's, and cross done."""
  sys.path.insert(0, str(ROOT))
  directory = tmp_path_factory.mktemp("cross")
  write_data(directory / "data")
  config = importlib.import_module("configs.beir").get_config()
  config.backbone.path = str(tiny.backbone(directory / "backbone"))
  config.data.dir = str(directory / "data")
  config.text.query_length, config.text.passage_length, config.prompt.length = 8, 20, 4
  config.cross.update(
    head="first",  # what tells the passages apart is no word of the query
    steps=40, queries=8, passages=4, pair_length=20, length=4, chunk=2, learning_rate=0.01, backbone_dropout=0.0,
    checkpoint_every=10, evaluate_every=20, evaluate_queries=12, evaluate_passages=6, log_every=5, depth=5,
  )  # fmt: skip
  pipeline.run(config, directory / "work", ["prepare"])
  layout = Layout.of(directory / "work")
  data = PreparedData(layout.prepared)
  found = common.bm25(layout, data).search([query.text for query in data.splits["train"].queries.read()], 12)
  pool_from_runs(layout.pool(0), {"bm25": Source(found, 12)}, common.qrels(data.splits["train"]))
  cross.run(config, directory / "work")
  return config, directory / "work"


def dev_figures(workdir):
  lines = [json.loads(line) for line in (workdir / "cross/metrics.jsonl").read_text().splitlines()]
  return [{name: line[name] for name in line if name.startswith("dev/")} for line in lines if "dev/pairs" in line]


def test_it_learns_above_chance(finished):
  _, workdir = finished
  figures = dev_figures(workdir)
  assert len(figures) == 2 and set(figures[0]) == {"dev/RR@10", "dev/pairs", "dev/accuracy"}
  assert figures[-1]["dev/pairs"] > 0.7, "chance is .5"
  encoder = CrossEncoder.load(workdir / "cross/model")
  assert encoder.settings.pair_length == 20 and encoder.spec.length == 4
  query = "merge quick heap"
  relevant, other = encoder.score([query] * 2, [f"prime {query}", f"socket {query}"])
  assert relevant > other


def test_its_negatives_may_be_the_best_of_a_pool_alone(finished):
  config, workdir = finished
  layout, config = Layout.of(workdir), config.copy_and_resolve_references()
  data, pool, backbone = PreparedData(layout.prepared), Pool.open(layout.pool(0)), common.load_backbone(config, layout)

  def places(last: int) -> set[int]:
    config.cross.sample_last = last
    rows = cross.make_batches(config, layout, data, backbone).rows(3)
    return {pool.candidates(query).tolist().index(row)
            for query, group in zip(rows.queries, rows.passages, strict=True) for row in group[1:]}  # fmt: skip

  assert max(places(0)) > 4 and places(4) == {0, 1, 2, 3}


def test_a_resumed_run_ends_the_same(finished, monkeypatch, tmp_path):
  config, workdir = finished
  shutil.copytree(workdir / "prepare", tmp_path / "prepare")
  shutil.copytree(workdir / "mine0", tmp_path / "mine0")
  asked = iter([False] * 24 + [True] * 10)
  monkeypatch.setattr(preemption, "asked", lambda: next(asked))
  with pytest.raises(Preempted):
    cross.run(config, tmp_path)
  monkeypatch.undo()
  cross.run(config, tmp_path)
  for name in ("model/prompts.safetensors", "metrics.jsonl"):
    assert (tmp_path / "cross" / name).read_bytes() == (workdir / "cross" / name).read_bytes(), name


def test_passages_that_are_sure_to_be_relevant_are_told_apart_by_their_logits(finished, monkeypatch):
  config, workdir = finished
  config = config.copy_and_resolve_references()
  config.cross.rerank = 3
  logits = np.array([[20.0, 25.0, 22.0]], np.float32)
  assert (probabilities(logits) == 1).all()
  monkeypatch.setattr(cross, "score_rows", lambda *arguments: logits)
  found = Run(np.array([[5, 6, 7, 8]], np.int32), np.array([[4.0, 3.0, 2.0, 1.0]], np.float32))
  again = cross.rerank(config, Layout.of(workdir), found, "train")
  np.testing.assert_array_equal(again.rows, [[6, 7, 5, 8]])


def test_a_pool_is_scored_by_shards(finished, monkeypatch, tmp_path):
  config, workdir = finished
  layout = Layout.of(workdir)
  pool = Pool.open(layout.pool(0))
  shared = cross.common.load_backbone(config, layout)
  whole = cross.score_pool(config, layout, pool, tmp_path / "whole", shared)[:]
  assert whole.shape == pool.rows.shape and whole.dtype == np.float32
  scored = ~np.isnan(whole)
  assert (scored.sum(1) == np.minimum((pool.rows >= 0).sum(1), 5)).all()
  encoder = CrossEncoder.load(cross.model_of(layout))
  stores = [cross.TokenStore(layout.store(part)) for part in ("train", "corpus")]
  query, place = np.nonzero(scored)
  direct = probabilities(encoder.logits_stored(*stores, query, pool.rows[query, place]))
  np.testing.assert_allclose(whole[query, place], direct, rtol=1e-5)

  monkeypatch.setattr(cross, "_SHARD_PAIRS", 30)  # 6 queries
  with monkeypatch.context() as stopped, pytest.raises(Preempted, match="query 18 of 32"):
    stopped.setattr(preemption, "asked", lambda: len(list((tmp_path / "parts").glob("*.npy"))) == 3)
    cross.score_pool(config, layout, pool, tmp_path / "parts", shared)
  before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.npy")}
  assert len(before) == 3
  parts = cross.score_pool(config, layout, pool, tmp_path / "parts", shared)
  assert parts.shape == whole.shape
  for block in (slice(None), slice(0, 0), slice(5, 6), slice(6, 12), slice(4, 31), slice(30, 40)):
    np.testing.assert_allclose(parts[block], whole[block], rtol=1e-5)
  with monkeypatch.context() as two:  # processes, which take turns: the first leaves what the second has made
    two.setattr(cross.hosts, "process_count", lambda: 2)
    waits = []
    (tmp_path / "shared").mkdir()  # begun by the first
    shutil.copy(tmp_path / "parts/scores.json", tmp_path / "shared")
    two.setattr(cross.hosts, "barrier", waits.append)
    two.setattr(cross.hosts, "first_says", lambda make: [0, 6, 12, 18, 24, 30])  # nothing was there for the first
    for index, made in ((1, [6, 18, 30]), (0, [0, 6, 12, 18, 24, 30])):
      two.setattr(cross.hosts, "process_index", lambda index=index: index)
      parts = cross.score_pool(config, layout, pool, tmp_path / "shared", shared, together=True)
      assert (parts is None) == (index == 1)
      assert sorted(int(path.stem.split("-")[1]) for path in (tmp_path / "shared").glob("*.npy")) == made
    assert len(waits) == 4
  np.testing.assert_allclose(parts[:], whole, rtol=1e-5)
  after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.npy")}
  assert len(after) == 6 and before.items() <= after.items()
  np.testing.assert_array_equal(
    np.isnan(cross.score_rows(encoder, *stores, pool.rows[:, :2], tmp_path / "parts")[:]), pool.rows[:, :2] < 0
  )
  assert len(list((tmp_path / "parts").glob("*.npy"))) == 3, "scores of other candidates do not stay"


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"negatives": "own"}, "unknown cross.negatives"),
    ({"passages": 1}, "a positive and others beside it"),
    ({"pair_length": 9}, "no room beside queries"),
    ({"pair_length": 600}, "tokens that are stored"),
    ({"pair_length": 120}, "don't fit the backbone's"),
  ],
)
def test_what_cannot_work_is_said_before_any_work(finished, fields, message):
  config = finished[0].copy_and_resolve_references()
  config.cross.update(fields)
  with pytest.raises(InputError, match=message):
    cross.check(config, EncoderConfig.from_file(pathlib.Path(config.backbone.path) / "config.json"))
