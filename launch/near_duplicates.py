"""Near-duplicates among docstrings, which must not be in training and in a split held out."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Iterable

# Two pairs are near-duplicates if any of these holds. Set by reading pairs around each threshold between numpy, scipy,
# jax.numpy and jax.scipy, which document the same functions.
SUMMARY_JACCARD = 0.6  # of the summaries' content words
NAMESAKE_JACCARD = 0.3  # the same where the last part of the name is the same
BODY_CONTAINMENT = 0.5  # of three-word shingles, share of the smaller body
COMMON_SHINGLE = 30  # a shingle in more bodies than this is a package's boilerplate and not counted

_STOP_WORDS = frozenset(  # after the plural's s is gone: "i" is "is", "thi" is "this"
  ("a", "an", "and", "are", "as", "at", "be", "by", "compute", "for", "from", "given", "if", "in", "into", "i", "it")
  + ("of", "on", "or", "over", "return", "that", "the", "thi", "to", "using", "with")
)
_WORD = re.compile(r"[a-z0-9]+")


def summary_words(summary: str) -> tuple[str, ...]:
  """A summary's words in lower case, without punctuation."""
  return tuple(_WORD.findall(summary.lower()))


@functools.lru_cache(maxsize=1 << 16)
def body_words(body: str) -> tuple[str, ...]:
  """A body's words in lower case, without punctuation."""
  return tuple(_WORD.findall(body.lower()))


class DuplicateFinder:
  """Finds near-duplicates of pairs that were added, by inverted indexes over summary words and body shingles."""

  def __init__(self) -> None:
    self._summaries: list[frozenset[str]] = []
    self._names: list[str] = []
    self._shingle_counts: list[int] = []
    self._by_word: dict[str, list[int]] = collections.defaultdict(list)
    self._by_shingle: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)

  def add(self, pairs: Iterable[tuple[str, str, str]]) -> None:
    """Adds pairs (name, summary, body)."""
    for name, summary, body in pairs:
      row = len(self._names)
      self._names.append(_last_part(name))
      self._summaries.append(_content(summary))
      for word in self._summaries[row]:
        self._by_word[word].append(row)
      shingles = _shingles(body)
      self._shingle_counts.append(len(shingles))
      for shingle in shingles:
        self._by_shingle[shingle].append(row)

  def has_duplicate(self, name: str, summary: str, body: str) -> bool:
    """Whether a pair that was added says nearly the same."""
    return self._has_similar_summary(_last_part(name), _content(summary)) or self._has_similar_body(_shingles(body))

  def _has_similar_summary(self, name: str, words: frozenset[str]) -> bool:
    shared = collections.Counter(row for word in words for row in self._by_word.get(word, ()))
    for row, both in shared.items():
      jaccard = both / (len(words) + len(self._summaries[row]) - both)
      if jaccard >= (NAMESAKE_JACCARD if name == self._names[row] else SUMMARY_JACCARD):
        return True
    return False

  def _has_similar_body(self, shingles: frozenset[tuple[str, ...]]) -> bool:
    shared: collections.Counter[int] = collections.Counter()
    for shingle in shingles:
      rows = self._by_shingle.get(shingle, ())
      if len(rows) <= COMMON_SHINGLE:
        shared.update(rows)
    return any(both >= BODY_CONTAINMENT * min(len(shingles), self._shingle_counts[row]) for row, both in shared.items())


def _content(summary: str) -> frozenset[str]:
  words = frozenset(word.removesuffix("s") for word in summary_words(summary))  # returns the elements, return element
  return (words - _STOP_WORDS) or words


def _shingles(body: str, size: int = 3) -> frozenset[tuple[str, ...]]:
  words = body_words(body)
  return frozenset(zip(*(words[start:] for start in range(size)), strict=False))


def _last_part(name: str) -> str:
  return name.rpartition(".")[2]
