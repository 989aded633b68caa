"""Retrievers that are trained already, measured on other data: nothing is trained, and each reads text its own way."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil

import jax
import numpy as np
import pytest
from support import tiny
from test_pipeline import make_config

from dptdr_jax import Backbone, CrossEncoder, Retriever, compare, pipeline
from dptdr_jax import backbone as backbones
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.sources.beir import Beir
from dptdr_jax.models import prompts
from dptdr_jax.models.cross import init_cross
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.reranker import PairSettings
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retriever import VectorSettings

TEMPLATES = {"query_template": "query: {text}", "passage_template": "passage: {title} {text}"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """(directory, config) of a run without training: a retriever on its own backbone, and one on another."""
  directory = tmp_path_factory.mktemp("saved")
  backbone = Backbone.load(tiny.backbone(directory / "backbone"))
  spec = PromptSpec("deep", 4, init_scale=1.0)
  prompt = prompts.init_prompt(jax.random.key(1), spec, backbone.config)
  Retriever(backbone, spec, {"query": prompt, "passage": prompt}, VectorSettings(passage_length=48)).save(
    directory / "docs"
  )
  other = Backbone.load(tiny.backbone(directory / "roberta", family="roberta", hidden=48))
  Retriever.untuned(other, pooling="mean", passage_length=64, **TEMPLATES).save(directory / "other")
  new = tiny.beir(directory / "new", passages=40, queries=30, seed=5)
  (new / "qrels/train.tsv").unlink()
  config = make_config(
    directory, data__dir=str(new), rounds=0, encode__shard_passages=16,
    evaluate__retrievers=(f"docs={directory}/docs", f"other={directory}/other"),
  )  # fmt: skip
  pipeline.run(config, directory / "work")
  return directory, config


def test_they_are_measured_beside_the_baselines_and_nothing_is_trained(measured):
  directory, _ = measured
  results = json.loads((directory / "work/results.json").read_text())
  assert list(results) == ["bm25", "backbone", "docs", "other"]
  assert {"mine0", "train1"}.isdisjoint(path.name for path in (directory / "work").iterdir())
  page = (directory / "work/report.html").read_text()
  assert "docs: " in page and "trained: " not in page and page.count("<details") > 4


def test_they_are_compared_by_name(measured):
  work = measured[0] / "work"
  assert "/work:docs | RR@10 | " in compare.compare([f"{work}:bm25", f"{work}:docs"], "dev", ["RR@10"])
  with pytest.raises(InputError, match="nothing was trained in this run.*there are bm25, backbone, docs, other"):
    compare.compare([f"{work}", f"{work}:docs"], "dev", [])


@pytest.mark.parametrize("name", ["docs", "other"])
def test_vectors_are_those_of_the_saved_one(measured, name):
  directory, _ = measured
  retriever = Retriever.load(directory / name)
  found = Embeddings(directory / f"work/encode/{name}/corpus")
  expected = retriever.encode_passages(Beir(directory / "new").passages())
  np.testing.assert_allclose(found.take(range(40)), expected, atol=2e-6)
  assert found.source["retriever"] == retriever.hash


def test_one_more_encodes_no_corpus_again_and_neither_does_another_place(measured, caplog):
  directory, config = measured
  config = config.copy_and_resolve_references()
  saved = (f"docs={directory}/docs", f"other={directory}/other", f"same={directory}/other")
  config.evaluate.retrievers = saved
  caplog.set_level("INFO")
  pipeline.run(config, directory / "work")
  assert [text.count("/corpus, shard") for text in caplog.messages].count(1) == 3  # of the new one alone
  results = json.loads((directory / "work/results.json").read_text())
  assert results["same"] == results["other"]
  caplog.clear()
  shutil.copytree(directory / "docs", directory / "moved/docs")
  config.evaluate.retrievers = (f"docs={directory}/moved/docs", *saved[1:])
  pipeline.run(config, directory / "work")
  assert [text for text in caplog.messages if text.startswith(("encode: ", "evaluate: "))] == [
    "encode: done before", "evaluate: done before",
  ]  # fmt: skip


def test_one_with_weights_of_its_own_beside_a_training(measured, tmp_path):
  """All weights tuned, the backbone beside; and one on the run's own backbone, which is in memory already."""
  directory, _ = measured
  tuned = dataclasses.replace(Backbone.load(tiny.backbone(directory / "tuned", seed=3)), path=backbones.BESIDE)
  Retriever.untuned(tuned, passage_length=48).save(directory / "finetuned")
  config = make_config(
    directory, data__dir=str(tiny.beir(tmp_path / "data", passages=24, queries=12)), train__steps=1, train__passages=1,
    train__negatives="bm25", train__evaluate_every=0, evaluate__bm25=False, evaluate__backbone=False,
    evaluate__retrievers=(f"tuned={directory}/finetuned", f"docs={directory}/docs"),
  )  # fmt: skip
  pipeline.run(config, tmp_path / "work")
  assert list(json.loads((tmp_path / "work/results.json").read_text())) == ["tuned", "docs", "train1"]
  expected = Retriever.load(directory / "finetuned").encode_passages(Beir(tmp_path / "data").passages())
  np.testing.assert_allclose(Embeddings(tmp_path / "work/encode/tuned/corpus").take(range(24)), expected, atol=2e-6)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_nothing_made_of_another_corpus_is_searched(tmp_path, factory):
  """Other texts under the same ids, for a retriever that stays: neither its index nor vectors that lie in a pool."""
  tiny.beir(tmp_path / "data", passages=48, queries=12)
  config = make_config(tmp_path, rounds=0, evaluate__bm25=False, index__factory=factory)
  config.index.search_parameters = "nprobe=4" if factory != "Flat" else ""  # all lists: exact
  pipeline.run(config, tmp_path / "work")
  before = json.loads((tmp_path / "work/results.json").read_text())
  mined = tmp_path / "work/mine1/retrievers/backbone/vectors/corpus"  # as a run of two rounds leaves them
  shutil.copytree(tmp_path / "work/encode/backbone/corpus", mined)
  corpus = tmp_path / "data/corpus.jsonl.gz"
  lines = [json.loads(line) for line in gzip.decompress(corpus.read_bytes()).splitlines()]
  turned = [line | {"text": other["text"]} for line, other in zip(lines, lines[7:] + lines[:7], strict=True)]
  corpus.write_bytes(gzip.compress("".join(f"{json.dumps(line)}\n" for line in turned).encode()))
  pipeline.run(config, tmp_path / "work")
  pipeline.run(config, tmp_path / "fresh")
  found, expected = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("work", "fresh"))
  assert found == expected != before


