"""Pairs of spans for retrieval-oriented pretraining, as a function of (seed, 'pretrain', step).

A pair is two random spans of one passage that do not overlap (coCondenser, arXiv 2108.05540). With spans of at most S
tokens of text and at least s = SHORTEST, a passage of n tokens gives:

  n ≥ both   Each span aims at S tokens, or with probability `short_share` at a random length from s on. Both lie
             anywhere in the passage.
  n < both   ('cut') The passage is cut in two at a random place, within a quarter of its length around the ratio of
             the two aimed lengths. So a short span stays short. This is the usual case on MS MARCO. A half longer than
             S gives S tokens. Then both spans lie anywhere, and up to a quarter of the text is in neither.
  n < 2 · s  ('twins') Halves would say nothing about each other ('The' | 'Beatles'): both spans are the whole
             passage, and only masks and dropout tell them apart (SimCSE, arXiv 2104.08821).
  n = 0      ('empty') The tokenizer makes nothing of the text: never drawn.

Spans begin and end with whole words: an end within a word moves inwards (unless the span would be part of one word).
Where two spans meet, their common border moves, and no word is lost.

With `overlap` each span is drawn by itself anywhere in the passage (Contriever, arXiv 2112.09118). A passage no longer
than the aimed length is then the span itself, twice ('twins'): choose spans well below the length of the passages.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dptdr_jax.core.errors import InputError
from dptdr_jax.data import ragged
from dptdr_jax.data.batches import Batch, load_ahead
from dptdr_jax.data.groups import generator
from dptdr_jax.data.masking import Masking
from dptdr_jax.data.store import TokenStore, bucketed

STAGE = "pretrain"
SHORTEST = 8  # fewest tokens of text in a span, before its ends move to whole words


@dataclasses.dataclass(frozen=True)
class SpanLengths:
  """How long spans are.

  Attributes:
    tokens: limit of a span, special tokens included.
    short_share: probability that a span aims at a random length instead of the limit.
    overlap: whether the two spans of a passage may overlap.
  """

  tokens: int = 128
  short_share: float = 0.1
  overlap: bool = False

  def text(self, num_special: int) -> int:
    """Returns S, the most tokens of text in a span; an InputError if that is less than twice SHORTEST."""
    full = self.tokens - num_special
    if full < 2 * SHORTEST:
      raise InputError("spans are too short", value=self.tokens,
                       fix=f"Set pretrain.span_tokens to {2 * SHORTEST + num_special} or more")  # fmt: skip
    return full


class Drawn(NamedTuple):
  """The passages of a step by corpus, row and epoch, int64 [n] each."""

  corpora: np.ndarray
  rows: np.ndarray
  epochs: np.ndarray


class SpanBatches:
  """`batches[step]` → this host's slice of the global batch of a step.

  Every corpus is a stream of its own: one permutation per epoch drawn from (seed, corpus, epoch), one epoch after the
  other. Of the n passages of a step each corpus gives a share that is proportional to its size; a share below one
  passage gives one every few steps. Before a step all K corpora have given N_K = step·n passages and the first k of
  them N_k = ⌊N_(k+1)·W_k / W_(k+1)⌋, with cumulative shares W. So a step determines where each stream is, and no stream
  goes back (with N_k = ⌊N_K·W_k⌋ one with a share below a passage might).

  The global batch has S = 2n spans. Host p of h gets s = S / h of them, with K masked tokens at most. A batch has:
    tokens int32 [s, T], lengths int32 [s]: spans 2i and 2i + 1 are of one passage. Masked if there is masking.
    positions int32 [s, K], labels int32 [s, K]: masked tokens and their ids, −1 fills. Only with masking.
    groups int32 [S]: equal for spans of the same text. A small corpus may come round within a batch, and a text may be
    in two corpora, or twice in one.

  Args:
    stores: token stores with words, one a corpus.
    lengths: see SpanLengths.
    masking: None: spans are not masked.
    batch_size: S, even.
    neighbours: k, passages drawn in a row in the corpus' order; 1: each by itself. Where the rows begin changes from
      epoch to epoch.
    host, num_hosts: which slice.
  """

  def __init__(
    self,
    stores: Sequence[TokenStore],
    lengths: SpanLengths,
    masking: Masking | None,
    *,
    batch_size: int,
    seed: int,
    neighbours: int = 1,
    host: int = 0,
    num_hosts: int = 1,
  ):
    self._stores, self._lengths, self._masking = list(stores), lengths, masking
    self._full = lengths.text(stores[0].num_special)
    if batch_size % (2 * num_hosts) or batch_size < 4:
      raise InputError("a batch has two pairs of spans at least, and as many for each host", value=batch_size,
                       fix=f"Set pretrain.spans to 4 or more, a multiple of {2 * num_hosts}")  # fmt: skip
    self._passages, self._seed, self._neighbours = batch_size // 2, seed, neighbours
    share = batch_size // num_hosts
    self._mine = slice(host * share, (host + 1) * share)
    self._kept = [_with_text(store) for store in stores]
    self._ratios = _ratios([len(kept) for kept in self._kept])
    self._order = functools.lru_cache(maxsize=2 * len(stores))(self._permutation)

  @property
  def steps_per_epoch(self) -> float:
    """Steps until as many passages are drawn as all corpora have."""
    return sum(len(kept) for kept in self._kept) / self._passages

  def counts(self) -> list[dict[str, int]]:
    """Returns for each corpus the number of passages by kind: 'whole' (two full spans), 'cut', 'twins', 'empty'.

    With overlap none is cut: 'whole' are passages longer than a full span, the others 'twins'.
    """
    counted, full = [], self._full
    edges = [1, full + 1, full + 1] if self._lengths.overlap else [1, 2 * SHORTEST, 2 * full]
    for store in self._stores:
      kinds = np.searchsorted(edges, store.lengths, side="right")
      numbers = np.bincount(kinds, minlength=4).tolist()
      counted.append(dict(zip(("empty", "twins", "cut", "whole"), numbers, strict=True)))
    return counted

  def position(self, step: int) -> list[dict[str, int]]:
    """Returns where each corpus' stream is before a step: epoch and passage within it."""
    places = [divmod(int(count), len(kept)) for count, kept in zip(self._advanced(step), self._kept, strict=True)]
    return [{"epoch": epoch, "passage": place} for epoch, place in places]

  def draw(self, step: int) -> Drawn:
    """Returns the passages of the global batch of a step."""
    before, after = self._advanced(step), self._advanced(step + 1)
    corpora, rows, epochs = [], [], []
    for corpus, (first, last) in enumerate(zip(before, after, strict=True)):
      kept = self._kept[corpus]
      epoch, within = np.divmod(np.arange(first, last), len(kept))
      drawn = np.empty(len(within), np.int64)
      for number in np.unique(epoch):
        here = epoch == number
        drawn[here] = kept[self._order(corpus, int(number))[within[here]]]
      corpora.append(np.full(len(drawn), corpus))
      rows.append(drawn)
      epochs.append(epoch)
    return Drawn(*(np.concatenate(part) for part in (corpora, rows, epochs)))

  def __getitem__(self, step: int) -> Batch:
    drawn, random = self.draw(step), generator(self._seed, STAGE, "spans", 0, step)
    totals, word_starts = self._whole(drawn)
    first, count = cut(totals, self._lengths, self._full, random)
    first, count = (part.ravel() for part in _to_words(first, count, totals, word_starts, self._full))
    tokens, lengths, starts = self._gather(drawn, first, count, totals, word_starts)
    batch = {"tokens": tokens, "lengths": lengths}
    if self._masking is not None:
      masked = self._masking.apply(tokens, starts > 0, starts >= 0, random)
      batch["tokens"], batch["positions"], batch["labels"] = masked
    batch = {name: value[self._mine] for name, value in batch.items()}
    batch["groups"] = np.repeat(self._groups(drawn), 2)
    return batch

  def load(self, start_step: int, stop_step: int, workers: int = 2) -> Iterator[Batch]:
    """Yields the batches of start_step … stop_step − 1, prepared in threads; see `batches.load_ahead`."""
    return load_ahead(self.__getitem__, start_step, stop_step, workers)

  def _groups(self, drawn: Drawn) -> np.ndarray:
    """A number for each different text that is drawn, int32 [n]."""
    numbers: dict[bytes, int] = {}
    texts = (self._stores[corpus][row].tobytes() for corpus, row in zip(drawn.corpora, drawn.rows, strict=True))
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int32)

  def _advanced(self, step: int) -> np.ndarray:
    """How many passages each corpus has given before a step."""
    given = [step * self._passages]  # by all corpora, by all but the last, …, by none
    for ratio in self._ratios[::-1]:
      given.append(int(given[-1] * ratio))
    return np.diff(given[::-1])

  def _permutation(self, corpus: int, epoch: int) -> np.ndarray:
    random = generator(self._seed, f"{STAGE}/{corpus}", "order", epoch, 0)
    return shuffled(len(self._kept[corpus]), self._neighbours, random)

  def _whole(self, drawn: Drawn) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each passage int64 [n], and where words start in them, one passage after the other."""
    totals, parts = [], []
    for corpus, store in enumerate(self._stores):
      rows = drawn.rows[drawn.corpora == corpus]
      totals.append(store.lengths_at(rows))
      parts.append(store.words(rows))
    return np.concatenate(totals), np.concatenate(parts)

  def _gather(self, drawn, first, count, totals, word_starts):
    """Tokens [S, T], lengths [S], and int8 [S, T]: 1 where a word starts, 0 within one, −1 outside of the text."""
    owner = np.repeat(np.arange(len(drawn.rows)), 2)
    width = bucketed(count.max() + self._stores[0].num_special, self._lengths.tokens)
    tokens, lengths = [], []
    for corpus, store in enumerate(self._stores):
      here = drawn.corpora[owner] == corpus
      part = store.spans(drawn.rows[owner[here]], first[here], count[here], width)
      tokens.append(part[0])
      lengths.append(part[1])
    flat = ragged.gather(word_starts, ragged.offsets_of(totals)[owner] + first, count)
    starts = np.full((len(owner), width), -1, np.int8)
    place = np.arange(width) - self._stores[0].num_before
    starts[(place >= 0) & (place < count[:, None])] = flat
    return np.concatenate(tokens), np.concatenate(lengths), starts


def cut(
  totals: np.ndarray, lengths: SpanLengths, full: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Draws two spans in each passage; the module's docstring says how.

  Args:
    totals: int64 [n], tokens of each passage, at least 1.
    full: S, tokens of text in the longest span.

  Returns:
    First token and number of tokens, int64 [n, 2] each.
  """
  count = len(totals)
  short, length, place = random.random((count, 2)), random.random((count, 2)), random.random((count, 2))
  jitter, swap = random.random(count), random.random(count) < 0.5
  drawn = SHORTEST + np.floor(length * (full - SHORTEST)).astype(np.int64)
  aims = np.where(short < lengths.short_share, drawn, full)
  if lengths.overlap:
    sizes = np.minimum(aims, totals[:, None])
    return np.floor(place * (totals[:, None] - sizes + 1)).astype(np.int64), sizes
  ratio = aims[:, 0] / aims.sum(1) + (jitter - 0.5) / 2
  left = np.clip(np.rint(totals * ratio).astype(np.int64), SHORTEST, np.maximum(totals - SHORTEST, SHORTEST))
  halves = np.minimum(np.stack([left, totals - left], 1), full)
  sizes = np.where((aims.sum(1) <= totals)[:, None], aims, halves)
  slack = totals - sizes.sum(1)
  gaps = np.sort(np.floor(place * (slack + 1)[:, None]).astype(np.int64), axis=1)
  leading = np.where(swap, sizes[:, 1], sizes[:, 0])
  starts = np.stack([gaps[:, 0], gaps[:, 1] + leading], 1)
  starts = np.where(swap[:, None], starts[:, ::-1], starts)
  twins = (totals < 2 * SHORTEST)[:, None]
  return np.where(twins, 0, starts), np.where(twins, totals[:, None], sizes)


