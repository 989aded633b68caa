"""Training sets for other trainers: read back by our reader of the original's files, and as n-tuples line by line."""

import json

import numpy as np
import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.prepare import prepare_source
from dptdr_jax.data.sources.original_jsonl import OriginalJsonl
from dptdr_jax.retrieval.candidates import Pool, Reason
from dptdr_jax.retrieval.exports import Example, training_examples, write_ntuples, write_original

PASSAGES = [("T", "zero"), ("", "one \u2028 line"), ("", 'two "quoted"'), ("Größe", "three 猫"), ("", "four")]
QUERIES = ["first?", "second?", "third?", "fourth?"]
POSITIVES = [[2, 0], [4], [], [1]]


def examples(most=None, queries=QUERIES):
  rows = np.array([[3, 1, 4], [0, 2, -1], [0, 1, -1], [-1, -1, -1]], np.int32)
  reasons = np.zeros(rows.shape, np.uint8)
  reasons[0, 1] = Reason.SAME_TEXT
  pool = Pool(rows, (rows >= 0).astype(np.uint16), np.zeros((4, 3, 1), np.float32), np.zeros((4, 3, 1), np.int16),
              ("a",), reasons=reasons)  # fmt: skip
  return training_examples(
    pool, iter(queries), lambda query: np.array(POSITIVES[query]), lambda rows: (PASSAGES[row] for row in rows),
    most=most,
  )  # fmt: skip


def test_the_original_s_files_come_back_through_our_reader(tmp_path):
  counts = write_original(tmp_path / "o" / "train.jsonl", examples())
  assert counts == {"queries": 2, "without a positive": 1, "without a negative": 1}
  data = prepare_source(OriginalJsonl(tmp_path / "o"), tmp_path / "prepared")
  split = data.splits["train"]
  passages = [(passage.title, passage.text) for passage in data.passages.read()]
  assert [query.text for query in split.queries.read()] == ["first?", "second?"]
  wanted = [("", " ".join(filter(None, passage))) for passage in PASSAGES]
  for row, (positives, negatives) in enumerate([([2, 0], [3, 4]), ([4], [0, 2])]):
    assert [passages[place] for place in split.positives(row)] == [wanted[place] for place in positives]
    assert [passages[place] for place in split.negatives.rows(row)] == [wanted[place] for place in negatives]


def test_the_original_s_files_are_what_its_own_reader_takes(tmp_path):
  """It hands each passage to a tokenizer as it stands, and draws from the positives and the negatives of every line."""
  write_original(tmp_path / "train.jsonl", examples(), separator="</s>")
  with open(tmp_path / "train.jsonl", encoding="utf-8") as stream:
    lines = [json.loads(line) for line in stream]
  assert len(lines) == 2 and lines[0]["negatives"] == ["Größe</s>three 猫", "four"]
  for line in lines:
    assert list(line) == ["query", "positives", "negatives"] and isinstance(line["query"], str)
    for passages in (line["positives"], line["negatives"]):
      assert passages and all(isinstance(passage, str) for passage in passages)


def test_no_more_negatives_than_asked_for():
  assert [len(example.negatives) for example in examples(most=1)] == [1, 1, 1, 0]


def test_queries_must_be_those_of_the_pool():
  for queries in (QUERIES[:3], [*QUERIES, "fifth?"]):
    with pytest.raises(ValueError, match="zip"):
      list(examples(queries=queries))


def test_ntuples_have_the_same_columns_everywhere(tmp_path):
  counts = write_ntuples(tmp_path / "n.jsonl", examples(), 2, separator=" | ")
  assert counts == {"lines": 3, "queries": 2, "without a positive": 1, "too few negatives": 1}
  with open(tmp_path / "n.jsonl", encoding="utf-8") as stream:
    lines = [json.loads(line) for line in stream]
  negatives = {"negative_1": "Größe | three 猫", "negative_2": "four"}
  assert lines == [
    {"anchor": "first?", "positive": 'two "quoted"', **negatives},
    {"anchor": "first?", "positive": "T | zero", **negatives},
    {"anchor": "second?", "positive": "four", "negative_1": "T | zero", "negative_2": 'two "quoted"'},
  ]
  with pytest.raises(InputError, match="so many negatives: 3"):
    write_ntuples(tmp_path / "n.jsonl", examples(), 3)


def test_errors_leave_the_old_file(tmp_path):
  write_original(tmp_path / "a.jsonl", [Example("q", [("", "p")], [("", "n")])])

  def broken():
    yield Example("q", [("", "other")], [("", "n")])
    raise RuntimeError("in the middle")

  with pytest.raises(RuntimeError, match="in the middle"):
    write_original(tmp_path / "a.jsonl", broken())
  assert "other" not in (tmp_path / "a.jsonl").read_text()
  assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
  with pytest.raises(InputError, match="at least 1 negative"):
    write_ntuples(tmp_path / "n.jsonl", [], 0)
