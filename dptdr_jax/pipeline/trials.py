"""How a retriever or a cross-encoder stands on dev while it trains: for choosing, not for reporting."""

from __future__ import annotations

from collections.abc import Callable
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


def of_retriever(inputs: DevInput | None, making: Making, seed: int) -> Callable[[Retriever], dict[str, float]] | None:
  """What measures a retriever on a small corpus: the judged passages of some dev queries, filled up at random.

  Queries and passages are drawn by the seed. None: there is no dev split.
  """
  if inputs is None:
    return None
  generator = np.random.default_rng([seed, 0xDE7])
  qrels = pools.qrels(Split(making.path(inputs.split), inputs.name))
  rows = _some(qrels.judged(), inputs.num_queries, generator, inputs.name)
  queries, corpus = tokens_of(inputs.queries, making), tokens_of(inputs.corpus, making)
  needed = np.unique(np.concatenate([qrels.of(row)[0] for row in rows]))
  fill = generator.permutation(len(corpus))[: inputs.num_passages]
  fill = fill[~np.isin(fill, needed)][: max(0, inputs.num_passages - len(needed))]
  passages = np.sort(np.concatenate([needed, fill]))
  triples = [
    (place, row, grade) for place, query in enumerate(rows) for row, grade in zip(*qrels.of(query), strict=True)
  ]
  places, relevant, grades = map(np.array, zip(*triples, strict=True))
  small = Qrels.from_triples(places, np.searchsorted(passages, relevant), grades, len(rows))
  depth = min(max(map(measures.cutoff, _MEASURES)), len(passages))

  def evaluate(retriever: Retriever) -> dict[str, float]:
    asked = retriever.encode_store(queries, "query", rows)
    run = search_exact(asked, retriever.encode_store(corpus, "passage", passages, description="encode dev"), depth)
    return measures.evaluate(run, small, _MEASURES).means()

  return evaluate


def of_cross_encoder(
  inputs: PairDevInput | None, making: Making, seed: int
) -> Callable[[CrossEncoder], dict[str, float]] | None:
  """What measures a cross-encoder on dev queries, drawn by the seed, with a few passages each.

  These are a positive and BM25's best beside the positives (random ones where it has too few). Measured are 'RR@10' of
  the positive, ties against it (chance with 16 passages: .18); 'pairs', the share of other passages that it beats, ties
  half; 'accuracy' at probability .5, both classes weighing the same. Chance is .5 for both. None: no dev split.
  """
  if inputs is None:
    return None
  queries, corpus = tokens_of(inputs.queries, making), tokens_of(inputs.corpus, making)
  rows, passages = _pairs(inputs, making, len(corpus), np.random.default_rng([seed, 0xC05]))

  def evaluate(encoder: CrossEncoder) -> dict[str, float]:
    asked = np.repeat(rows, passages.shape[1])
    scores = encoder.logits_stored(queries, corpus, asked, passages.ravel(), description="try dev")
    scores = scores.reshape(passages.shape)
    positive, others = scores[:, :1], scores[:, 1:]
    ranks = 1 + (others >= positive).sum(1)
    return {
      CHOOSES: float(np.mean(np.where(ranks <= 10, 1 / ranks, 0))),
      "pairs": float(np.mean((positive > others) + 0.5 * (positive == others))),
      "accuracy": float((np.mean(positive > 0) + np.mean(others < 0)) / 2),
    }

  return evaluate


def _pairs(
  inputs: PairDevInput, making: Making, num_passages: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of dev queries, int64 [Q], and of each one's passages, int64 [Q, K], the positive first."""
  split, others = Split(making.path(inputs.split), inputs.name), inputs.num_passages - 1
  positives = {row: split.positives(row) for row in range(len(split))}
  judged = np.array([row for row, judged in positives.items() if len(judged)])
  rows = _some(judged, inputs.num_queries, generator, inputs.name)
  most = max(len(positives[row]) for row in rows)
  if most >= num_passages:
    raise InputError("every passage of the corpus is a positive of a dev query", value=inputs.name)
  index = Bm25(making.path(inputs.bm25) / "index")
  run = index.search([split.queries[int(row)].text for row in rows], others + most)
  passages = np.empty((len(rows), 1 + others), np.int64)
  for place, row in enumerate(rows):
    random = generator.integers(num_passages, size=2 * (others + most))
    ranked = np.concatenate([run.rows[place][run.rows[place] >= 0], random])
    beside = ranked[~np.isin(ranked, positives[row])]
    while len(beside) < others:  # a corpus of little more than positives
      more = generator.integers(num_passages, size=others)
      beside = np.concatenate([beside, more[~np.isin(more, positives[row])]])
    passages[place] = np.concatenate([positives[row][:1], beside[:others]])
  return rows, passages


def tokens_of(tokens: Ref, making: Making) -> TokenStore:
  """The token store of an artefact."""
  return TokenStore(making.path(tokens) / "tokens")


def frequent_tokens(corpus: TokenStore, count: int) -> np.ndarray:
  """The most frequent token ids of the corpus, most frequent first: what prompts of init 'words' start from."""
  return np.argsort(-corpus.token_counts(), kind="stable")[:count]


def _some(judged: np.ndarray, most: int, generator: np.random.Generator, split: str) -> Any:
  """At most so many of a split's judged queries at random, ascending."""
  if not len(judged):
    raise InputError("no query of the dev split has a passage judged relevant", value=split,
                     fix="Set data.dev_split to a split with judgements, or ''")  # fmt: skip
  return np.sort(generator.permutation(judged)[:most])
