"""Judgements and pools of negatives as training and mining read them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from dptdr_jax.data.groups import Negatives, Sampling, TrainGroups
from dptdr_jax.data.prepare import Split
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.retrieval.qrels import Qrels

if TYPE_CHECKING:
  from dptdr_jax.pipeline.train import TrainInputs


def qrels(split: Split) -> Qrels:
  """A split's judgements as the measures take them."""
  return Qrels.from_triples(*split.judgements.triples(), len(split))


def barred(split: Split) -> Qrels:
  """What must not become a query's negative: the judgements, and what is relevant to another query of its text."""
  lists = [split.judgements.triples(), split.shared.triples()]
  return Qrels.from_triples(*(np.concatenate(part) for part in zip(*lists, strict=True)), len(split))


class PoolNegatives:
  """A pool of mined candidates as the negatives that training groups draw from.

  Attributes:
    rows: passage rows of a query, best first.
    scores: see `Negatives`; only where the pool has those of a source.
  """

  def __init__(self, pool: Pool, source: str = ""):
    """With the scores of `source`, where the pool has them."""
    self.rows = pool.candidates
    if source in pool.names:
      self.scores = functools.partial(pool.candidate_scores, source=source)


def train_groups(
  inputs: TrainInputs, split: Split, negatives: Pool | Negatives | None, num_passages: int
) -> TrainGroups:
  """What draws the passages of a round's batches."""
  train, positives = inputs.train, split.relevant
  if isinstance(negatives, Pool):
    if inputs.pseudo_positives:
      positives = functools.partial(_with_pseudo_positives, split, negatives)
    negatives = PoolNegatives(negatives, train.simans_source)
  sampling = Sampling(train.sampling, last=train.sample_last or None, a=train.simans_a, b=train.simans_b)
  return TrainGroups(
    positives, negatives, num_passages=num_passages, group_size=train.passages, seed=inputs.seed,
    stage=f"train{inputs.number}", positive=train.positive, sampling=sampling,
  )  # fmt: skip


def _with_pseudo_positives(split: Split, pool: Pool, query_row: int) -> np.ndarray:
  return np.concatenate([split.relevant(query_row), pool.pseudo_positives(query_row)]).astype(np.int64)


def texts(passages) -> Callable[[np.ndarray], Iterable[tuple[str, str]]]:
  """What reads (title, text) of passage rows."""

  def read(rows: np.ndarray) -> list[tuple[str, str]]:
    return [(passage.title, passage.text) for passage in passages.take(rows)]

  return read
