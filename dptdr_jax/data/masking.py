"""Whole-word masking for masked language modelling, vectorised over the spans of a batch.

A word is masked as a whole (BERT's later models), every word with the same probability whatever its length. Of the
masked tokens 80 % become the mask token, 10 % a random token, and 10 % stay (BERT, arXiv 1810.04805). A word of more
tokens than can be masked (`most_masked`) stays: in scripts without spaces byte-level BPE makes a clause one word.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.tokenizer import Tokenizer

RATE = 0.15  # share of the tokens that are masked
_MASKED, _REPLACED = 0.8, 0.9  # below the first: the mask token; between the two: a random one
_SPARE = 16  # masked tokens that a span may have beyond its share: words are masked as a whole
_MULTIPLE = 8


def most_masked(width: int) -> int:
  """Returns K, how many tokens of a span padded to `width` can be masked; no word is masked that would exceed it."""
  return min(width, -(-(int(np.ceil(RATE * width)) + _SPARE) // _MULTIPLE) * _MULTIPLE)


@dataclasses.dataclass(frozen=True)
class Masking:
  """Masking with a vocabulary: `is_special`, bool [V], are ids that are never masked and never replace another one."""

  mask_id: int
  is_special: np.ndarray

  @classmethod
  def of(cls, tokenizer: Tokenizer) -> Masking:
    """Masking with a tokenizer's vocabulary; an InputError if it has no mask token."""
    if tokenizer.mask_id is None:
      raise InputError(
        "the vocabulary has no mask token", path=tokenizer.directory,
        fix="Set pretrain.mlm_weight to 0, or choose a model that was trained by masked language modelling",
      )  # fmt: skip
    special = np.zeros(tokenizer.vocab_size, bool)
    named = [number for number, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special]
    special[[*named, *tokenizer.prefix, *tokenizer.suffix, tokenizer.pad_id, tokenizer.mask_id]] = True
    return cls(tokenizer.mask_id, special)

  def apply(
    self, tokens: np.ndarray, starts: np.ndarray, content: np.ndarray, generator: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks words.

    Args:
      tokens: int32 [n, T].
      starts: bool [n, T], where words start.
      content: bool [n, T], False on padding and on the tokens around the text. Special tokens within the text are never
        masked.
      generator: gives the same draws whatever the tokens are.

    Returns:
      tokens int32 [n, T] with masks; positions int32 [n, K] of the masked tokens in ascending order, 0 fills; labels
      int32 [n, K], their ids before masking, −1 fills.
    """
    order, chance, kind = (generator.random(tokens.shape) for _ in range(3))
    offset = generator.random((len(tokens), 1))
    ordinary = np.flatnonzero(~self.is_special)
    other = ordinary[generator.integers(0, len(ordinary), tokens.shape)]
    maskable = content & ~self.is_special[tokens]
    most = most_masked(tokens.shape[1])
    masked = _choose(maskable, starts, most, order, chance, offset)
    replaced = np.where(kind < _MASKED, self.mask_id, np.where(kind < _REPLACED, other, tokens))
    positions = np.argsort(~masked, axis=1, kind="stable")[:, :most].astype(np.int32)
    real = np.arange(positions.shape[1]) < masked.sum(1)[:, None]
    labels = np.where(real, np.take_along_axis(tokens, positions, 1), -1).astype(np.int32)
    return np.where(masked, replaced, tokens).astype(np.int32), np.where(real, positions, 0).astype(np.int32), labels


def _choose(
  maskable: np.ndarray, starts: np.ndarray, most: int, order: np.ndarray, chance: np.ndarray, offset: np.ndarray
) -> np.ndarray:
  """Draws whole words, bool [n, T], by systematic sampling.

  The words of a span lie on a circle in random order, each as long as its tokens. An arc of RATE of the circle starts
  anywhere; a word is chosen with a probability that is the share of it under the arc. So every word has probability
  RATE, and the number of masked tokens hardly varies from span to span, unlike with independent draws.
  """
  rows, width = maskable.shape
  first = maskable & (starts | ~np.pad(maskable, ((0, 0), (1, 0)))[:, :-1])  # also after a special token
  word = np.where(maskable, np.cumsum(first, 1) - 1, width)
  flat = (word + np.arange(rows)[:, None] * (width + 1)).ravel()
  sizes = np.bincount(flat, minlength=rows * (width + 1)).reshape(rows, width + 1)[:, :width]
  places = np.argsort(np.where(sizes > 0, order, 2.0), axis=1)  # words in random order, then nothing
  size = np.take_along_axis(sizes, places, 1)
  end = np.cumsum(size, 1)
  total = end[:, -1:]
  start, arc = offset * total, RATE * total
  covered = np.minimum(end, start + arc) - np.maximum(end - size, start)
  around = np.minimum(end, start + arc - total) - (end - size)
  covered = np.maximum(covered, 0) + np.maximum(around, 0)
  taken = (size > 0) & (size <= most) & (chance * size < covered)  # a word that never fits takes no room from others
  taken &= np.cumsum(size * taken, 1) <= most
  chosen = np.zeros((rows, width + 1), bool)
  np.put_along_axis(chosen, places, taken, 1)
  return np.take_along_axis(chosen, word, 1)
