"""Train, mine, train: pools of several sources, what follows from them, and what is not done twice."""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
from support import tiny

from dptdr_jax import pipeline
from dptdr_jax.backbone import Backbone
from dptdr_jax.core import preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.prepare import PreparedData, PreparedSplit
from dptdr_jax.reranker import CrossEncoder
from dptdr_jax.retrieval.bm25 import Bm25
from dptdr_jax.retrieval.candidates import Pool, Reason
from dptdr_jax.retrieval.denoise import MarginRule
from dptdr_jax.retriever import Retriever
from dptdr_jax.stages import common, mine, negatives_shown, search, steps
from dptdr_jax.stages.layout import Layout

ROOT = pathlib.Path(__file__).parents[1]


def make_config(directory: pathlib.Path, **fields):
  """configs/beir.py in two rounds on the tiny corpus; `fields` are set by dotted names with '__' for '.'."""
  sys.path.insert(0, str(ROOT))  # the configs import configs.base, as they do from the repository's root
  config = importlib.import_module("configs.beir").get_config()
  if not (directory / "data").exists():
    tiny.beir(directory / "data")
    tiny.backbone(directory / "backbone")
  config.backbone.path, config.data.dir = str(directory / "backbone"), str(directory / "data")
  config.prompt.length, config.text.passage_length, config.rounds = 4, 32, 2
  config.train.update({"steps": 4, "queries": 8, "evaluate_every": 2, "log_every": 1, "learning_rate": 0.01})
  config.train.negatives = "random"
  config.mine.dense.update({"depth": 20, "relative_margin": 0.99})
  config.mine.bm25.depth = 10
  config.evaluate.update({"examples": 3, "measures": ("RR@10", "R@100"), "backbone": False})
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in fields.items()})
  return config


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp("rounds")


@pytest.fixture(scope="module")
def finished(directory):
  """(config, workdir) of a run that has ended."""
  config = make_config(directory)
  pipeline.run(config, directory / "work")
  return config, directory / "work"


def prompts(workdir: pathlib.Path, number: int) -> bytes:
  return (workdir / f"train{number}/retriever/prompts.safetensors").read_bytes()


def test_both_rounds_are_measured_and_shown(finished):
  _, workdir = finished
  assert list(json.loads((workdir / "results.json").read_text())) == ["bm25", "train1", "train2"]
  assert prompts(workdir, 1) != prompts(workdir, 2)
  page = (workdir / "report.html").read_text()
  for words in ("Training, round 2", "Negatives of round 2", "dense: score over the positive", "from bm25 + dense"):
    assert words in page
  about = json.loads((workdir / "mine1/mining.json").read_text())
  assert about["sources"] == ["bm25", "dense"] and len(about["examples"]) == 12
  assert sum(step["removed"].get("RELATIVE_MARGIN", {}).get("all", 0) for step in about["denoising"]) > 0


def test_the_pool_holds_what_its_sources_found_and_no_positive(finished, directory):
  config, workdir = finished
  pool = Pool.open(workdir / "mine1/pool")
  retriever = Retriever.load(workdir / "train1/retriever")
  queries = [json.loads(line) for line in (directory / "data/queries.jsonl").read_text().splitlines()]
  with gzip.open(directory / "data/corpus.jsonl.gz", "rt") as stream:
    corpus = [json.loads(line) for line in stream]
  rows = {passage["_id"]: row for row, passage in enumerate(corpus)}
  judged = [line.split("\t") for line in (directory / "data/qrels/train.tsv").read_text().splitlines()[1:]]
  asked = [query for query in queries if query["_id"] in {line[0] for line in judged}]
  scores = retriever.encode_queries([query["text"] for query in asked])
  scores = scores @ retriever.encode_passages([(p.get("title", ""), p["text"]) for p in corpus]).T
  assert len(pool) == len(asked)
  for number, query in enumerate(asked):
    positives = [rows[line[1]] for line in judged if line[0] == query["_id"]]
    assert not set(pool.rows[number].tolist()) & set(positives)
    assert pool.positive_scores[number, 1] == pytest.approx(scores[number, positives].max(), abs=1e-4)
    there = pool.rows[number] >= 0
    known = there & (pool.ranks[number, :, 1] >= 0)
    assert known.sum() >= 20 - len(positives)
    np.testing.assert_allclose(pool.scores[number, known, 1], scores[number, pool.rows[number, known]], atol=1e-4)


