"""The original's training files, as text and as token ids."""

import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.formats.original_jsonl import OriginalJsonl
from dptdr_jax.data.tokenizer import Tokenizer


def test_text_with_titles_and_shared_passages(write, prepare_all, tmp_path):
  write(
    "o/train.jsonl",
    [
      {"query": "first?", "positives": [{"title": "T", "text": "pos"}], "negatives": ["neg a", "neg b"]},
      {"query": "second?", "positives": ["neg a"], "negatives": []},
    ],
  )
  write("o/dev/part0.json.gz", [{"query": "third?", "positives": ["neg b"]}])
  data = OriginalJsonl(tmp_path / "o")
  assert data.splits() == ("train", "dev")
  passages = list(data.passages())
  assert sorted((passage.title, passage.text) for passage in passages) == [("", "neg a"), ("", "neg b"), ("T", "pos")]
  assert [query.id for query in data.queries("train")] == ["train-1", "train-2"]
  corpus, splits = prepare_all(data)
  train, dev = splits["train"], splits["dev"]
  texts = [passage.text for passage in corpus.passages.read()]
  assert [texts[row] for row in train.positives(0)] == ["pos"]
  assert [texts[row] for row in train.negatives.rows(0)] == ["neg a", "neg b"]
  assert [texts[row] for row in train.positives(1)] == ["neg a"]
  assert train.negatives.rows(1).size == 0
  assert [texts[row] for row in dev.positives(0)] == ["neg b"]


def test_token_ids_survive_decoding(write, tmp_path, roberta):
  tokenizer = Tokenizer(roberta)
  texts = ["the cat", "on the mat", "Größe & 猫"]
  query, positive, negative = tokenizer.encode(texts)
  write("o/train.jsonl", [{"query": query, "positives": [positive], "negatives": [negative]}])
  data = OriginalJsonl(tmp_path / "o", tokenizer=tokenizer)
  passages = list(data.passages())
  assert [passage.text for passage in passages] == texts[1:]
  assert tokenizer.encode([passage.text for passage in passages]) == [positive, negative]
  assert data.changed == 0
  assert next(iter(data.queries("train"))).text == "the cat"
  with pytest.raises(InputError, match=r"train\.jsonl:1: query is token ids"):
    list(OriginalJsonl(tmp_path / "o").queries("train"))


def test_token_ids_that_change_are_counted_and_unknown_ones_refused(write, tmp_path, roberta, caplog):
  tokenizer = Tokenizer(roberta)
  letters = [token for letter in "the" for token in tokenizer.encode([letter])[0]]
  write("o/train.jsonl", [{"query": "q", "positives": [letters]}])
  data = OriginalJsonl(tmp_path / "o", tokenizer=tokenizer)
  assert [passage.text for passage in data.passages()] == ["the"]
  assert data.changed == 1 and "1 of 1 passages of token ids become other ids" in caplog.text
  write("o/train.jsonl", [{"query": "q", "positives": [[tokenizer.vocab_size]]}])
  with pytest.raises(InputError, match=rf"train\.jsonl:1: .* has {tokenizer.vocab_size} ids, not this one"):
    list(data.passages())


def test_query_ids_name_their_files(write, tmp_path):
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
    ({"query": "q", "positives": [{"title": [5], "text": "p"}]}, "passages", "a title must be a string"),
    ({"query": "q", "positives": ["p"], "negatives": [["x"]]}, "passages", "token ids must be whole numbers"),
  ],
)
def test_damaged_line_is_named(write, tmp_path, line, kind, what):
  write("o/train.jsonl", [{"query": "q", "positives": ["p"], "negatives": ["n"]}, line])
  with pytest.raises(InputError, match=rf"train\.jsonl:2: .*{what}"):
    list(OriginalJsonl(tmp_path / "o").records(kind, "train"))


def test_missing_files_are_named(tmp_path, write):
  with pytest.raises(InputError, match="no SPLIT.jsonl here"):
    OriginalJsonl(tmp_path).splits()
  write("train.jsonl", [])
  with pytest.raises(InputError, match="no dev.jsonl here"):
    OriginalJsonl(tmp_path).files("dev")
