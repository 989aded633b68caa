"""Scores of a task's cross-encoder in few shapes, one request at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from dptdr_jax.data.text import GivenPassage
from dptdr_jax.reranker import CrossEncoder

_PAIRS = 16  # of one call: with always as many, each width is one program
_STEP = 16  # widths are multiples of it, see runtime.buckets


class Reranker:
  """A cross-encoder that several threads may call."""

  def __init__(self, cross_encoder: CrossEncoder):
    self._cross, self._lock = cross_encoder, threading.Lock()

  @property
  def hash(self) -> str:
    """Of the cross-encoder."""
    return self._cross.hash

  def warm(self) -> None:
    """Compiles the programs of all widths: 'a' is one token for nearly every tokenizer."""
    for width in range(_STEP, self._cross.settings.pair_length + _STEP, _STEP):
      self.scores("a", ["a " * max(1, width - 5)])

  def scores(self, query: str, passages: Sequence[GivenPassage]) -> np.ndarray:
    """Probabilities that passages are relevant to a query, float32 [n]."""
    scores = np.empty(len(passages), np.float32)
    order = np.argsort([len(str(passage)) for passage in passages], kind="stable")  # alike lengths: little padding
    for start in range(0, len(order), _PAIRS):
      places = order[start : start + _PAIRS]
      some = [passages[place] for place in places]
      some += some[-1:] * (_PAIRS - len(some))
      with self._lock:
        scores[places] = self._cross.score([query] * _PAIRS, some)[: len(places)]
    return scores