def test_the_corpus_is_not_encoded_twice(finished):
  _, workdir = finished
  mined, encoded = (workdir / place / "corpus" for place in ("mine1/vectors", "encode/train1"))
  assert [file.samefile(encoded / file.name) for file in sorted(mined.glob("*.npy"))] == [True, True]


def test_a_rerun_does_nothing_and_another_margin_only_what_follows(finished, tmp_path):
  config, workdir = finished[0], tmp_path / "work"
  shutil.copytree(finished[1], workdir)
  before = {path: path.stat().st_mtime_ns for path in workdir.glob("*/manifest.json")}
  pipeline.run(config, workdir)
  assert {path: path.stat().st_mtime_ns for path in before} == before
  changed = config.copy_and_resolve_references()
  changed.mine.dense.relative_margin = 0.9
  found = [workdir / "mine1" / name for name in ("vectors/corpus/vectors-00000.npy", "runs/dense", "runs/bm25")]
  kept = [path.stat().st_ino for path in found]
  pipeline.run(changed, workdir)
  anew = {path.parent.name for path in before if path.stat().st_mtime_ns != before[path]}
  assert anew == {"mine1", "train2", "encode", "evaluate", "report"}
  assert [path.stat().st_ino for path in found] == kept, "the margin chooses among what was found"
  pipeline.run(changed, tmp_path / "alone", ["prepare", "train1", "mine1"])
  reasons = [np.load(path / "mine1/pool/reasons.npy") for path in (workdir, tmp_path / "alone", finished[1])]
  np.testing.assert_array_equal(reasons[0], reasons[1])
  assert (reasons[0] != reasons[2]).any()
  changed.mine.dense.depth, encoded = 10, "train1/corpus of encode"  # train2 will be another
  shared = pipeline.share(changed, tmp_path / "deeper", [workdir])
  assert shared == ["prepare", "train1", "vectors and runs/bm25 of mine1", encoded]
  changed.mine.dense.update({"depth": 20, "relative_margin": 0.5})
  shared = pipeline.share(changed, tmp_path / "other", [workdir])
  assert shared == ["prepare", "train1", "vectors and runs/bm25 and runs/dense of mine1", encoded]
  pipeline.run(changed, tmp_path / "other", ["mine1"])
  assert (tmp_path / "other/mine1/vectors/corpus/vectors-00000.npy").samefile(found[0])


def test_a_round_may_go_on_with_the_prompts_of_the_one_before(finished, directory, tmp_path, monkeypatch):
  made, make = [], steps.make_train_step
  monkeypatch.setattr(steps, "make_train_step", lambda *args, **options: made.append(1) or make(*args, **options))
  config = make_config(directory, train__restart=False, train__steps=1, train__learning_rate=1e-9)
  pipeline.run(config, tmp_path / "work", ["prepare", "train", "mine"])
  assert len(made) == 1, "both rounds have the same step: it is compiled once"
  one, two = (Retriever.load(tmp_path / f"work/train{number}/retriever") for number in (1, 2))
  np.testing.assert_allclose(two.prompts["query"]["table"], one.prompts["query"]["table"], atol=1e-6)


