"""The text rule of denoising: a candidate whose text equals or contains a positive's is no negative."""

from __future__ import annotations

import collections
import dataclasses
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import regex

from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval.candidates import Pool, Reason
from dptdr_jax.retrieval.denoise import Verdict
from dptdr_jax.retrieval.qrels import Qrels

_CACHED = 100_000_000  # characters of normalised passages in memory
_AT_ONCE = 16_384  # passages read at a time: one by one takes ten times as long
_PUNCTUATION = regex.compile(r"[^\p{L}\p{M}\p{N}]+")  # neither letter nor mark nor digit
_ASCII = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}

# int [n] passage rows → their n (title, text), in that order
Texts = Callable[[np.ndarray], Iterable[tuple[str, str]]]


@dataclasses.dataclass(frozen=True)
class TextRule:
  """Removes candidates whose normalised text equals or contains a positive's.

  Two passages are equal if their texts are, each with or without its title (joined by a space, as BM25 reads them). A
  candidate contains a positive if its title and text have the positive's text in one piece.

  Only positives, and candidates that are still negatives, are read and normalised; recent ones stay in memory, as hard
  negatives are the same passages again and again.

  Attributes:
    positives: judgements of the Q queries; rows with a grade above 0 count.
    texts: see Texts.
    contains_from: shortest positive, in characters of normalised text, that can be contained; None: never. The default
      is ours, about seven English words: a shorter positive ("Yes.", a name) occurs in passages that do not answer.
  """

  positives: Qrels
  texts: Texts
  contains_from: int | None = 40
  _cache: _Cache = dataclasses.field(default_factory=lambda: _Cache(), init=False, repr=False, compare=False)

  def __post_init__(self):
    if self.contains_from is not None and self.contains_from < 1:
      raise InputError("contains_from is a number of characters from 1", value=self.contains_from)

  def describe(self) -> dict[str, Any]:
    """As denoise.Rule."""
    return {"rule": "text", "contains_from": self.contains_from}

  def judge(self, pool: Pool, block: slice, kept: np.ndarray) -> Verdict:
    """As denoise.Rule. The candidates of a query without a positive are not judged."""
    if block.stop > len(self.positives):
      raise ValueError(f"judgements of {len(self.positives)} queries for a pool of more")
    reasons, unjudged = np.zeros(kept.shape, np.uint8), 0
    judged: list[tuple[int, np.ndarray, np.ndarray]] = []  # place, positives, candidates
    for place in np.flatnonzero(kept.any(1)):
      rows, grades = self.positives.of(block.start + place)
      rows = rows[grades > 0]
      if len(rows):
        judged.append((place, rows, pool.rows[place][kept[place]]))
      else:
        unjudged += int(kept[place].sum())
    for group in _groups(judged):
      self._read(np.concatenate([rows for _, *parts in group for rows in parts]))
      for place, rows, candidates in group:
        reasons[place, kept[place]] = self._reasons(rows, candidates)
      self._cache.shrink()
    return Verdict({reason: reasons == reason for reason in (Reason.SAME_TEXT, Reason.CONTAINS)}, unjudged)

  def _reasons(self, positives: np.ndarray, candidates: np.ndarray) -> list[Reason]:
    known = [self._cache[row] for row in positives.tolist()]
    same = {text for passage in known for text in passage if text}
    inside = [text for text, _ in known if self.contains_from is not None and len(text) >= self.contains_from]
    return [_reason(self._cache[row], same, inside) for row in candidates.tolist()]

  def _read(self, rows: np.ndarray) -> None:
    """Reads what is not in memory, all at once."""
    wanted = np.unique(rows).tolist()
    missing = [row for row in wanted if row not in self._cache]
    if missing:
      read = list(self.texts(np.array(missing)))
      if len(read) != len(missing):
        raise ValueError(f"{len(read)} texts for {len(missing)} passage rows")
      for row, passage in zip(missing, read, strict=True):
        self._cache.add(row, _normalised(*passage))
    for row in wanted:
      self._cache.move_to_end(row)


def _reason(candidate: tuple[str, str], same: set[str], inside: list[str]) -> Reason:
  if not same.isdisjoint(candidate):
    return Reason.SAME_TEXT
  if any(text in candidate[1] for text in inside):
    return Reason.CONTAINS
  return Reason.KEPT


def _groups(judged: Iterable[tuple[int, np.ndarray, np.ndarray]]) -> Iterator[list[tuple[int, np.ndarray, np.ndarray]]]:
  """Cuts (place, positives, candidates) into groups of about _AT_ONCE passages."""
  group, count = [], 0
  for item in judged:
    group.append(item)
    count += len(item[1]) + len(item[2])
    if count >= _AT_ONCE:
      yield group
      group, count = [], 0
  if group:
    yield group


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


class _Cache(collections.OrderedDict[int, tuple[str, str]]):
  """Normalised passages by row, those used longest ago first."""

  characters = 0

  def add(self, row: int, passage: tuple[str, str]) -> None:
    self[row] = passage
    self.characters += sum(map(len, passage))

  def shrink(self) -> None:
    """Drops what was used longest ago while there is too much."""
    while self.characters > _CACHED:
      self.characters -= sum(map(len, self.popitem(last=False)[1]))