def test_a_tuned_backbone_goes_with_what_is_saved_again(tmp_path):
  base = Backbone.load(tiny.backbone(tmp_path / "base"))
  tuned = base.with_params(jax.tree.map(lambda leaf: leaf + 0.001 / 3, base.params))
  Retriever.untuned(tuned, passage_length=48).save(tmp_path / "tuned")
  Retriever.load(tmp_path / "tuned", compute_dtype="bfloat16").save(tmp_path / "served")  # weights rounded in memory
  served, first = (Retriever.load(tmp_path / name) for name in ("served", "tuned"))
  assert served.hash == first.hash
  np.testing.assert_array_equal(served.encode_queries(["merge sort"]), first.encode_queries(["merge sort"]))
  spec = PromptSpec("none")  # a head alone
  trainable = jax.device_get(init_cross(jax.random.key(0), spec, base.config))
  cross = CrossEncoder(first.backbone, spec, trainable, PairSettings(query_length=12, pair_length=24))
  cross.save(tmp_path / "cross")
  pair = ["merge sort"], ["a merge of two lists"]
  np.testing.assert_array_equal(CrossEncoder.load(tmp_path / "cross").score(*pair), cross.score(*pair))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"evaluate__retrievers": ("docs",)}, "NAME=DIR.*: 'docs'"),
    ({"evaluate__retrievers": ("a/b=docs",)}, "NAME=DIR.*: 'a/b=docs'"),
    ({"evaluate__retrievers": ("train1=docs",)}, "a name that is taken: 'train1'"),
    ({"evaluate__retrievers": ("backbone-mean=docs",)}, "a name that is taken"),
    ({"evaluate__retrievers": ("docs=nowhere",)}, "nowhere: no retriever here"),
    ({"rounds": -1}, "rounds counts trainings: -1"),
    ({"rounds": 0, "cross__enabled": True}, "cross-encoder ranks again what the last round's"),
    ({"rounds": 0, "evaluate__bm25": False, "evaluate__backbone": False}, "nothing to evaluate"),
  ],
)
def test_what_cannot_work_is_said_before_any_work(tmp_path, fields, message):
  tiny.beir(tmp_path / "data")
  with pytest.raises(InputError, match=message):
    pipeline.run(make_config(tmp_path, **fields), tmp_path / "work")
  assert not list((tmp_path / "work").glob("*/manifest.json"))


@pytest.mark.parametrize(
  ("broken", "message"),
  [
    ("backbone", "/backbone: this checkpoint carries no prompt"),
    ("lost", "its backbone cannot be had: gone/or/never/there: no such directory"),
    ("cut", "prompts.safetensors: no prompts here"),
    ("other", "retriever.json: format 1 expected: 2"),
  ],
)
def test_a_retriever_that_is_not_whole_is_told_before_any_work(tmp_path, broken, message):
  tiny.beir(tmp_path / "data")
  config = make_config(tmp_path, evaluate__retrievers=(f"docs={tmp_path}/{broken}",))
  if broken != "backbone":
    Retriever.untuned(Backbone.load(tmp_path / "backbone"), passage_length=48).save(tmp_path / broken)
    about = json.loads((tmp_path / broken / "retriever.json").read_text())
    if broken == "lost":
      about["backbone"] |= {"path": "gone/or/never/there", "relative_path": "../gone"}
    about["format"] = 2 if broken == "other" else 1
    (tmp_path / broken / "retriever.json").write_text(json.dumps(about))
  if broken == "cut":
    (tmp_path / broken / "prompts.safetensors").unlink()
  with pytest.raises(InputError, match=message):
    pipeline.run(config, tmp_path / "work")
  assert not list((tmp_path / "work").glob("*/manifest.json"))