def test_further_retrievers_and_an_index_in_three_rounds(directory, tmp_path):
  config = make_config(directory, rounds=3, mine__retrievers=("backbone", "train1"), train__refresh_every=2)
  config.evaluate.backbone = True
  config.index.update({"factory": "IVF4,Flat", "search_parameters": "nprobe=4"})  # all lists: exact
  pipeline.run(config, tmp_path, ["prepare", "train", "mine", "encode"])
  pools = [Pool.open(tmp_path / f"mine{number}/pool") for number in (1, 2)]
  assert [pool.names for pool in pools] == [("bm25", "dense", "backbone"), ("bm25", "dense", "backbone", "train1")]
  for one, other in (
    ("mine1", "mine2/retrievers/train1"), ("mine1/retrievers/backbone", "mine2/retrievers/backbone"),
    ("train1/retrievers/backbone", "mine1/retrievers/backbone"),
  ):  # fmt: skip
    vectors = tmp_path / one / "vectors/corpus/vectors-00000.npy"
    assert vectors.samefile(tmp_path / other / "vectors/corpus" / vectors.name) and (tmp_path / one / "index").exists()
  assert vectors.samefile(tmp_path / "encode/backbone/corpus" / vectors.name), "encoded once for all"
  for later in ("mine1", "mine2"):
    assert (tmp_path / "train1/runs/bm25/rows.npy").samefile(tmp_path / later / "runs/bm25/rows.npy"), "searched once"
  np.testing.assert_array_equal(pools[1].positive_scores[:, 3], pools[0].positive_scores[:, 1])

  untuned = Retriever.untuned(Backbone.load(config.backbone.path), **config.vector, **config.text)
  data = PreparedData(tmp_path / "prepare/text")
  scores = untuned.encode_queries([query.text for query in data.splits["train"].queries.read()])
  scores = scores @ untuned.encode_passages([(p.title, p.text) for p in data.passages.read()]).T
  queries, places = np.nonzero(pools[1].ranks[:, :, 2] >= 0)
  expected = scores[queries, pools[1].rows[queries, places]]
  np.testing.assert_allclose(pools[1].scores[queries, places, 2], expected, atol=1e-4)
  assert (np.bincount(queries) >= 20 - 3).all()


def test_runs_from_elsewhere_are_sources(finished, directory, tmp_path):
  query = (directory / "data/qrels/train.tsv").read_text().splitlines()[1].split("\t")[0]
  (tmp_path / "other.trec").write_text(f"{query} Q0 p3 1 9.5 other\n{query} Q0 p4 2 9.0 other\n")
  path = str(tmp_path / "other.trec")
  config = make_config(directory, mine__runs=(path,), mine__dense__depth=0, mine__bm25__depth=0)
  pipeline.run(config, tmp_path / "work", ["prepare", "train", "mine"])
  pool = Pool.open(tmp_path / "work/mine1/pool")
  assert pool.names == ("other.trec",) and pool.manifest["unanswered"]["other.trec"] == len(pool) - 1
  (tmp_path / "other.trec").write_text(f"{query} Q0 nowhere 1 9.5 other\n")
  with pytest.raises(InputError, match="nowhere"):
    pipeline.run(config, tmp_path / "work", ["mine"])


@pytest.fixture(scope="module")
def prepared(directory):
  """(config, workdir) of one round on BM25's negatives, nothing but the data made."""
  config = make_config(directory, rounds=1, train__negatives="bm25")
  pipeline.run(config, directory / "prepared", ["prepare"])
  return config, directory / "prepared"


def begin(prepared, workdir: pathlib.Path) -> Layout:
  shutil.copytree(prepared[1] / "prepare", workdir / "prepare")
  return Layout.of(workdir)


def test_margins_on_runs_from_elsewhere_and_what_is_told_of_them(prepared, tmp_path, caplog):
  config, layout = prepared[0].copy_and_resolve_references(), begin(prepared, tmp_path / "work")
  split = PreparedData(layout.prepared).splits["train"]
  query, positive = split.ids[0], int(split.positives(0)[0])
  others = [row for row in range(9) if row not in split.positives(0)][:3]
  found = zip([others[0], positive, *others[1:]], (9, 8, 7.9, 7), strict=True)
  lines = [f"{query} Q0 p{row} 1 {score} other\n" for row, score in found]
  for number in (1, 2):
    other = next(row for row in range(9) if row not in split.positives(number))
    lines.append(f"{split.ids[number]} Q0 p{other} 1 9 other\n")
  (tmp_path / "other.trec").write_text("".join([*lines, "unjudged Q0 p0 1 9 other\n"]))
  config.mine.runs = (str(tmp_path / "other.trec"),)
  config.mine.outside.relative_margin, config.mine.same_text = 0.95, False
  mine.run(config, layout.root)
  pool = Pool.open(layout.pool(0))
  assert pool.names == ("bm25", "other.trec")
  removed = pool.rows[0][pool.reasons[0] == Reason.RELATIVE_MARGIN]
  assert sorted(removed.tolist()) == others[:2] and not (pool.reasons[1:] == Reason.RELATIVE_MARGIN).any()
  told = "other.trec finds no positive for 67% of the queries that it answers"
  about = json.loads((layout.mine(0) / "mining.json").read_text())
  assert [line for line in about["warnings"] if line.startswith(told)] and told in caplog.text
  page = negatives_shown.section("Negatives", about)
  assert f"<p class=warning>{told}" in page and page.count("<small>other.trec: relative margin ·") == 2


