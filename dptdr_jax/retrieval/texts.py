"""The text rule of denoising: a candidate whose text equals or contains a positive's is no negative."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import regex

from dptdr_jax.retrieval.candidates import Pool, Reason
from dptdr_jax.retrieval.denoise import Verdict
from dptdr_jax.retrieval.qrels import Qrels

# Shortest positive, in characters of normalised text, that can be contained; ours, about seven English words: a shorter
# one ("Yes.", a name) occurs in passages that do not answer.
_CONTAINS_FROM = 40
_CACHED = 50_000  # normalised passages in memory
_QUERIES = 64  # whose passages are read together: one by one takes ten times as long
_PUNCTUATION = regex.compile(r"[^\p{L}\p{M}\p{N}]+")  # neither letter nor mark nor digit
_ASCII = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}

# int [n] passage rows → their n (title, text), in that order
Texts = Callable[[np.ndarray], Iterable[tuple[str, str]]]


@dataclasses.dataclass(frozen=True)
class TextRule:
  """Removes candidates whose normalised text equals or contains a positive's.

  Two passages are equal if their texts are, each with or without its title (joined by a space, as BM25 reads them). A
  candidate contains a positive if its title and text have the positive's text in one piece.

  Only positives, and candidates that are still negatives, are read and normalised. They stay in memory for a while, as
  hard negatives are the same passages again and again.

  Attributes:
    positives: judgements of the Q queries; rows with a grade above 0 count.
    texts: see Texts.
  """

  positives: Qrels
  texts: Texts
  _cache: dict[int, tuple[str, str]] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

  def describe(self) -> dict[str, Any]:
    return {"rule": "text", "contains_from": _CONTAINS_FROM}

  def judge(self, pool: Pool, block: slice, kept: np.ndarray) -> Verdict:
    reasons, unjudged = np.zeros(kept.shape, np.uint8), 0
    judged: list[tuple[int, np.ndarray, np.ndarray]] = []  # place, positives, candidates
    for place in np.flatnonzero(kept.any(1)):
      rows, grades = self.positives.of(block.start + place)
      rows = rows[grades > 0]
      if len(rows):
        judged.append((place, rows, pool.rows[place][kept[place]]))
      else:
        unjudged += int(kept[place].sum())
    for start in range(0, len(judged), _QUERIES):
      group = judged[start : start + _QUERIES]
      self._read(np.concatenate([rows for _, *parts in group for rows in parts]))
      for place, rows, candidates in group:
        reasons[place, kept[place]] = self._reasons(rows, candidates)
    return Verdict({reason: reasons == reason for reason in (Reason.SAME_TEXT, Reason.CONTAINS)}, unjudged)

  def _reasons(self, positives: np.ndarray, candidates: np.ndarray) -> list[Reason]:
    known = [self._cache[row] for row in positives.tolist()]
    same = {text for passage in known for text in passage if text}
    inside = [text for text, _ in known if len(text) >= _CONTAINS_FROM]
    return [_reason(self._cache[row], same, inside) for row in candidates.tolist()]

  def _read(self, rows: np.ndarray) -> None:
    """Reads what is not in memory, all at once."""
    if len(self._cache) > _CACHED:
      self._cache.clear()
    missing = [row for row in np.unique(rows).tolist() if row not in self._cache]
    if missing:
      for row, passage in zip(missing, self.texts(np.array(missing)), strict=True):
        self._cache[row] = _normalised(*passage)


def _reason(candidate: tuple[str, str], same: set[str], inside: list[str]) -> Reason:
  if not same.isdisjoint(candidate):
    return Reason.SAME_TEXT
  if any(text in candidate[1] for text in inside):
    return Reason.CONTAINS
  return Reason.KEPT


def normalise(text: str) -> str:
  """Text without what a copy may change: its letters (with their marks) and digits, NFKC, case folded, one space
  between runs of them. A text that has none keeps its punctuation."""
  if text.isascii():  # NFKC leaves it as it is
    return " ".join(text.translate(_ASCII).split()) or " ".join(text.split())
  folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())  # folding can undo NFKC
  return _PUNCTUATION.sub(" ", folded).strip() or " ".join(folded.split())


def _normalised(title: str, text: str) -> tuple[str, str]:
  """A passage as the rule compares it: its normalised text, alone and behind its title."""
  text = normalise(text)
  return text, f"{normalise(title)} {text}".strip() if title else text
