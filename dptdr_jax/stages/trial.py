"""How a retriever stands on dev while it trains: a small corpus that holds what the dev queries look for."""

from __future__ import annotations

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.data.store import TokenStore
from dptdr_jax.retrieval import measures
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.search import search_exact
from dptdr_jax.retriever import Retriever
from dptdr_jax.stages import common
from dptdr_jax.stages.layout import Layout


@dataclasses.dataclass(frozen=True)
class DevTrial:
  """Dev queries and a corpus of their judged passages, filled up at random: for choosing, not for reporting.

  Attributes:
    queries, corpus: token stores.
    query_rows: int64 [Q], the queries that are asked.
    passage_rows: int64 [C], the small corpus, ascending.
    qrels: judgements of those queries, by place in passage_rows.
    names: measures.
  """

  queries: TokenStore
  corpus: TokenStore
  query_rows: np.ndarray
  passage_rows: np.ndarray
  qrels: Qrels
  names: tuple[str, ...]

  @classmethod
  def build(cls, config: ConfigDict, layout: Layout, data: PreparedData, every: int) -> DevTrial | None:
    """Draws queries and passages by the config's seed; None where no step (`every` 0) or no split is for it."""
    train, name = config.train, config.data.dev_split
    if not every or not name or not common.has_queries(config):
      return None
    generator = np.random.default_rng([config.seed, 0xDE7])
    qrels = common.qrels(data.splits[name])
    rows = some(qrels.judged(), train.evaluate_queries, generator, name)
    needed = np.unique(np.concatenate([qrels.of(row)[0] for row in rows]))
    fill = generator.permutation(len(data.ids))[: train.evaluate_passages]
    fill = fill[~np.isin(fill, needed)][: max(0, train.evaluate_passages - len(needed))]
    passages = np.sort(np.concatenate([needed, fill]))
    triples = [
      (place, row, grade) for place, query in enumerate(rows) for row, grade in zip(*qrels.of(query), strict=True)
    ]
    places, relevant, grades = map(np.array, zip(*triples, strict=True))
    small = Qrels.from_triples(places, np.searchsorted(passages, relevant), grades, len(rows))
    stores = TokenStore(layout.store(name)), TokenStore(layout.store("corpus"))
    return cls(*stores, rows, passages, small, tuple(dict.fromkeys((train.select_by, "RR@10", "R@100"))))

  def evaluate(self, retriever: Retriever) -> dict[str, float]:
    """Measures of a retriever on the small corpus."""
    queries = retriever.encode_store(self.queries, "query", self.query_rows)
    passages = retriever.encode_store(self.corpus, "passage", self.passage_rows, description="encode dev")
    depth = max(measures.cutoff(name) or len(passages) for name in self.names)
    run = search_exact(queries, passages, min(depth, len(passages)))
    return measures.evaluate(run, self.qrels, self.names).means()


def some(judged: np.ndarray, most: int, generator: np.random.Generator, split: str) -> np.ndarray:
  """At most so many of a split's judged queries at random, ascending.

  Raises:
    InputError: there are none.
  """
  if not len(judged):
    fix = "Set data.dev_split to a split with judgements, or ''"
    raise InputError("no query of the dev split has a passage judged relevant", value=split, fix=fix)
  return np.sort(generator.permutation(judged)[:most])
