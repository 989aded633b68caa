"""Saved retrievers and cross-encoders: format 1 still loads, format 2 holds the configuration, damage is one line.

tests/fixtures/format1 was written by the code before format 2: a random backbone, `retriever` (untied prompts), `tuned`
(all weights, so with a backbone of its own) and `cross`, and in expected.npz what they gave for the texts below.
"""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dptdr_jax import Backbone, CrossEncoder, Retriever
from dptdr_jax.core.errors import InputError
from dptdr_jax.retriever import check_saved

FORMAT1 = pathlib.Path(__file__).parents[1] / "fixtures" / "format1"
QUERIES = ["merge sort", "shortest path in a graph"]
PASSAGES = [("sorting", "merge quick heap stable order"), "node edge path cycle"]
LOADERS = {"retriever": Retriever.load, "cross": CrossEncoder.load}
ABOUT = {"retriever": "retriever.json", "cross": "cross_encoder.json"}


@pytest.fixture(scope="module")
def expected():
  with np.load(FORMAT1 / "expected.npz") as values:
    return dict(values)


@pytest.fixture
def saved(tmp_path):
  """A directory with a backbone, and a retriever and a cross-encoder of format 2 on it."""
  shutil.copytree(FORMAT1 / "backbone", tmp_path / "backbone")
  for name in LOADERS:
    shutil.copytree(FORMAT1 / name, tmp_path / name)
    LOADERS[name](tmp_path / name).save(tmp_path / name)
  return tmp_path


@pytest.mark.parametrize("name", ["retriever", "tuned"])
def test_retriever_of_format_1_gives_the_same_vectors_also_when_saved_again(name, expected, tmp_path):
  check_saved(FORMAT1 / name)
  first = Retriever.load(FORMAT1 / name)
  first.save(tmp_path / "again")
  again = Retriever.load(tmp_path / "again")
  assert again.hash == first.hash
  for retriever in (first, again):
    np.testing.assert_allclose(retriever.encode_queries(QUERIES), expected[f"{name}_queries"], atol=1e-5)
    np.testing.assert_allclose(retriever.encode_passages(PASSAGES), expected[f"{name}_passages"], atol=1e-5)
  named = [json.loads((at / "retriever.json").read_text()) for at in (FORMAT1 / name, tmp_path / "again")]
  assert [about["format"] for about in named] == [1, 2] and named[0]["backbone"]["hash"] != named[1]["backbone"]["hash"]


def test_cross_encoder_of_format_1_gives_the_same_scores(expected):
  scores = CrossEncoder.load(FORMAT1 / "cross").score(QUERIES, PASSAGES)
  np.testing.assert_allclose(scores, expected["cross"], atol=1e-5)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(
  ("field", "value"), [("hidden_act", "relu"), ("num_attention_heads", 2), ("layer_norm_eps", 1e-5)]
)
def test_another_config_json_beside_the_same_tensors_is_refused(saved, name, field, value):
  path = saved / "backbone/config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
  with pytest.raises(InputError, match=f"{ABOUT[name]}: the prompts were trained on another backbone"):
    LOADERS[name](saved / name)


@pytest.mark.parametrize(
  ("place", "named"),
  [("backbone/model.safetensors", "backbone"), ("retriever/prompts.safetensors", "retriever/prompts.safetensors")],
)
def test_weights_that_are_not_finite_are_refused(saved, place, named):
  tensors = load_file(saved / place)
  tensors[min(tensors)].flat[1] = np.nan
  save_file(tensors, saved / place)
  with pytest.raises(InputError, match=f"{named}: .*not finite numbers: '{min(tensors)}'"):
    Retriever.load(saved / "retriever")


@pytest.mark.parametrize("name", LOADERS)
def test_only_an_older_save_is_replaced(saved, name):
  one = LOADERS[name](saved / name)
  one.save(saved / name)
  assert LOADERS[name](saved / name).hash == one.hash
  (saved / name / "thesis.tex").write_text("mine")
  (saved / "other").mkdir()
  (saved / "other/notes.txt").write_text("mine")
  (saved / "file").write_text("mine")
  before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
  for place, message in ((name, "something else"), ("other", "something else"), ("file", "a file is in the way")):
    with pytest.raises(InputError, match=f"{place}: .*{message}"):
      one.save(saved / place)
  assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"format": 3}, "not a .* of format 1 or 2"),
    ({"prompt": ["deep"]}, "of another kind"),
    ({"prompt": {"kind": "deep", "length": "4"}}, "of another kind"),
    ({"backbone": {"hash": ""}}, "a field is missing.*path"),
    ({"query_length": "12"}, "query_length must be of the kind of 32: '12'"),
  ],
)
def test_a_description_of_another_shape_is_one_line(saved, name, change, message):
  path = saved / name / ABOUT[name]
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(InputError, match=f"{ABOUT[name]}: .*{message}"):
    LOADERS[name](saved / name)


@pytest.mark.parametrize(
  ("index", "message"),
  [
    (["a"], ""),
    ({"metadata": {}}, "a field is missing"),
    ({"weight_map": "a"}, ""),
    ({"weight_map": {}}, ""),
    ({"weight_map": {"a": "../backbone/model.safetensors"}}, "a shard must be a file in this directory: '../back"),
  ],
)
def test_a_weight_index_of_another_shape_or_that_leaves_its_directory_is_one_line(tmp_path, index, message):
  shutil.copytree(FORMAT1 / "backbone", tmp_path / "backbone")
  (tmp_path / "backbone/model.safetensors").rename(tmp_path / "backbone/model-1.safetensors")
  (tmp_path / "backbone/model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(InputError, match=rf"backbone/model\.safetensors\.index\.json: .*{message}"):
    Backbone.load(tmp_path / "backbone")
