"""DPR's answer match, case by case."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest

from dptdr_jax.retrieval.answers import match_run, tokens
from dptdr_jax.retrieval.runs import Run


def test_tokens_are_those_of_dpr():
  assert tokens("U.S. won 1,200 medals—in ’08!") == ["u", ".", "s", ".", "won", "1", ",", "200", "medals", "—", "in",
                                                     "’", "08", "!"]  # fmt: skip
  assert tokens(" \t\n\u200b\u00a0") == []
  assert tokens("東京 Tōkyō") == ["東京", unicodedata.normalize("NFD", "tōkyō")]


@pytest.mark.parametrize(
  ("text", "answers", "expected"),
  [
    ("He moved to New  \n York City.", ["New York"], True),
    ("He moved to Newyork.", ["new york"], False),
    ("the USA", ["US"], False),  # whole tokens
    ("1,200 people", ["1,200"], True),
    ("1200 people", ["1,200"], False),  # no number is normalised
    ("Beyoncé sang", ["Beyonce\u0301"], True),  # composed and decomposed are one
    ("Beyoncé sang", ["Beyonce"], False),  # but an accent counts
    ("STRASSE", ["straße"], False),  # lower(), not casefold()
    ("ΟΔΟΣ ÅNGSTRÖM", ["ångström"], True),
    ("it was Jupiter", ["mars", "Venus", "jupiter"], True),
    ("it was Jupiter", ["mars", "Venus"], False),
    ("rock'n'roll", ["rock 'n' roll"], True),  # punctuation is a token, the space around it is not
    ("rock n roll", ["rock 'n' roll"], False),
    ("anything", [""], False),
    ("b a b a c", ["b a c"], True),
  ],
)
def test_contains_answer(text, answers, expected):
  assert contains_answer(text, answers) is expected


def contains_answer(text: str, answers: list[str]) -> bool:
  run = Run(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32))
  return bool(match_run(run, [answers], lambda rows: [text]))


def by_definition(text: str, answers: list[str]) -> bool:
  """DPR's definition: an answer's list of tokens is a part of the text's."""
  words = tokens(text)
  return any(
    words[i : i + len(answer)] == answer
    for answer in map(tokens, answers) if answer
    for i in range(len(words) - len(answer) + 1)
  )  # fmt: skip


def test_match_is_that_of_the_definition():
  generator = np.random.default_rng(5)
  alphabet = ["a", "A", "b", "ab", ",", " ", "é", "e\u0301", "1", "\0", "\u0301"]
  for _ in range(2000):
    text = "".join(generator.choice(alphabet, 8))
    answer = "".join(generator.choice(alphabet, 2))
    assert contains_answer(text, [answer]) == by_definition(text, [answer]), (text, answer)


def test_match_run_marks_passages_with_an_answer():
  texts = ["Paris is in France", "Rome", "the city of paris", "nothing"]
  run = Run(np.array([[3, 0, 2], [1, -1, -1], [-1, -1, -1]], np.int32), np.zeros((3, 3), np.float32))
  run = Run(np.tile(run.rows, (50, 1)), np.tile(run.scores, (50, 1)))
  hits = match_run(run, [["Paris"], ["Rom"], ["x"]] * 50, lambda rows: [texts[row] for row in rows], depth=2)
  assert hits.shape == (150, 2)
  assert hits[:3].tolist() == [[False, True], [False, False], [False, False]]
  assert np.array_equal(hits, np.tile(hits[:3], (50, 1)))