def test_of_a_margin_the_source_is_told():
  rules = [MarginRule("bm25", relative=0.9, absolute=3.0), MarginRule("dense", relative=0.9)]
  scores = np.array([[[9.5, 0.99], [8, 0.99], [5, 0.99], [-np.inf, 0.99], [5, 0.5]]], np.float32)
  relative, absolute = Reason.RELATIVE_MARGIN, Reason.ABSOLUTE_MARGIN
  pool = Pool(
    np.arange(5)[None], np.full((1, 5), 3), scores, np.zeros((1, 5, 2)), ("bm25", "dense"),
    {"denoising": [{"rule": "text"}, *(rule.describe() for rule in rules)]}, np.array([[10, 1]], np.float32),
    np.array([[relative, absolute, relative, relative, Reason.KEPT]], np.uint8),
  )  # fmt: skip
  assert negatives_shown._margins(pool, 0) == {0: "bm25", 1: "bm25", 2: "dense", 3: "dense"}


def test_what_is_wrong_with_a_run_shows_before_any_search(prepared, tmp_path, monkeypatch):
  config, layout = prepared[0].copy_and_resolve_references(), begin(prepared, tmp_path / "work")
  query = PreparedData(layout.prepared).splits["train"].ids[0]
  (tmp_path / "other.trec").write_text(f"{query} Q0 nowhere 1 9 other\n")
  config.mine.runs = (str(tmp_path / "other.trec"),)
  monkeypatch.setattr(search, "shared", lambda *arguments: pytest.fail("searched"))
  with pytest.raises(InputError, match="other.trec:1: unknown passage id: 'nowhere'"):
    mine.run(config, layout.root)


def test_a_split_without_positives_is_told_before_any_search(prepared, tmp_path, monkeypatch):
  config, layout = prepared[0], begin(prepared, tmp_path / "work")
  monkeypatch.setattr(PreparedSplit, "positives", lambda self, row: np.empty(0, np.int64))
  monkeypatch.setattr(search, "shared", lambda *arguments: pytest.fail("searched"))
  with pytest.raises(InputError, match="no training query left: none has a positive: 'train'"):
    mine.run(config, layout.root)


def test_a_killed_search_goes_on_at_the_first_missing_part(prepared, tmp_path, monkeypatch):
  config, whole, parts = prepared[0], begin(prepared, tmp_path / "whole"), begin(prepared, tmp_path / "parts")
  mine.run(config, whole.root)
  monkeypatch.setattr(search, "_BM25_PART", 10)
  found = parts.mine(0) / "runs"
  (found / "bm25.9-of-the-others").mkdir(parents=True)  # a run from elsewhere
  with monkeypatch.context() as stopped, pytest.raises(preemption.Preempted, match="part 2 of 4"):
    stopped.setattr(preemption, "asked", lambda: (found / "bm25.1-of-4").exists())
    mine.run(config, parts.root)
  asked, ask = [], Bm25.search
  monkeypatch.setattr(Bm25, "search", lambda self, texts, depth: asked.append(len(texts)) or ask(self, texts, depth))
  mine.run(config, parts.root)
  assert asked == [8, 8] and sorted(path.name for path in found.iterdir()) == ["bm25", "bm25.9-of-the-others"]
  for name in ("rows.npy", "scores.npy"):
    assert (found / "bm25" / name).read_bytes() == (whole.mine(0) / "runs/bm25" / name).read_bytes()


def test_negatives_have_the_scores_that_simans_wants_or_none(finished):
  config, workdir = finished[0].copy_and_resolve_references(), finished[1]
  pool = Pool.open(workdir / "mine1/pool")
  for source in ("bm25", "dense", "other.trec"):
    config.train.simans_source = source
    negatives = common.pool_negatives(config, pool)
    assert negatives.rows(3).tolist() == pool.candidates(3).tolist()
    assert hasattr(negatives, "scores") == (source in pool.names)
  config.train.simans_source = "bm25"
  scores, positive = common.pool_negatives(config, pool).scores(3)
  expected = pool.candidate_scores(3, "bm25")
  np.testing.assert_array_equal(scores, expected[0])
  np.testing.assert_equal(positive, expected[1])


