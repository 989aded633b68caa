"""evaluate.retrievers: saved retrievers, each with its own text settings and backbone, measured without training."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from support import runs, tiny

from dptdr_jax import Backbone, CrossEncoder, Retriever, compare
from dptdr_jax import backbone as backbones
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.formats.beir import Beir
from dptdr_jax.models import prompts
from dptdr_jax.models.cross import init_cross
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.reranker import PairSettings
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retriever import VectorSettings

NAMES = ("docs", "relu", "other", "tuned")
TEMPLATES = {"query_template": "query: {text}", "passage_template": "passage: {title} {text}"}


def change(path: pathlib.Path, **fields) -> None:
  """Changes fields of a JSON file."""
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """(directory, Run) without training: `docs` on the run's backbone, `relu` (of format 1) on the same tensors with
  another configuration, `other` on another backbone, `tuned` with its own."""
  directory = tmp_path_factory.mktemp("measured")
  backbone = Backbone.load(tiny.backbone(directory / "backbone"))
  spec = PromptSpec("deep", 4)
  prompt = prompts.init_prompt(jax.random.key(1), spec, backbone.config)
  docs = Retriever(backbone, spec, {"query": prompt, "passage": prompt}, VectorSettings(passage_length=48))
  docs.save(directory / "docs")
  shutil.copytree(directory / "backbone", directory / "with-relu")
  change(directory / "with-relu/config.json", hidden_act="relu")
  dataclasses.replace(docs, backbone=Backbone.load(directory / "with-relu")).save(directory / "relu")
  named = {"path": str(directory / "with-relu"), "hash": backbone.tensor_hash}
  change(directory / "relu/retriever.json", format=1, backbone=named)
  other = Backbone.load(tiny.backbone(directory / "roberta", family="roberta", hidden=48))
  Retriever.untuned(other, pooling="mean", passage_length=64, **TEMPLATES).save(directory / "other")
  own = dataclasses.replace(Backbone.load(tiny.backbone(directory / "own", seed=3)), path=backbones.BESIDE)
  Retriever.untuned(own, passage_length=48).save(directory / "tuned")
  tiny.beir(directory / "data", passages=40, queries=30, seed=5)
  (directory / "data/qrels/train.tsv").unlink()
  saved = tuple(f"{name}={directory}/{name}" for name in NAMES)
  one = runs.Run(tiny.config(directory, rounds=0, evaluate__retrievers=saved), directory / "work")
  one.run()
  return directory, one


def test_saved_retrievers_are_measured_beside_the_baselines(measured):
  directory, one = measured
  assert list(json.loads((one.workdir / "results.json").read_text())) == ["bm25", "backbone", *NAMES, "fused-backbone"]
  page = (one.workdir / "report.html").read_text()
  assert "docs" in page and "trained: " not in page
  assert "/work:docs | RR@10 | " in compare.compare([f"{one.workdir}:bm25", f"{one.workdir}:docs"], "dev", ["RR@10"])
  with pytest.raises(InputError, match="nothing was trained in this run.*there are bm25, backbone, docs, relu"):
    compare.compare([f"{one.workdir}", f"{one.workdir}:docs"], "dev", [])


def test_vectors_are_those_of_the_saved_retriever(measured):
  directory, one = measured
  texts = list(Beir(directory / "data").passages())
  stored = {made.source["retriever"]: made for node in one.nodes("vectors")
            if len(made := Embeddings(one.path(node))) == 40}  # fmt: skip
  for name in NAMES:
    retriever = Retriever.load(directory / name)
    expected = retriever.encode_passages(texts)
    np.testing.assert_allclose(stored[retriever.hash].take(np.arange(40)), expected, atol=2e-6)


def test_one_more_encodes_it_alone_and_another_place_encodes_nothing(measured, monkeypatch):
  directory, one = measured
  built = runs.watch(monkeypatch)
  saved = one.config.evaluate.retrievers
  one.change(evaluate__retrievers=(*saved, f"same={directory}/other")).run()
  results = json.loads((one.workdir / "results.json").read_text())
  assert results["same"] == results["other"] and "vectors" not in runs.kinds(built), "the same one under another name"
  shutil.copytree(directory / "docs", directory / "moved/docs")
  built.clear()
  one.change(evaluate__retrievers=(f"docs={directory}/moved/docs", *saved[1:])).run()
  assert not built
  change(directory / "moved/docs/retriever.json", passage_length=20)
  one.change(evaluate__retrievers=(*saved, f"short={directory}/moved/docs")).run()
  assert runs.kinds(built)["vectors"] == 2, "of the corpus and of the split"


def test_backbone_with_tuned_weights_is_saved_with_every_retriever(tmp_path):
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
  ("entry", "message"),
  [
    ("docs", "NAME=DIR.*: 'docs'"),
    ("a/b=docs", "NAME=DIR.*: 'a/b=docs'"),
    ("train1=docs", "a name that is taken: 'train1'"),
    ("backbone-mean=docs", "a name that is taken"),
    ("docs=nowhere", "nowhere: no retriever here"),
    ("docs={}/backbone", "/backbone: this checkpoint carries no prompt"),
    ("docs={}/lost", "its backbone cannot be had: gone/or/never/there: no such directory"),
    ("docs={}/cut", "prompts.safetensors: no prompts here"),
    ("docs={}/later", "retriever.json: not a retriever of format 1 or 2"),
  ],
)
def test_wrong_or_damaged_retriever_is_refused_before_any_work(measured, tmp_path, entry, message):
  directory, one = measured
  shutil.copytree(directory / "docs", tmp_path / "cut")
  (tmp_path / "cut/prompts.safetensors").unlink()
  gone = {"path": "gone/or/never/there", "relative_path": "../gone", "hash": "", "hash_format": 2}
  for name, fields in (("lost", {"backbone": gone}), ("later", {"format": 3})):
    shutil.copytree(directory / "docs", tmp_path / name)
    change(tmp_path / name / "retriever.json", **fields)
  (tmp_path / "backbone").symlink_to(directory / "backbone")
  changed = one.change(evaluate__retrievers=(entry.format(tmp_path),))
  with pytest.raises(InputError, match=message):
    runs.Run(changed.config, tmp_path / "work").run()
  assert not runs.stored(tmp_path / "work")
