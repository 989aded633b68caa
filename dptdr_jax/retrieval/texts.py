"""The text rules of denoising: a candidate that says what a positive says is no negative, whatever its id."""

from __future__ import annotations

import collections
import dataclasses
import functools
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import regex

from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval.candidates import Pool, Reason
from dptdr_jax.retrieval.denoise import Verdict
from dptdr_jax.retrieval.qrels import Qrels

_KEPT = 100_000_000  # characters of normalised passages that stay in memory
_AT_ONCE = 16_384  # passages read at a time: one by one takes ten times as long
_SHINGLED = 20  # how many times as much a passage counts where its shingles may be kept with it
_SIGNS = regex.compile(r"[^\p{L}\p{M}\p{N}]+")  # what is neither letter nor mark nor digit
_ASCII = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}

# int [n] passage rows → their n (title, text), in that order
Texts = Callable[[np.ndarray], Iterable[tuple[str, str]]]


@dataclasses.dataclass(frozen=True)
class TextRule:
  """Takes out candidates whose normalised text equals or contains a positive's, and near-duplicates of one.

  Two passages are the same where the texts are, without their titles or with them (joined by a space, as BM25 sees
  them), or one without and the other with. A candidate contains a positive where its title and text have the
  positive's text in one piece. Near-duplicates are told by the Jaccard similarity of the texts' word shingles (Broder,
  1997), |A ∩ B| / |A ∪ B|.

  What is read and normalised are the positives and the candidates that are still negatives; those met lately stay in
  memory, as hard negatives are the same passages again and again.

  Attributes:
    positives: judgements of the Q queries; rows with a grade above 0 count.
    texts: see Texts.
    contains_from: characters of normalised text from which on a positive can be contained; None: never. The default is
      ours, about seven English words: a shorter positive ("Yes.", a name) stands in passages that do not answer.
    near_duplicate: similarity from which on a candidate goes, in (0, 1]; None: off.
    shingle: words a shingle; a text of fewer words is one shingle. (Texts without spaces between words are one too.)
  """

  positives: Qrels
  texts: Texts
  contains_from: int | None = 40
  near_duplicate: float | None = None
  shingle: int = 3
  _met: _Met = dataclasses.field(default_factory=lambda: _Met(), init=False, repr=False, compare=False)

  def __post_init__(self):
    if self.contains_from is not None and self.contains_from < 1:
      raise InputError("contains_from is a number of characters from 1", value=self.contains_from)
    if self.near_duplicate is not None and not 0 < self.near_duplicate <= 1:
      raise InputError("near_duplicate is a similarity above 0, at most 1", value=self.near_duplicate)
    if self.shingle < 1:
      raise InputError("a shingle has at least 1 word", value=self.shingle)

  def describe(self) -> dict[str, Any]:
    """As denoise.Rule."""
    return {"rule": "text", **{key: getattr(self, key) for key in ("contains_from", "near_duplicate", "shingle")}}

  def judge(self, pool: Pool, block: slice, kept: np.ndarray) -> Verdict:
    """As denoise.Rule. A query without a positive has unjudged candidates."""
    if len(self.positives) != len(pool):
      raise ValueError(f"judgements of {len(self.positives)} queries for a pool of {len(pool)}")
    found, unjudged = np.zeros(kept.shape, np.uint8), 0
    judged: list[tuple[int, np.ndarray, np.ndarray]] = []  # place, positives, candidates
    for place in np.flatnonzero(kept.any(1)):
      rows, grades = self.positives.of(block.start + place)
      rows = rows[grades > 0]
      if len(rows):
        judged.append((place, rows, pool.rows[block.start + place][kept[place]]))
      else:
        unjudged += int(kept[place].sum())
    for some in _groups(judged):
      self._meet(np.concatenate([part for _, *parts in some for part in parts]))
      for place, rows, candidates in some:
        found[place, kept[place]] = self._reasons(rows, candidates)
      self._forget()
    reasons = (Reason.SAME_TEXT, Reason.CONTAINS, Reason.NEAR_DUPLICATE)
    return Verdict({reason: found == reason for reason in reasons}, unjudged)

  def _reasons(self, positives: np.ndarray, candidates: np.ndarray) -> list[Reason]:
    known, others = ([self._met[row] for row in rows.tolist()] for rows in (positives, candidates))
    same = {text for form in known for text in form.whole if text}
    inside = [form.text for form in known if self.contains_from is not None and len(form.text) >= self.contains_from]
    return [self._reason(form, known, same, inside) for form in others]

  def _meet(self, rows: np.ndarray) -> None:
    """Reads what is not in memory, all at once."""
    wanted = np.unique(rows).tolist()
    missing = [row for row in wanted if row not in self._met]
    if missing:
      found = list(self.texts(np.array(missing)))
      if len(found) != len(missing):
        raise ValueError(f"{len(found)} texts for {len(missing)} passage rows")
      for row, passage in zip(missing, found, strict=True):
        self._met.add(row, _Form(*passage, self.shingle))
    for row in wanted:
      self._met.move_to_end(row)

  def _forget(self) -> None:
    """Drops what was met longest ago, where it is too much."""
    while self._met.characters * (1 if self.near_duplicate is None else _SHINGLED) > _KEPT:
      self._met.forget()

  def _reason(self, candidate: _Form, positives: list[_Form], same: set[str], inside: list[str]) -> Reason:
    if not same.isdisjoint(candidate.whole):
      return Reason.SAME_TEXT
    if any(text in candidate.joined for text in inside):
      return Reason.CONTAINS
    if self.near_duplicate is not None:
      words = candidate.text.split()
      for positive in positives:
        # |A ∩ B| / |A ∪ B| ≥ t wants t of the positive's shingles in the candidate, hence their first words: cheap, and
        # enough to pass over most candidates at high thresholds
        common = sum(positive.starts[word] for word in positive.starts.keys() & words)
        if common < self.near_duplicate * len(positive.shingles):
          continue
        if similarity(candidate.shingles, positive.shingles) >= self.near_duplicate:
          return Reason.NEAR_DUPLICATE
    return Reason.KEPT


