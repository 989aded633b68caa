"""Retrievers that are trained already, measured on other data: nothing is trained, and each reads text its own way."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from support import tiny
from test_pipeline import make_config

from dptdr_jax import Backbone, Retriever, pipeline
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.sources.beir import Beir
from dptdr_jax.models import prompts
from dptdr_jax.models.prompts import PromptSpec
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


@pytest.mark.parametrize("name", ["docs", "other"])
def test_vectors_are_those_of_the_saved_one(measured, name):
  directory, _ = measured
  retriever = Retriever.load(directory / name)
  found = Embeddings(directory / f"work/encode/{name}/corpus")
  expected = retriever.encode_passages(Beir(directory / "new").passages())
  np.testing.assert_allclose(found.take(range(40)), expected, atol=2e-6)
  assert found.source["retriever"] == retriever.hash


def test_one_more_encodes_no_corpus_again(measured, caplog):
  directory, config = measured
  config = config.copy_and_resolve_references()
  config.evaluate.retrievers = (*config.evaluate.retrievers, f"same={directory}/other")
  caplog.set_level("INFO")
  pipeline.run(config, directory / "work")
  assert [text.count("/corpus, shard") for text in caplog.messages].count(1) == 3  # of the new one alone
  results = json.loads((directory / "work/results.json").read_text())
  assert results["same"] == results["other"]


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
