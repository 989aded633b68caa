"""Judgements and pools of negatives as training and mining read them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import numpy as np

from dptdr_jax.data.groups import Negatives, Sampling, TrainGroups
from dptdr_jax.data.prepare import Split
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.settings import Train


def qrels(split: Split) -> Qrels:
  """A split's judgements as the measures take them."""
  return Qrels.from_triples(*split.judgements.triples(), len(split))


def barred(split: Split) -> Qrels:
  """What must not become a query's negative: the judgements, and what is relevant to another query of its text."""
  lists = [split.judgements.triples(), split.shared.triples()]
  return Qrels.from_triples(*(np.concatenate(part) for part in zip(*lists, strict=True)), len(split))


class PoolNegatives:
  """A pool of mined candidates as the negatives that training groups draw from."""

  def __init__(self, pool: Pool):
    self._pool = pool

  def rows(self, query_row: int) -> np.ndarray:
    """Passage rows of a query, best first."""
    return np.asarray(self._pool.candidates(query_row))

  def pseudo_positives(self, query_row: int) -> np.ndarray:
    """Passage rows that denoising took for positives."""
    return np.asarray(self._pool.pseudo_positives(query_row))


class ScoredPoolNegatives(PoolNegatives):
  """The same with the scores of one source, which SimANS draws by."""

  def __init__(self, pool: Pool, source: str):
    super().__init__(pool)
    self._source = source

  def scores(self, query_row: int) -> tuple[np.ndarray, float]:
    """The source's scores of `rows(query_row)`, and of the query's best positive."""
    return self._pool.candidate_scores(query_row, self._source)


def pool_negatives(pool: Pool, simans_source: str) -> PoolNegatives:
  """A pool as training draws from it, with scores where it has those of `simans_source`."""
  return ScoredPoolNegatives(pool, simans_source) if simans_source in pool.names else PoolNegatives(pool)


def train_groups(
  train: Train, split: Split, negatives: Negatives | None, *, num_passages: int, seed: int, number: int, pseudo: bool
) -> TrainGroups:
  """What draws the passages of round `number`'s batches; with `pseudo` a pool's pseudo-positives are positives."""
  positives = split.relevant
  if pseudo and isinstance(negatives, PoolNegatives):
    positives = functools.partial(_with_pseudo_positives, split.relevant, negatives)
  sampling = Sampling(train.sampling, last=train.sample_last or None, a=train.simans_a, b=train.simans_b)
  return TrainGroups(
    positives, negatives, num_passages=num_passages, group_size=train.passages, seed=seed, stage=f"train{number}",
    positive=train.positive, sampling=sampling,
  )  # fmt: skip


def _with_pseudo_positives(positives: Callable, negatives: PoolNegatives, query_row: int) -> np.ndarray:
  return np.concatenate([positives(query_row), negatives.pseudo_positives(query_row)]).astype(np.int64)


def texts(passages) -> Callable[[np.ndarray], Iterable[tuple[str, str]]]:
  """What reads (title, text) of passage rows."""

  def read(rows: np.ndarray) -> list[tuple[str, str]]:
    return [(passage.title, passage.text) for passage in passages.take(rows)]

  return read