def shuffled(count: int, neighbours: int, random: np.random.Generator) -> np.ndarray:
  """Returns a permutation of `count` rows, int64, in which groups of so many neighbours stay together."""
  if neighbours == 1:
    return random.permutation(count)
  begin = int(random.integers(neighbours))  # where the groups begin changes with the generator
  edges = np.concatenate([[0], np.arange(begin or neighbours, count, neighbours), [count]])
  order = random.permutation(len(edges) - 1)
  sizes = np.diff(edges)[order]
  return np.repeat(edges[order] - ragged.offsets_of(sizes)[:-1], sizes) + np.arange(count)


def _to_words(
  first: np.ndarray, count: np.ndarray, totals: np.ndarray, word_starts: np.ndarray, full: int
) -> tuple[np.ndarray, np.ndarray]:
  """Moves ends of the spans of `cut` to where words start (bool, all passages one after the other)."""
  offsets = ragged.offsets_of(totals)
  places = np.arange(len(word_starts))
  beyond = len(word_starts)
  ahead = np.minimum.accumulate(np.where(word_starts, places, beyond)[::-1])[::-1]  # next word at or after
  behind = np.maximum.accumulate(np.where(word_starts, places, -1))  # last word at or before
  begin, end = offsets[:-1, None] + first, offsets[:-1, None] + first + count
  meet = begin == end[:, ::-1]  # a span begins where the other one ends
  moved = ahead[begin]
  begin = np.where(moved < end, moved, begin)
  last = behind[np.minimum(end, beyond - 1)]
  inside = (end < offsets[1:, None]) & (last > begin)
  end = np.where(inside, last, end)
  border = np.where(word_starts[begin], begin, end[:, ::-1])
  meet &= (border - begin[:, ::-1] <= full) & (end - border <= full)
  begin, end = np.where(meet, border, begin), np.where(meet[:, ::-1], border[:, ::-1], end)
  return begin - offsets[:-1, None], end - begin


def _with_text(store: TokenStore) -> np.ndarray:
  kept = np.flatnonzero(store.lengths > 0)
  if not len(kept):
    raise InputError("no passage has a token", path=store.path)
  return kept


def _ratios(sizes: Sequence[int]) -> np.ndarray:
  """W_(k−1) / W_k for each corpus k, with cumulative shares W from 0 to exactly 1."""
  cumulative = np.concatenate([[0.0], np.cumsum(sizes) / np.sum(sizes)])
  cumulative[-1] = 1.0
  return cumulative[:-1] / cumulative[1:]
