"""The original's training JSONL, as text and as token ids."""

import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.prepare import prepare_source
from dptdr_jax.data.sources.original_jsonl import OriginalJsonl
from dptdr_jax.data.tokenizer import Tokenizer


def test_text_with_titles_and_shared_passages(write, tmp_path):
  write(
    "o/train.jsonl",
    [
      {"query": "first?", "positives": [{"title": "T", "text": "pos"}], "negatives": ["neg a", "neg b"]},
      {"query": "second?", "positives": ["neg a"], "negatives": []},
    ],
  )
  write("o/dev/part0.json.gz", [{"query": "third?", "positives": ["neg b"]}])
  source = OriginalJsonl(tmp_path / "o")
  assert source.splits() == ("train", "dev")
  passages = list(source.passages())
  assert sorted((passage.title, passage.text) for passage in passages) == [("", "neg a"), ("", "neg b"), ("T", "pos")]
  assert [query.id for query in source.queries("train")] == ["train-1", "train-2"]
  data = prepare_source(source, tmp_path / "prepared")
  train, dev = data.splits["train"], data.splits["dev"]
  texts = [passage.text for passage in data.passages.read()]
  assert [texts[row] for row in train.positives(0)] == ["pos"]
  assert [texts[row] for row in train.negatives.rows(0)] == ["neg a", "neg b"]
  assert [texts[row] for row in train.positives(1)] == ["neg a"]
  assert train.negatives.rows(1).size == 0
  assert [texts[row] for row in dev.positives(0)] == ["neg b"]


def test_token_ids_come_back_as_they_were(write, tmp_path, roberta):
  tokenizer = Tokenizer(roberta)
  texts = ["the cat", "on the mat", "Größe & 猫"]
  query, positive, negative = tokenizer.encode(texts)
  write("o/train.jsonl", [{"query": query, "positives": [positive], "negatives": [negative]}])
  source = OriginalJsonl(tmp_path / "o", tokenizer=tokenizer)
  passages = list(source.passages())
  assert [passage.text for passage in passages] == texts[1:]
  assert tokenizer.encode([passage.text for passage in passages]) == [positive, negative]
  assert source.changed == 0
  assert next(iter(source.queries("train"))).text == "the cat"
  with pytest.raises(InputError, match=r"train\.jsonl:1: query is token ids"):
    list(OriginalJsonl(tmp_path / "o").queries("train"))


def test_ids_that_the_tokenizer_would_not_choose_are_counted(write, tmp_path, roberta, caplog):
  tokenizer = Tokenizer(roberta)
  letters = [token for letter in "the" for token in tokenizer.encode([letter])[0]]
  write("o/train.jsonl", [{"query": "q", "positives": [letters]}])
  source = OriginalJsonl(tmp_path / "o", tokenizer=tokenizer)
  assert [passage.text for passage in source.passages()] == ["the"]
  assert source.changed == 1 and "1 of 1 passages of token ids become other ids" in caplog.text
  write("o/train.jsonl", [{"query": "q", "positives": [[tokenizer.vocab_size]]}])
  with pytest.raises(InputError, match=rf"train\.jsonl:1: .* has {tokenizer.vocab_size} ids, and not this one"):
    list(source.passages())


def test_ids_of_queries_tell_their_files_apart(write, tmp_path):
  for name in ("train.jsonl", "train/train.00.jsonl", "train/train.01.jsonl.gz"):
    write(f"o/{name}", [{"query": name, "positives": ["p"]}])
  found = {query.id: query.text for query in OriginalJsonl(tmp_path / "o").queries("train")}
  assert found == {"train-1": "train.jsonl", "train/train.00-1": "train/train.00.jsonl",
                   "train/train.01-1": "train/train.01.jsonl.gz"}  # fmt: skip
  write("o/dev/part 1.jsonl", [{"query": "q", "positives": ["p"]}])
  with pytest.raises(InputError, match="the file's name has white space"):
    list(OriginalJsonl(tmp_path / "o").queries("dev"))


@pytest.mark.parametrize(
  ("line", "kind", "what"),
  [
    ('{"query": "q", "positives": ["p"', "queries", "broken JSON"),
    ({"positives": ["p"]}, "queries", "query must be a string"),
    ({"query": "", "positives": ["p"]}, "queries", "empty query"),
    ({"query": "q", "positives": []}, "judgements", "no positives"),
    ({"query": "q", "positives": "p"}, "judgements", "positives must be a list"),
    ({"query": "q", "positives": [""]}, "passages", "empty text in positives"),
    ({"query": "q", "positives": [{"title": [5], "text": "p"}]}, "passages", "a title in positives must be a string"),
    ({"query": "q", "positives": ["p"], "negatives": [["x"]]}, "passages", "token ids must be whole numbers"),
  ],
)
def test_damaged_lines(write, tmp_path, line, kind, what):
  write("o/train.jsonl", [{"query": "q", "positives": ["p"], "negatives": ["n"]}, line])
  with pytest.raises(InputError, match=rf"train\.jsonl:2: .*{what}"):
    list(OriginalJsonl(tmp_path / "o").records(kind, "train"))


def test_no_files(tmp_path, write):
  with pytest.raises(InputError, match="no SPLIT.jsonl here"):
    OriginalJsonl(tmp_path).splits()
  write("train.jsonl", [])
  with pytest.raises(InputError, match="no dev.jsonl here"):
    OriginalJsonl(tmp_path).files("dev")
