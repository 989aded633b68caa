"""Templates, and tokenizers against transformers."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import transformers

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.records import Passage, Query
from dptdr_jax.data.text import check_templates, passage_text, passage_texts, query_text, query_texts
from dptdr_jax.data.tokenizer import Tokenizer

TEXTS = ["hello world", "Straße Ümläut 猫 ☃", "a" * 40, "the cat sat on the mat " * 20, "x [SEP] y </s> z"]


def test_passage_and_query_text():
  titled, bare = Passage("1", "Title", "text {braces}"), Passage("2", "", "text")
  assert passage_text(titled) == "Title text {braces}"
  assert passage_text(titled, " [SEP] ") == "Title [SEP] text {braces}"
  assert passage_text(bare, " [SEP] ") == "text"
  assert passage_text(titled, ": ", "passage: {title}{separator}{text}") == "passage: Title: text {braces}"
  assert passage_text(bare, ": ", "passage: {title}{separator}{text}") == "passage: text"
  assert query_text(Query("q", "what?")) == "what?"
  assert query_text(Query("q", "what?"), "query: {text}") == "query: what?"


def test_passages_and_queries_in_every_form():
  form = (": ", "{title}{separator}{text}")
  given = ["text", ("Title", "text"), ["Title", "text"], (None, "text"), Passage("7", "Title", "text")]
  given += [{"text": "text"}, {"_id": "7", "title": "Title", "text": "text"}, {"title": None, "text": "text"}]
  wanted = ["text", "Title: text", "Title: text", "text", "Title: text", "text", "Title: text", "text"]
  assert passage_texts(iter(given), *form) == wanted
  assert passage_texts(tuple(given[1:]), *form) == wanted[1:]
  assert query_texts(("what?", np.str_("who?")), "query: {text}") == ["query: what?", "query: who?"]
  assert passage_texts([], *form) == query_texts([], "{text}") == []


@pytest.mark.parametrize("alone", ["merge", b"merge", ("Title", "text"), Passage("7", "", "t"), {"text": "t"}, None, 7])
def test_one_passage_instead_of_a_list_is_refused(alone):
  with pytest.raises(InputError, match="a list of passages is expected, not one"):
    passage_texts(alone, " ", "{text}")


@pytest.mark.parametrize(
  "wrong", [None, math.nan, 7, b"t", ("t",), ("i", "T", "t"), ("T", None), (math.nan, "t"), {"title": "T"}, {"t"}]
)
def test_item_that_is_not_a_passage_is_named(wrong):
  shown = "" if wrong is None else f": {re.escape(repr(wrong))}"
  with pytest.raises(InputError, match=rf"passage 1 \({type(wrong).__name__}\) has no text, .*{shown}"):
    passage_texts(["fine", wrong], " ", "{text}")


def test_item_that_is_not_a_query_is_named():
  for alone in ("merge", {"q0": "merge"}, None):
    with pytest.raises(InputError, match="a list of queries is expected, not one"):
      query_texts(alone, "{text}")
  for wrong in (math.nan, 7, ("T", "t"), Query("q", "t"), {"text": "t"}):
    with pytest.raises(
      InputError, match=rf"query 1 \({type(wrong).__name__}\) is not a text: {re.escape(repr(wrong))}"
    ):
      query_texts(["fine", wrong], "{text}")
  with pytest.raises(InputError, match=r"query 0 \(NoneType\) is not a text"):
    query_texts([None], "{text}")
  for text, what in ((" ", "empty"), ("half \ud800", "half a surrogate pair")):
    with pytest.raises(InputError, match=f"query 0 .*{what}"):
      query_texts([text], "{text}")
    with pytest.raises(InputError, match=f"passage 1 .*{what}"):
      passage_texts(["fine", {"text": text}], " ", "{text}")


@pytest.mark.parametrize(
  ("query", "passage"),
  [
    ("query:", "{text}"),
    ("{text} {title}", "{text}"),
    ("{text", "{text}"),
    ("{text!x}", "{text}"),
    ("{text:>999999999}", "{text}"),
    ("{text}", "{title}"),
    ("{text}", "{title[0]}{text}"),
  ],
)
def test_bad_template_is_refused(query, passage):
  check_templates("query: {text} {{literal}}", "{title}{separator}{text}")
  with pytest.raises(InputError, match="template"):
    check_templates(query, passage)


def test_minilm_as_transformers_has_it(minilm):
  ours, theirs = Tokenizer(minilm), transformers.AutoTokenizer.from_pretrained(str(minilm))
  assert (ours.prefix, ours.suffix, ours.pad_id, ours.mask_id) == ((101,), (102,), 0, 103)
  assert ours.vocab_size == len(theirs) == 30522 and ours.separator == "[SEP]"
  for text, ids in zip(TEXTS, ours.encode(TEXTS), strict=True):
    assert ids == theirs(text, add_special_tokens=False, truncation=False)["input_ids"]
    assert ours.wrap(ids) == theirs(text, truncation=False)["input_ids"]
  assert len(ours.encode(TEXTS)[3]) == 120  # the baked-in limit of 128 and its padding are off
  assert len(ours.encode(["word " * 300])[0]) == 300
  assert ours.encode(["word " * 300], 7)[0] == ours.encode(["word " * 7])[0]


def test_byte_level_bpe_round_trips(roberta):
  tokenizer = Tokenizer(roberta)
  assert (tokenizer.prefix, tokenizer.suffix, tokenizer.pad_id, tokenizer.mask_id) == ((0,), (2,), 1, 4)
  assert [tokenizer.backend.decode(ids, skip_special_tokens=False) for ids in tokenizer.encode(TEXTS)] == TEXTS


def test_hash_is_of_what_tokens_depend_on(minilm, tmp_path):
  content = json.loads((minilm / "tokenizer.json").read_text())
  content["truncation"]["max_length"] = 512
  (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=2))
  assert Tokenizer(tmp_path).hash == Tokenizer(minilm).hash
  content["normalizer"]["lowercase"] = False
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  assert Tokenizer(tmp_path).hash != Tokenizer(minilm).hash


def test_vocabulary_files_alone_will_do(minilm, tmp_path):
  for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
    shutil.copy(minilm / name, tmp_path)
  made = Tokenizer(tmp_path)
  assert made.encode(TEXTS) == Tokenizer(minilm).encode(TEXTS)
  assert (made.prefix, made.suffix, made.pad_id) == ((101,), (102,), 0)


def test_bad_tokenizer_is_named(minilm, roberta, tmp_path):
  with pytest.raises(InputError, match="no tokenizer here"):
    Tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text('{"version": "1.0",\n oops}')
  with pytest.raises(InputError, match=r"tokenizer\.json:2: broken JSON"):
    Tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "None"}}')
  with pytest.raises(InputError, match="not a tokenizer"):
    Tokenizer(tmp_path)
  content = json.loads((roberta / "tokenizer.json").read_text())
  (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
  with pytest.raises(InputError, match="puts no special token before and after"):
    Tokenizer(tmp_path)
  Tokenizer(minilm).check_model(30522, "model")
  with pytest.raises(InputError, match="model: the tokenizer in .* has 30522 ids and the model 100 embeddings"):
    Tokenizer(minilm).check_model(100, "model")
