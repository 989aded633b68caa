"""Training sets for other trainers: the original's JSONL and n-tuples, line by line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval.candidates import Pool, Reason
from dptdr_jax.retrieval.exports import Example, training_examples, write_ntuples, write_original

PASSAGES = [("T", "zero"), ("", "one \u2028 line"), ("", 'two "quoted"'), ("Größe", "three 猫"), ("", "four")]
QUERIES = ["first?", "second?", "third?", "fourth?"]
POSITIVES = [[2, 0], [4], [], [1]]


def examples(queries=QUERIES):
  rows = np.array([[3, 1, 4], [0, 2, -1], [0, 1, -1], [-1, -1, -1]], np.int32)
  reasons = np.zeros(rows.shape, np.uint8)
  reasons[0, 1] = Reason.SAME_TEXT
  pool = Pool(rows, (rows >= 0).astype(np.uint16), np.zeros((4, 3, 1), np.float32), np.zeros((4, 3, 1), np.int16),
              reasons, np.zeros((4, 1), np.float32), ("a",))  # fmt: skip
  return training_examples(
    pool, iter(queries), lambda query: np.array(POSITIVES[query]), lambda rows: (PASSAGES[row] for row in rows)
  )


def test_lines_of_the_original_have_lists_of_strings(tmp_path):
  """The original gives each passage to a tokenizer, and draws from the positives and the negatives of every line."""
  counts = write_original(tmp_path / "train.jsonl", examples(), separator="</s>")
  assert counts == {"queries": 2, "without a positive": 1, "without a negative": 1}
  with open(tmp_path / "train.jsonl", encoding="utf-8") as stream:
    lines = [json.loads(line) for line in stream]
  assert lines == [
    {"query": "first?", "positives": ['two "quoted"', "T</s>zero"], "negatives": ["Größe</s>three 猫", "four"]},
    {"query": "second?", "positives": ["four"], "negatives": ["T</s>zero", 'two "quoted"']},
  ]


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
  with pytest.raises(InputError, match="this many negatives: 3"):
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
