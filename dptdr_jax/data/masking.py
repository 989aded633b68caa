"""Whole-word masking for masked language modelling, vectorised over the spans of a batch.

A word is masked as a whole (Devlin et al.'s later BERT), each word with the same probability whatever its length; of
the masked tokens 80 % become the mask token, 10 % a random token, 10 % stay (Devlin et al. 2019). A word of more
tokens than can be masked (`most_masked`) stays: byte-level BPE takes a clause of a script without spaces for one.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.tokenizer import Tokenizer

_MASKED, _REPLACED = 0.8, 0.9  # below the first: the mask token; from there below the second: a random one
_SPARE = 16  # masked tokens a span may have beyond the rate's share: words come whole
_MULTIPLE = 8


def most_masked(rate: float, width: int) -> int:
  """K, how many tokens of a span padded to `width` can be masked; a word that would go beyond ends the choice."""
  return min(width, -(-(int(np.ceil(rate * width)) + _SPARE) // _MULTIPLE) * _MULTIPLE)


def check_rate(rate: float) -> None:
  """Raises InputError unless the rate is a share of the tokens, neither none nor all."""
  if not 0 < rate < 1:
    raise InputError("pretrain.mask_rate must lie between 0 and 1", value=rate)


@dataclasses.dataclass(frozen=True)
class Masking:
  """What masking needs to know of a vocabulary.

  Attributes:
    rate: share of the tokens that are masked.
    mask_id: the mask token.
    is_special: bool [V], ids that are never masked and never put in another's place.
  """

  rate: float
  mask_id: int
  is_special: np.ndarray

  @classmethod
  def of(cls, tokenizer: Tokenizer, rate: float) -> Masking:
    """Masking with a tokenizer's special tokens.

    Raises:
      InputError: the vocabulary has no mask token, or the rate is no share.
    """
    if tokenizer.mask_id is None:
      raise InputError(
        "the vocabulary has no mask token", path=tokenizer.directory,
        fix="Set pretrain.mlm_weight to 0, or take a tokenizer that was made for masked language modelling",
      )  # fmt: skip
    check_rate(rate)
    special = np.zeros(tokenizer.vocab_size, bool)
    named = [number for number, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special]
    special[[*named, *tokenizer.prefix, *tokenizer.suffix, tokenizer.pad_id, tokenizer.mask_id]] = True
    return cls(rate, tokenizer.mask_id, special)

  def most(self, width: int) -> int:
    """See `most_masked`."""
    return most_masked(self.rate, width)

  def apply(
    self, tokens: np.ndarray, starts: np.ndarray, content: np.ndarray, generator: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks words.

    Args:
      tokens: int32 [n, T]; starts: bool [n, T], where words start; content: bool [n, T], False on padding and on the
        tokens around the text. Special tokens within the text are left alone too.
      generator: takes the same draws whatever the tokens are.

    Returns:
      tokens int32 [n, T] with masks, positions int32 [n, K] of the masked ones in ascending order (0 where a span has
      fewer), labels int32 [n, K], what stood there (−1 where a span has fewer).
    """
    order, chance, kind = (generator.random(tokens.shape) for _ in range(3))
    offset = generator.random((len(tokens), 1))
    ordinary = np.flatnonzero(~self.is_special)
    other = ordinary[generator.integers(0, len(ordinary), tokens.shape)]
    maskable = content & ~self.is_special[tokens]
    masked = _choose(maskable, starts, self.rate, self.most(tokens.shape[1]), order, chance, offset)
    replaced = np.where(kind < _MASKED, self.mask_id, np.where(kind < _REPLACED, other, tokens))
    positions = np.argsort(~masked, axis=1, kind="stable")[:, : self.most(tokens.shape[1])].astype(np.int32)
    real = np.arange(positions.shape[1]) < masked.sum(1)[:, None]
    labels = np.where(real, np.take_along_axis(tokens, positions, 1), -1).astype(np.int32)
    return np.where(masked, replaced, tokens).astype(np.int32), np.where(real, positions, 0).astype(np.int32), labels


def _choose(
  maskable: np.ndarray,
  starts: np.ndarray,
  rate: float,
  most: int,
  order: np.ndarray,
  chance: np.ndarray,
  offset: np.ndarray,
) -> np.ndarray:
  """Draws whole words, bool [n, T], by systematic sampling.

  The words of a span lie on a circle in random order, each as long as its tokens; an arc of `rate` of the circle starts
  anywhere, and a word is chosen with the probability that is the share of it under the arc. So every word has
  probability `rate`, and the count hardly varies from span to span, which independent draws would not give.
  """
  rows, width = maskable.shape
  first = maskable & (starts | ~np.pad(maskable, ((0, 0), (1, 0)))[:, :-1])  # what follows a special token starts too
  word = np.where(maskable, np.cumsum(first, 1) - 1, width)
  flat = (word + np.arange(rows)[:, None] * (width + 1)).ravel()
  sizes = np.bincount(flat, minlength=rows * (width + 1)).reshape(rows, width + 1)[:, :width]
  places = np.argsort(np.where(sizes > 0, order, 2.0), axis=1)  # words in random order, then nothing
  size = np.take_along_axis(sizes, places, 1)
  end = np.cumsum(size, 1)
  total = end[:, -1:]
  start, arc = offset * total, rate * total
  covered = np.minimum(end, start + arc) - np.maximum(end - size, start)
  around = np.minimum(end, start + arc - total) - (end - size)
  covered = np.maximum(covered, 0) + np.maximum(around, 0)
  taken = (size > 0) & (size <= most) & (chance * size < covered)  # one that never fits takes no room from the others
  taken &= np.cumsum(size * taken, 1) <= most
  chosen = np.zeros((rows, width + 1), bool)
  np.put_along_axis(chosen, places, taken, 1)
  return np.take_along_axis(chosen, word, 1)
