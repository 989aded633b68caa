"""mine: hard negatives for a round of training, from several sources in one pool, cleaned of false negatives.

Before round 1 there is no retriever: BM25 and run files are the sources. Later pools add the retriever of the round
before.
"""

from __future__ import annotations

import logging
import pathlib

import numpy as np

from dptdr_jax.core import files
from dptdr_jax.core.store import Inputs, Kind, Making, Ref
from dptdr_jax.data.prepare import Corpus, Split
from dptdr_jax.pipeline import pools
from dptdr_jax.pipeline.encode import run_of
from dptdr_jax.pipeline.rerank import Probabilities, logits_of
from dptdr_jax.reporting import negatives
from dptdr_jax.retrieval import pool_checks
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.retrieval.denoise import CrossEncoderRule, MarginRule, Rule, denoise
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.merge import Source, pool_from_runs
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retrieval.texts import TextRule

_log = logging.getLogger(__name__)

_BLOCK = 16_384  # judged positives that are scored at a time, and queries


class Window(Inputs):
  """What is taken of a source."""

  first: int
  depth: int
  margin: float  # relative; 0: off


class SourceInput(Inputs):
  """A source of candidates: its run, and of a dense one the vectors that score positives beyond the run."""

  name: str
  window: Window
  run: Ref
  queries: Ref | None = None
  passages: Ref | None = None


class PoolRules(Inputs):
  """What a pool is cleaned by, and what its report says."""

  split_name: str
  same_text: bool
  separator: str
  pseudo_positives: bool


class CandidatesInputs(Inputs):
  """Candidates of several sources, without positives, equal texts and what a margin takes out."""

  corpus: Ref
  split: Ref
  sources: tuple[SourceInput, ...]
  rules: PoolRules


class Thresholds(Inputs):
  """Probabilities of a cross-encoder between which a candidate is dropped."""

  negative_below: float
  positive_above: float


class PoolInputs(Inputs):
  """Candidates after a cross-encoder."""

  corpus: Ref
  split: Ref
  candidates: Ref
  scores: Ref
  thresholds: Thresholds
  rules: PoolRules


def build_candidates(inputs: CandidatesInputs, making: Making) -> None:
  """Writes merged candidates, and the pool that the cheap rules leave."""
  split, corpus = opened(inputs, making)
  positives = pools.barred(split)
  sources = {}
  for source in inputs.sources:
    vectors = [Embeddings(making.path(of)) for of in (source.queries, source.passages)] if source.queries else []
    known = positive_scores(*vectors, positives) if vectors else None
    sources[source.name] = taken(run_of(source.run, making), source.window, len(corpus), known)
  margins = {source.name: source.window.margin for source in inputs.sources}
  clean(making.directory, sources, margins, positives, inputs.rules, corpus)
  describe(making.directory, inputs.rules, split, corpus)


def build_pool(inputs: PoolInputs, making: Making) -> None:
  """Writes the pool that the cross-encoder leaves."""
  split, corpus = opened(inputs, making)
  scores = Probabilities(logits_of(making.path(inputs.scores) / "scores"))
  rule = CrossEncoderRule(scores, inputs.thresholds.negative_below, inputs.thresholds.positive_above)
  denoise(making.directory / "pool", making.path(inputs.candidates) / "pool", [rule])
  describe(making.directory, inputs.rules, split, corpus)


CANDIDATES = Kind("candidates", 1, build_candidates, together=False)
POOL = Kind("pool", 1, build_pool, together=False)


def opened(inputs: CandidatesInputs | PoolInputs, making: Making) -> tuple[Split, Corpus]:
  """The training queries and the corpus.

  Raises:
    InputError: no training query has a positive.
  """
  split = Split(making.path(inputs.split), inputs.rules.split_name)
  split.check_trainable()
  return split, Corpus(making.path(inputs.corpus))


def taken(run: Run, window: Window, passages: int, known: np.ndarray | None) -> Source:
  """A source as the pool takes it."""
  return Source(run, min(window.depth, passages), window.first, positive_scores=known)


def clean(
  directory: pathlib.Path, sources: dict[str, Source], margins: dict[str, float], positives: Qrels, rules: PoolRules,
  corpus: Corpus,
) -> None:  # fmt: skip
  """Merges the sources and applies the rules that cost little: DIR/pool."""
  applied: list[Rule] = [TextRule(positives, pools.texts(corpus.passages))] if rules.same_text else []
  applied += [MarginRule(name, margin) for name, margin in margins.items() if margin]
  pool_from_runs(directory / "pool", sources, positives, applied)


def describe(
  directory: pathlib.Path, rules: PoolRules, split: Split, corpus: Corpus, from_step: int | None = None
) -> None:
  """Warns of what is suspicious, and writes mining.json, which the report shows.

  Args:
    from_step: step of training from which the pool is used; None: from its start.
  """
  pool = Pool.open(directory / "pool")
  warnings = pool_checks.suspicions(pool)
  for warning in warnings:
    _log.warning("%s: %s", directory, warning)
  about = negatives.summary(
    pool, corpus.passages, split, separator=rules.separator, pseudo_positives=rules.pseudo_positives, warnings=warnings
  )
  files.write_json(directory / "mining.json", about | {"from_step": from_step})


def positive_scores(queries: Embeddings, passages: Embeddings, positives: Qrels) -> np.ndarray:
  """The best score of each query's judged positives, float32 [Q]; NaN where it has none."""
  best = np.full(len(queries), np.nan, np.float32)
  stop = 0
  while (start := stop) < len(queries):
    most = np.searchsorted(positives.offsets, positives.offsets[start] + _BLOCK, side="right") - 1
    stop = int(np.clip(most, start + 1, min(start + _BLOCK, len(queries))))
    span = slice(positives.offsets[start], positives.offsets[stop])
    owners = np.repeat(np.arange(stop - start), np.diff(positives.offsets[start : stop + 1]))
    relevant = positives.grades[span] > 0
    owners, rows = owners[relevant], positives.rows[span][relevant]
    vectors = queries.take(np.arange(start, stop))
    scores = np.einsum("nh,nh->n", vectors[owners], passages.take(rows))
    np.fmax.at(best[start:stop], owners, scores)
  return best
