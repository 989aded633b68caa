"""BM25 in memory, with documents that come and go; the same scores as `retrieval.bm25`.

The library's index is built once over a corpus. Here document frequencies and the mean length change with each
document, so postings hold counts and a search computes the weights. SQLite's FTS5 was no choice: its k1, b, stemmer
and stop words are others, so a run's measures would not hold for the server.
"""

from __future__ import annotations

import array
import collections
from collections.abc import Sequence

import numpy as np
import Stemmer

from dptdr_jax.serving.collections import Ranked

K1, B = 0.9, 0.4  # of `Bm25.build`
_CHUNK = 4096  # texts tokenized at a time


class Bm25Index:
  """Texts by row. Not thread-safe. Removed places are masked out, and dropped when they are half of all."""

  def __init__(self):
    self._clear()

  def _clear(self) -> None:
    self._postings: dict[str, tuple[array.array, array.array]] = {}  # token → places, counts
    self._lengths, self._rows = array.array("i"), array.array("q")
    self._live = bytearray()
    self._places: dict[int, int] = {}
    self._total = 0  # tokens of live documents

  def __len__(self) -> int:
    return len(self._places)

  def __contains__(self, row: int) -> bool:
    return row in self._places

  def add(self, rows: Sequence[int], texts: Sequence[str]) -> None:
    """Adds texts of rows that are not in the index."""
    for start in range(0, len(texts), _CHUNK):
      chunk = slice(start, start + _CHUNK)
      for row, tokens in zip(rows[chunk], tokenize(texts[chunk]), strict=True):
        self._add(row, tokens)

  def _add(self, row: int, tokens: list[str]) -> None:
    place = self._places[row] = len(self._rows)
    self._rows.append(row)
    self._lengths.append(len(tokens))
    self._live.append(1)
    self._total += len(tokens)
    for token, count in collections.Counter(tokens).items():
      places, counts = self._postings.setdefault(token, (array.array("i"), array.array("i")))
      places.append(place)
      counts.append(count)

  def remove(self, rows: Sequence[int]) -> None:
    """Removes those of some rows that are there."""
    for row in rows:
      if (place := self._places.pop(row, None)) is not None:
        self._live[place] = 0
        self._total -= self._lengths[place]
    if len(self._rows) - len(self) > max(1000, len(self)):
      self._compact()

  def _compact(self) -> None:
    live = np.frombuffer(self._live, np.uint8).astype(bool)
    renumbered = np.cumsum(live) - 1
    postings = self._postings
    rows, lengths = np.array(self._rows, np.int64)[live], np.array(self._lengths, np.int32)[live]
    self._clear()
    self._rows.frombytes(rows.tobytes())
    self._lengths.frombytes(lengths.tobytes())
    self._live = bytearray(b"\1" * len(rows))
    self._places = {row: place for place, row in enumerate(rows.tolist())}
    self._total = int(lengths.sum())
    for token, (places, counts) in postings.items():
      kept = live[old := np.array(places, np.int32)]
      if kept.any():
        new = array.array("i", renumbered[old[kept]].astype(np.int32).tobytes())
        self._postings[token] = new, array.array("i", np.array(counts, np.int32)[kept].tobytes())

  def search(self, text: str, k: int, rows: np.ndarray | None = None) -> Ranked:
    """The k best documents that share a token with the text, among some rows if they are given.

    Scores are float32 and summed in the order of the query's tokens, as `retrieval.bm25` does.
    """
    scores = np.zeros(len(self._rows), np.float32)
    live = np.frombuffer(self._live, np.uint8).astype(bool)
    lengths = np.frombuffer(self._lengths, np.int32) if len(self._rows) else np.zeros(0, np.int32)
    mean = max(self._total / max(1, len(self)), 1e-9)
    for token in tokenize([text])[0]:
      if token in self._postings:
        places, counts = (np.frombuffer(part, np.int32) for part in self._postings[token])
        kept = live[places]
        places, counts = places[kept], counts[kept].astype(np.float64)
        idf = np.log1p((len(self) - len(places) + 0.5) / (len(places) + 0.5))
        norms = K1 * (1 - B + B * lengths[places] / mean)
        scores[places] += (idf * counts / (counts + norms)).astype(np.float32)
    if rows is not None:
      allowed = np.zeros(len(scores), bool)
      allowed[[self._places[row] for row in rows.tolist() if row in self._places]] = True
      scores[~allowed] = 0
    return self._best(scores, k)

  def _best(self, scores: np.ndarray, k: int) -> Ranked:
    numbers = np.array(self._rows, np.int64)
    better = np.flatnonzero(scores > 0)
    if len(better) > k:
      threshold = np.partition(scores[better], -k)[-k]
      better = better[scores[better] >= threshold]
    order = np.lexsort((numbers[better], -scores[better]))[:k]
    return Ranked(numbers[better[order]], scores[better[order]])


def tokenize(texts: Sequence[str]) -> list[list[str]]:
  """Stemmed tokens without stop words, as `retrieval.bm25` makes them."""
  import bm25s  # computes on a jax device when it is imported

  return bm25s.tokenize(
    list(texts), stopwords="english", stemmer=Stemmer.Stemmer("english"), return_ids=False, show_progress=False
  )
