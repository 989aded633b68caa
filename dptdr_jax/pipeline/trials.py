"""How a retriever or a cross-encoder stands on dev while it trains: for choosing, not for reporting."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dptdr_jax.core.errors import InputError
from dptdr_jax.core.store import Inputs, Making, Ref
from dptdr_jax.data.prepare import Split
from dptdr_jax.data.store import TokenStore
from dptdr_jax.pipeline import pools
from dptdr_jax.reranker import CrossEncoder
from dptdr_jax.retrieval import measures
from dptdr_jax.retrieval.bm25 import Bm25
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.search import search_exact
from dptdr_jax.retriever import Retriever

CHOOSES = "RR@10"
_MEASURES = (CHOOSES, "R@100")


class DevInput(Inputs):
  """The dev split, as a trial of a retriever reads it."""

  split: Ref
  name: str
  queries: Ref  # tokens
  corpus: Ref  # tokens
  num_queries: int
  num_passages: int


class PairDevInput(Inputs):
  """The dev split, as a trial of a cross-encoder reads it."""

  split: Ref
  name: str
  queries: Ref  # tokens
  corpus: Ref  # tokens
  bm25: Ref
  num_queries: int
  num_passages: int  # a query


@dataclasses.dataclass(frozen=True)
class DevTrial:
  """Dev queries and a small corpus: their judged passages, filled up at random.

  Attributes:
    queries, corpus: token stores.
    query_rows: int64 [Q], the queries that are asked.
    passage_rows: int64 [C], the small corpus, ascending.
    qrels: judgements of those queries, by place in passage_rows.
  """

  queries: TokenStore
  corpus: TokenStore
  query_rows: np.ndarray
  passage_rows: np.ndarray
  qrels: Qrels

  @classmethod
  def build(cls, inputs: DevInput, making: Making, seed: int) -> DevTrial:
    """Draws queries and passages by the seed."""
    generator = np.random.default_rng([seed, 0xDE7])
    qrels = pools.qrels(Split(making.path(inputs.split), inputs.name))
    rows = _some(qrels.judged(), inputs.num_queries, generator, inputs.name)
    corpus = tokens_of(inputs.corpus, making)
    needed = np.unique(np.concatenate([qrels.of(row)[0] for row in rows]))
    fill = generator.permutation(len(corpus))[: inputs.num_passages]
    fill = fill[~np.isin(fill, needed)][: max(0, inputs.num_passages - len(needed))]
    passages = np.sort(np.concatenate([needed, fill]))
    triples = [
      (place, row, grade) for place, query in enumerate(rows) for row, grade in zip(*qrels.of(query), strict=True)
    ]
    places, relevant, grades = map(np.array, zip(*triples, strict=True))
    small = Qrels.from_triples(places, np.searchsorted(passages, relevant), grades, len(rows))
    return cls(tokens_of(inputs.queries, making), corpus, rows, passages, small)

  def evaluate(self, retriever: Retriever) -> dict[str, float]:
    """Measures of a retriever on the small corpus."""
    queries = retriever.encode_store(self.queries, "query", self.query_rows)
    passages = retriever.encode_store(self.corpus, "passage", self.passage_rows, description="encode dev")
    depth = max(measures.cutoff(name) for name in _MEASURES)
    run = search_exact(queries, passages, min(depth, len(passages)))
    return measures.evaluate(run, self.qrels, _MEASURES).means()


@dataclasses.dataclass(frozen=True)
class PairTrial:
  """Dev queries with a few passages each: a positive among what BM25 takes for nearly as good.

  Attributes:
    queries, corpus: token stores.
    query_rows: int64 [Q], the queries that are asked.
    passage_rows: int64 [Q, K], a positive of each first, then BM25's best beside the positives (random ones where it
      has too few).
  """

  queries: TokenStore
  corpus: TokenStore
  query_rows: np.ndarray
  passage_rows: np.ndarray

  @classmethod
  def build(cls, inputs: PairDevInput, making: Making, seed: int) -> PairTrial:
    """Draws queries by the seed."""
    split, others = Split(making.path(inputs.split), inputs.name), inputs.num_passages - 1
    corpus = tokens_of(inputs.corpus, making)
    generator = np.random.default_rng([seed, 0xC05])
    positives = {row: split.positives(row) for row in range(len(split))}
    judged = np.array([row for row, judged in positives.items() if len(judged)])
    rows = _some(judged, inputs.num_queries, generator, inputs.name)
    most = max(len(positives[row]) for row in rows)
    if most >= len(corpus):
      raise InputError("every passage of the corpus is a positive of a dev query", value=inputs.name)
    index = Bm25(making.path(inputs.bm25) / "index")
    run = index.search([split.queries[int(row)].text for row in rows], others + most)
    passages = np.empty((len(rows), 1 + others), np.int64)
    for place, row in enumerate(rows):
      random = generator.integers(len(corpus), size=2 * (others + most))
      ranked = np.concatenate([run.rows[place][run.rows[place] >= 0], random])
      beside = ranked[~np.isin(ranked, positives[row])]
      while len(beside) < others:  # a corpus of little more than positives
        more = generator.integers(len(corpus), size=others)
        beside = np.concatenate([beside, more[~np.isin(more, positives[row])]])
      passages[place] = np.concatenate([positives[row][:1], beside[:others]])
    return cls(tokens_of(inputs.queries, making), corpus, rows, passages)

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
      CHOOSES: float(np.mean(np.where(ranks <= 10, 1 / ranks, 0))),
      "pairs": float(np.mean((positive > others) + 0.5 * (positive == others))),
      "accuracy": float((np.mean(positive > 0) + np.mean(others < 0)) / 2),
    }


def tokens_of(tokens: Ref, making: Making) -> TokenStore:
  """The token store of an artefact."""
  return TokenStore(making.path(tokens) / "tokens")


def frequent_tokens(corpus: TokenStore, count: int) -> np.ndarray:
  """The most frequent token ids of the corpus, most frequent first: what prompts of init 'words' start from."""
  return np.argsort(-corpus.token_counts(), kind="stable")[:count]


def _some(judged: np.ndarray, most: int, generator: np.random.Generator, split: str) -> Any:
  """At most so many of a split's judged queries at random, ascending.

  Raises:
    InputError: there are none.
  """
  if not len(judged):
    raise InputError("no query of the dev split has a passage judged relevant", value=split,
                     fix="Set data.dev_split to a split with judgements, or ''")  # fmt: skip
  return np.sort(generator.permutation(judged)[:most])