def test_queries_without_a_quotient_of_scores_are_counted(finished):
  about = json.loads((finished[1] / "mine1/mining.json").read_text())
  pool = Pool.open(finished[1] / "mine1/pool")
  for source, name in enumerate(pool.names):
    hidden = ~(pool.positive_scores[:, source] > 0) & (pool.ranks[:, :, source] >= 0).any(1)
    assert about["beside_histograms"][name] == hidden.sum()
  page = negatives_shown.section("Negatives", about | {"beside_histograms": {"bm25": 0, "dense": 7}})
  assert "dense&#x27;s histogram leaves out" in page and "bm25&#x27;s histogram" not in page


def test_search_on_the_devices_gives_the_same_results(finished, directory, tmp_path):
  config, workdir = finished
  shutil.copytree(workdir, tmp_path / "work")
  expected = json.loads((workdir / "results.json").read_text())
  other = make_config(directory, index__backend="devices", index__device_dtype="bfloat16")
  pipeline.run(other, tmp_path / "work")
  assert json.loads((tmp_path / "work/results.json").read_text()) == expected


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"rounds": -1}, "rounds"),
    ({"mine__runs": ("nowhere.trec",)}, "nowhere.trec: no such run file"),
    ({"mine__runs": (__file__, f"{ROOT}/tests/../tests/test_rounds.py")}, "two sources of one name"),
    ({"mine__sources": ("dense", "sparse")}, "unknown mine.sources"),
    ({"mine__sources": ("runs",)}, "nothing to mine from"),
    ({"mine__retrievers": ("trained",)}, "names what is no retriever: .*trained"),
    ({"mine__retrievers": ("train",), "rounds": 1}, "names what is no retriever: .*train"),
    ({"mine__retrievers": ("train2",)}, "no pool of this run finds there: .*train2"),
    ({"index__factory": "IVF8Flat"}, "no FAISS index of width 32"),
    ({"index__factory": "IVF8,Flat", "index__search_parameters": "nprob=4"}, "no search parameter of this name"),
    ({"mine__retrievers": ("backbone",), "mine__sources": ("bm25",)}, "asked as the dense source is"),
    ({"mine__retrievers": ("pretrain", "train1")}, "no pool of this run finds there: .*train1.*There are backbone"),
    ({"mine__dense__first": 20}, "0 ≤ first < depth"),
    ({"mine__near_duplicate": 0.5, "mine__same_text": False}, "near_duplicate"),
    ({"mine__negative_below": 0.95}, "in this order"),
    ({"train__refresh_every": 2, "mine__dense__depth": 0}, "refresh_every mines with the retriever"),
    ({"fsdp": 3}, "does not fit 8 devices"),
    ({"mine__runs": (__file__,), "rounds": 1}, "mine.runs, and nothing is mined"),
    ({"mine__retrievers": ("backbone",), "rounds": 1}, "no pool is mined after round 1"),
    ({"train__steps": 0, "train__epochs": 0.0}, "training has no steps"),
    ({"mine__bm25__depth": 0, "mine__dense__depth": 0}, "nothing to mine from"),
    ({"index__backend": "gpu"}, "unknown index.backend"),
    ({"index__backend": "devices", "index__factory": "HNSW32"}, "HNSW32"),
    ({"train__sampling": "best"}, "unknown sampling"),
    ({"mine__width": -1}, "mine.width is not negative"),
    ({"train__passages": 1}, "negatives are mined, and train.passages is 1"),
    ({"train__passages": 1, "rounds": 1, "train__refresh_every": 2}, "negatives are mined, and train.passages is 1"),
    ({"mine__dense__depth": 2**15}, "mine.dense.depth is beyond the 32,767 ranks"),
    ({"mine__outside__relative_margin": -1.0}, "a share above 0"),
    ({"rounds": 1, "cross__enabled": True, "mine__cross_encoder": True}, "after round 1 or while it trains"),
    ({"train__sampling": "simans", "train__simans_source": "dens"}, "unknown train.simans_source: 'dens'"),
  ],
)
def test_what_cannot_work_is_said_before_any_work(directory, tmp_path, fields, message):
  with pytest.raises(InputError, match=message):
    pipeline.run(make_config(directory, **fields), tmp_path / "work")
  assert not (tmp_path / "work").exists() or not list((tmp_path / "work").glob("*/manifest.json"))


