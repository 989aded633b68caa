"""Retriever: texts and tokens that it takes or refuses, its hash, and checkpoints of the original."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import tiny

from dptdr_jax import Backbone, Retriever
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.records import Passage
from dptdr_jax.data.store import TokenStore, write_token_store
from dptdr_jax.data.tokenizer import Tokenizer
from dptdr_jax.retriever import check_saved

UNTIED = pathlib.Path(__file__).parents[1] / "fixtures" / "golden" / "roberta_prefix_untied"


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
  return Retriever.untuned(Backbone.load(tiny.backbone(tmp_path_factory.mktemp("backbone"))), passage_length=32)


def test_a_passage_may_be_a_text_pair_record_or_dict(retriever):
  titled = [("sorting", "merge quick"), Passage("7", "sorting", "merge quick")]
  titled += [{"title": "sorting", "text": "merge quick"}]
  bare = ["merge quick", (None, "merge quick"), {"text": "merge quick"}, {"title": None, "text": "merge quick"}]
  vectors = retriever.encode_passages(titled + bare)
  np.testing.assert_array_equal(vectors, vectors[[0] * 3 + [3] * 4])
  assert np.abs(vectors[0] - vectors[3]).max() > 0.01


def test_what_is_not_a_list_of_texts_is_refused_by_place(retriever):
  for encode, alone in ((retriever.encode_queries, "merge"), (retriever.encode_passages, ("sorting", "merge"))):
    with pytest.raises(InputError, match="a list of .* is expected, not one"):
      encode(alone)
  for wrong, message in ((None, r"query 1 \(NoneType\) is not a text"), ("a\ud800", "query 1 has half a surrogate")):
    with pytest.raises(InputError, match=message):
      retriever.encode_queries(["merge", wrong])
  with pytest.raises(InputError, match=r"passage 1 \(float\) has no text.*: nan"):
    retriever.encode_passages(["merge", float("nan")])
  with pytest.raises(InputError, match="1 is empty"):
    retriever.encode_passages(["merge", {"text": " "}])


def test_token_ids_outside_the_vocabulary_are_refused(retriever):
  size = retriever.backbone.config.vocab_size
  ids, mask = np.array([[2, 5, size - 1, 3], [2, 5, 3, 0]]), np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
  vectors = retriever.encode_tokens(ids, mask)
  padded = np.where(mask, ids, -100)  # padding is not read
  np.testing.assert_array_equal(retriever.encode_tokens(padded, mask), vectors)
  for wrong in (size, -1, 2**40, np.nan):
    with pytest.raises(InputError, match=rf"token ids are 0 … {size - 1}, row 1 has another"):
      retriever.encode_tokens(np.array([[2, 5, 5, 3], [2, wrong, 3, 0]]), mask)
  with pytest.raises(InputError, match="unknown kind of text: 'doc'"):
    retriever.encode_tokens(ids, mask, "doc")


def test_a_store_of_another_tokenizer_is_refused(retriever, tmp_path):
  other = tiny.backbone(tmp_path / "roberta", family="roberta")
  for place, tokenizer in (("own", retriever.backbone.tokenizer), ("other", Tokenizer(other))):
    write_token_store(lambda start: iter(["merge sort"][start:]), 1, tokenizer, tmp_path / place, max_tokens=30)
  own, alien = (TokenStore(tmp_path / place) for place in ("own", "other"))
  np.testing.assert_array_equal(retriever.encode_store(own, "query"), retriever.encode_queries(["merge sort"]))
  with pytest.raises(InputError, match="other: tokens of another tokenizer than the retriever's"):
    retriever.encode_store(alien, "query")


def test_lengths_without_room_for_a_text_are_refused(retriever):
  for query_length, passage_length in ((2, 32), (32, 1)):
    with pytest.raises(InputError, match="leave no room for a text: .*above 2"):
      Retriever.untuned(retriever.backbone, query_length=query_length, passage_length=passage_length)
  Retriever.untuned(retriever.backbone, query_length=3, passage_length=3)


def test_hash_covers_the_tokenizer(retriever, tmp_path):
  other = tiny.backbone(tmp_path)
  assert Retriever.untuned(Backbone.load(other), passage_length=32).hash == retriever.hash
  content = json.loads((other / "tokenizer.json").read_text())
  content["normalizer"]["lowercase"] = False
  (other / "tokenizer.json").write_text(json.dumps(content))
  changed = Backbone.load(other)
  assert changed.hash == retriever.backbone.hash
  without = dataclasses.replace(changed, tokenizer=None)
  hashes = {Retriever.untuned(backbone, passage_length=32).hash for backbone in (changed, without)}
  assert len(hashes | {retriever.hash}) == 3


@pytest.fixture
def untied(tmp_path):
  """The original's untied checkpoint, without a tokenizer."""
  for side in ("query_model", "passage_model"):
    shutil.copytree(UNTIED / side, tmp_path / side, ignore=shutil.ignore_patterns("*.bin"))
  return tmp_path


def test_tokenizer_above_both_models_serves_both(untied, tmp_path):
  assert Retriever.load(untied).backbone.tokenizer is None
  with pytest.raises(InputError, match="query_model: no tokenizer here"):
    check_saved(untied)
  size = json.loads((untied / "query_model" / "config.json").read_text())["vocab_size"]
  content = json.loads(tiny.tokenizer().to_str())
  content["model"]["vocab"] = {piece: number for piece, number in content["model"]["vocab"].items() if number < size}
  (untied / "tokenizer.json").write_text(json.dumps(content))
  check_saved(untied)
  loaded = Retriever.load(untied)
  vectors = loaded.encode_queries(["merge sort"])
  loaded.save(tmp_path / "saved")
  np.testing.assert_array_equal(Retriever.load(tmp_path / "saved").encode_queries(["merge sort"]), vectors)
  check_saved(tmp_path / "saved")
  shutil.rmtree(untied / "passage_model")
  with pytest.raises(InputError, match=r"retriever\.json: its backbone cannot be had: .*passage_model"):
    check_saved(tmp_path / "saved")


def test_sides_with_different_prompts_are_refused(untied):
  path = untied / "passage_model" / "model.safetensors"
  whole = load_file(path)
  name = "prefix_encoder.embedding.weight"
  save_file(whole | {name: whole[name][:-1]}, path)
  with pytest.raises(InputError, match="prompts of two kinds or lengths"):
    Retriever.load(untied)
  save_file(whole | {name: whole[name][:, :-2]}, path)
  with pytest.raises(InputError, match=r"passage_model: prompt tensor table has shape"):
    Retriever.load(untied)
