"""Does a passage contain an answer? Open-domain question answering's relevance, after DPR's definition.

DPR (Karpukhin et al., EMNLP 2020), after DrQA: answer and passage are normalised to NFD and lower-cased. Tokens are
runs of letters, digits and marks, or else single characters. An answer matches if the passage has its tokens in a row.
So "the US" matches "(The US)" but not "the USA", "1,200" is three tokens, and accents count ("café" ≠ "cafe").
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
import regex

from dptdr_jax.core import progress
from dptdr_jax.retrieval.runs import Run

# DrQA's SimpleTokenizer: letters, numbers and marks together; any other character that is neither space nor control.
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
_QUERIES = 64  # whose passages are read together
_BETWEEN = "\0"  # a control character, so in no token: a match between two of them is one of whole tokens


def tokens(text: str) -> list[str]:
  """Splits a text into DPR's lower-cased tokens."""
  return [token.lower() for token in _TOKEN.findall(unicodedata.normalize("NFD", text))]


def match_run(
  run: Run, answers: Sequence[Sequence[str]], texts: Callable[[np.ndarray], Sequence[str]], *, depth: int = 100
) -> np.ndarray:
  """Marks the passages of a run that contain an answer of their query; one without a token is in no passage.

  Args:
    run: Q queries.
    answers: Q lists of answers.
    texts: texts(passage rows) → as many texts. DPR matches in the text without its title.
    depth: ranks to match.

  Returns:
    bool [Q, min(depth, K)]; a fill is no hit.
  """
  rows = run.rows[:, :depth]
  hits = np.zeros(rows.shape, bool)
  with progress.bar("match answers", len(rows), "query") as shown:
    for start in range(0, len(rows), _QUERIES):
      block = rows[start : start + _QUERIES]
      wanted, place = np.unique(block[block >= 0], return_inverse=True)
      read, place = texts(wanted), iter(place.tolist())
      for query, count in enumerate((block >= 0).sum(1).tolist(), start):
        needles = [_joined(answer) for answer in answers[query]]
        hits[query, :count] = [_contains(_joined(read[next(place)]), needles) for _ in range(count)]
      shown.advance(len(block))
  return hits


@functools.lru_cache(maxsize=20_000)  # many queries retrieve the same passage
def _joined(text: str) -> str:
  return _BETWEEN + "".join(token + _BETWEEN for token in tokens(text))


def _contains(haystack: str, needles: Sequence[str]) -> bool:
  return any(needle in haystack for needle in needles if needle != _BETWEEN)