def test_a_pool_takes_so_many_sources(directory, tmp_path):
  paths = [tmp_path / f"{number}.trec" for number in range(15)]
  for path in paths:
    path.touch()
  mine.check(make_config(directory, mine__runs=tuple(map(str, paths[1:]))))
  with pytest.raises(InputError, match="16 sources at most: 17"):
    mine.check(make_config(directory, mine__runs=tuple(map(str, paths))))


def test_the_cross_encoder_denoises_and_reranks(directory, tmp_path):
  config = make_config(directory, cross__enabled=True, mine__cross_encoder=True, mine__pseudo_positives=True)
  config.cross.update({"steps": 3, "queries": 4, "evaluate_every": 3, "length": 4, "pair_length": 48, "depth": 5})
  config.cross.update({"evaluate_queries": 8, "rerank": 10, "head": "first"})
  config.mine.update({"negative_below": 0.5, "positive_above": 0.504})  # so little trained it gives .493 to .507
  pipeline.run(config, tmp_path / "work")
  results = json.loads((tmp_path / "work/results.json").read_text())
  assert list(results) == ["bm25", "train1", "train2", "reranked"]
  assert results["reranked"]["dev"]["R@100"] == results["train2"]["dev"]["R@100"]
  about = json.loads((tmp_path / "work/mine1/mining.json").read_text())
  (crossed,) = (step["removed"] for step in about["denoising"] if step["rule"] == "cross-encoder")
  assert crossed["CROSS_ENCODER"]["all"] > 0 and crossed["PSEUDO_POSITIVE"]["all"] > 0
  page = (tmp_path / "work/report.html").read_text()
  assert "taken out by cross-encoder: pseudo positive (" in page and "by cross-encoder: not scored (" in page
  assert "<h2>Cross-encoder</h2>" in page
  assert "Negatives of the cross-encoder" in page and "Negatives of round 1" not in page
  assert crossed["NOT_SCORED"]["all"] > 0

  layout = Layout.of(tmp_path / "work")
  first, again = (
    {query: [line.split()[2] for line in lines] for query, lines in itertools.groupby(
      layout.run_file(system, "dev").read_text().splitlines(), lambda line: line.split()[0])}
    for system in ("train2", "reranked")
  )  # fmt: skip
  encoder = CrossEncoder.load(layout.root / "cross/model")
  queries = {line["_id"]: line["text"] for line in map(json.loads, (directory / "data/queries.jsonl").open())}
  with gzip.open(directory / "data/corpus.jsonl.gz", "rt") as stream:
    corpus = {line["_id"]: (line["title"], line["text"]) for line in map(json.loads, stream)}
  for query, ranked in first.items():
    assert sorted(again[query][:10]) == sorted(ranked[:10]) and again[query][10:] == ranked[10:]
    scores = encoder.score([queries[query]] * 10, [corpus[passage] for passage in again[query][:10]])
    assert (np.diff(scores) <= 1e-6).all()
  assert first != again

  data = PreparedData(layout.prepared)
  batches, pool, seen = common.train_batches(config, layout, data, 2), Pool.open(layout.pool(1)), 0
  for step in range(8):
    rows, blocked = batches.rows(step), batches[step]["blocked"]
    for place, query in enumerate(rows.queries):
      believed = np.isin(rows.passages.ravel(), pool.pseudo_positives(int(query)))
      believed[place * rows.passages.shape[1]] = False  # it may be the target
      assert blocked[place][believed].all(), "a pseudo-positive is nobody's negative"
      seen += believed.sum()
  assert seen
  wanted = make_config(directory, mine__cross_encoder=True)
  with pytest.raises(InputError, match=r"cross\.enabled"):
    pipeline.run(wanted, tmp_path / "other")
