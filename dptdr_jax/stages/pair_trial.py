"""How a cross-encoder stands on dev while it trains: a positive among what BM25 takes for nearly as good."""

from __future__ import annotations

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.data.store import TokenStore
from dptdr_jax.reranker import CrossEncoder
from dptdr_jax.runtime import hosts
from dptdr_jax.stages import common
from dptdr_jax.stages.layout import Layout
from dptdr_jax.stages.trial import some


@dataclasses.dataclass(frozen=True)
class PairTrial:
  """Dev queries with a few passages each: for choosing, not for reporting.

  Attributes:
    queries, corpus: token stores.
    query_rows: int64 [Q], the queries that are asked.
    passage_rows: int64 [Q, K], a positive of each first, then what BM25 ranks highest beside its positives (random
      ones where BM25 finds too few).
  """

  queries: TokenStore
  corpus: TokenStore
  query_rows: np.ndarray
  passage_rows: np.ndarray

  @classmethod
  def build(cls, config: ConfigDict, layout: Layout, data: PreparedData) -> PairTrial | None:
    """Draws queries by the config's seed; None where no step (evaluate_every 0) or no split is for it."""
    cross, name = config.cross, config.data.dev_split
    if not cross.evaluate_every or not name:
      return None
    split, others = data.splits[name], cross.evaluate_passages - 1
    generator = np.random.default_rng([config.seed, 0xC05])
    positives = {row: split.positives(row) for row in range(len(split))}
    judged = np.array([row for row, found in positives.items() if len(found)])
    rows = some(judged, cross.evaluate_queries, generator, name)
    most = max(len(positives[row]) for row in rows)
    if most >= len(data.ids):
      raise InputError("every passage of the corpus is a positive of a dev query", value=name)
    with hosts.first_goes_first("BM25 index"):
      index = common.bm25(layout, data)
    found = index.search([split.queries[int(row)].text for row in rows], others + most)
    passages = np.empty((len(rows), 1 + others), np.int64)
    for place, row in enumerate(rows):
      random = generator.integers(len(data.ids), size=2 * (others + most))
      ranked = np.concatenate([found.rows[place][found.rows[place] >= 0], random])
      beside = ranked[~np.isin(ranked, positives[row])]
      while len(beside) < others:  # a corpus of little more than positives
        more = generator.integers(len(data.ids), size=others)
        beside = np.concatenate([beside, more[~np.isin(more, positives[row])]])
      passages[place] = np.concatenate([positives[row][:1], beside[:others]])
    return cls(TokenStore(layout.store(name)), TokenStore(layout.store("corpus")), rows, passages)

  def evaluate(self, encoder: CrossEncoder) -> dict[str, float]:
    """Measures of a cross-encoder.

    Returns:
      'RR@10' of the positive, ties against it (chance with 16 passages: .18); 'pairs', the share of other passages that
      it beats, ties half; 'accuracy' at probability .5, both classes weighing the same. Chance is .5 for both.
    """
    queries = np.repeat(self.query_rows, self.passage_rows.shape[1])
    scores = encoder.logits_stored(self.queries, self.corpus, queries, self.passage_rows.ravel(), description="try dev")
    scores = scores.reshape(self.passage_rows.shape)
    positive, others = scores[:, :1], scores[:, 1:]
    ranks = 1 + (others >= positive).sum(1)
    return {
      "RR@10": float(np.mean(np.where(ranks <= 10, 1 / ranks, 0))),
      "pairs": float(np.mean((positive > others) + 0.5 * (positive == others))),
      "accuracy": float((np.mean(positive > 0) + np.mean(others < 0)) / 2),
    }