def _groups(judged: Iterable[tuple[int, np.ndarray, np.ndarray]]) -> Iterator[list[tuple[int, np.ndarray, np.ndarray]]]:
  """Cuts (place, positives, candidates) into groups of about _AT_ONCE passages."""
  some, count = [], 0
  for item in judged:
    some.append(item)
    count += len(item[1]) + len(item[2])
    if count >= _AT_ONCE:
      yield some
      some, count = [], 0
  if some:
    yield some


def normalise(text: str) -> str:
  """Text without what a copy may change: its letters (with their marks) and digits, NFKC, case folded, one space
  between runs of them. A text that has none keeps its signs."""
  if text.isascii():  # NFKC leaves it as it is
    return " ".join(text.translate(_ASCII).split()) or " ".join(text.split())
  folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())  # folding can undo NFKC
  return _SIGNS.sub(" ", folded).strip() or " ".join(folded.split())


def shingles(text: str, size: int) -> frozenset[tuple[str, ...]]:
  """All runs of `size` words of a text; of a shorter one, the run of all its words."""
  words = text.split()
  if len(words) <= size:
    return frozenset([tuple(words)])
  return frozenset(zip(*(words[start:] for start in range(size)), strict=False))


def similarity(first: frozenset, second: frozenset) -> float:
  """Jaccard similarity of two sets that are not both empty."""
  common = len(first & second)
  return common / (len(first) + len(second) - common)


class _Form:
  """A passage as the rules compare it: its normalised text, alone and behind its title; shingles when asked for."""

  def __init__(self, title: str, text: str, size: int):
    self.text = normalise(text)
    self.joined = f"{normalise(title)} {self.text}".strip() if title else self.text
    self.whole = (self.text, self.joined)
    self._size = size

  @functools.cached_property
  def shingles(self) -> frozenset[tuple[str, ...]]:
    return shingles(self.text, self._size)

  @functools.cached_property
  def starts(self) -> collections.Counter[str]:
    """How many shingles begin with a word."""
    return collections.Counter(shingle[0] for shingle in self.shingles if shingle)


class _Met(collections.OrderedDict[int, _Form]):
  """Forms of passage rows, those met longest ago first, and how many characters they have."""

  characters = 0

  def add(self, row: int, form: _Form) -> None:
    self[row] = form
    self.characters += len(form.text) + len(form.joined)

  def forget(self) -> None:
    """Drops the form that was met longest ago."""
    form = self.popitem(last=False)[1]
    self.characters -= len(form.text) + len(form.joined)
