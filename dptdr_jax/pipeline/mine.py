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


def build_candidates(inputs: CandidatesInputs, making: Making, from_step: int | None = None) -> None:
  """Writes merged candidates, and the pool that the cheap rules leave; `from_step` as of `_describe`."""
  split, corpus = _opened(inputs, making)
  positives = pools.barred(split)
  rules: list[Rule] = [TextRule(positives, pools.texts(corpus.passages))] if inputs.rules.same_text else []
  sources = {}
  for source in inputs.sources:
    known, window = None, source.window
    if source.queries is not None:
      known = positive_scores(*(Embeddings(making.path(of)) for of in (source.queries, source.passages)), positives)
    depth = min(window.depth, len(corpus))
    sources[source.name] = Source(run_of(source.run, making), depth, window.first, positive_scores=known)
    rules += [MarginRule(source.name, window.margin)] if window.margin else []
  pool_from_runs(making.directory / "pool", sources, positives, rules)
  _describe(making.directory, inputs.rules, split, corpus, from_step)


def build_pool(inputs: PoolInputs, making: Making, from_step: int | None = None) -> None:
  """Writes the pool that the cross-encoder leaves; `from_step` is of training, from which it is used."""
  scores = Probabilities(logits_of(making.path(inputs.scores) / "scores"))
  rule = CrossEncoderRule(scores, inputs.thresholds.negative_below, inputs.thresholds.positive_above)
  denoise(making.directory / "pool", making.path(inputs.candidates) / "pool", [rule])
  _describe(making.directory, inputs.rules, *_opened(inputs, making), from_step)


CANDIDATES = Kind("candidates", 1, build_candidates, together=False)
POOL = Kind("pool", 1, build_pool, together=False)


def _opened(inputs: CandidatesInputs | PoolInputs, making: Making) -> tuple[Split, Corpus]:
  split = Split(making.path(inputs.split), inputs.rules.split_name)
  split.check_trainable()
  return split, Corpus(making.path(inputs.corpus))


def _describe(directory: pathlib.Path, rules: PoolRules, split: Split, corpus: Corpus, from_step: int | None) -> None:
  """Warns of what is suspicious, and writes mining.json; `from_step`: of training, from which the pool is used."""
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
