"""Removes false negatives from a pool of candidates, by rules that are counted one by one.

A rule looks at a block of queries and says which candidates to remove and why. Rules are applied in the order in which
they are given; a later one sees what the earlier ones left, so that every candidate has one reason at most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from dptdr_jax.core import preemption, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path
from dptdr_jax.retrieval.candidates import Pool, PoolWriter, Reason


class Verdict(NamedTuple):
  """What a rule says of a block of b queries.

  Attributes:
    hits: {reason: bool [b, K]}, the candidates to remove; of several reasons the first one counts.
    unjudged: how many candidates it could not judge (no score, no positive); they stay.
  """

  hits: Mapping[Reason, np.ndarray]
  unjudged: int


class Rule(Protocol):
  """A way to recognise false negatives."""

  def describe(self) -> dict[str, Any]:
    """Its name and options, as JSON has them; kept in the pool's manifest."""
    ...

  def judge(self, pool: Pool, block: slice, kept: np.ndarray) -> Verdict:
    """Judges candidates.

    Args:
      pool: of b queries.
      block: which queries of all these are.
      kept: bool [b, K], the candidates that are still negatives.
    """
    ...


@dataclasses.dataclass(frozen=True)
class MarginRule:
  """Positive-aware margin (NV-Retriever, arXiv 2407.15831): removes what scores close to the positive, or above it.

  The positive's score s⁺ is the best of the query's positives in that source (`Pool.positive_scores`; sentence-
  transformers takes the worst). Nothing is removed where s⁺ or the candidate's score is unknown.

  Attributes:
    source: whose scores.
    relative: a share r; s > s⁺ − (1 − r) · |s⁺| is removed: above r · s⁺ where s⁺ > 0 (TopK-PercPos, there 0.95;
      sentence-transformers calls 1 − r relative_margin). The margin is as wide below a negative s⁺ as below a positive
      one, and r = 1 is the positive's own score whatever its sign.
  """

  source: str
  relative: float

  def __post_init__(self):
    if not 0 < self.relative < np.inf:
      raise InputError("a relative margin is a share above 0 of the positive's score", value=self.relative)

  def describe(self) -> dict[str, Any]:
    return {"rule": "margins", **dataclasses.asdict(self)}

  def judge(self, pool: Pool, block: slice, kept: np.ndarray) -> Verdict:
    number = pool.source_number(self.source)
    scores, positive = pool.scores[:, :, number], pool.positive_scores[:, number, None]
    factor = np.where(positive > 0, np.float32(self.relative), np.float32(2 - self.relative))
    hits = {Reason.RELATIVE_MARGIN: scores > factor * positive}  # False where the positive's score is NaN
    return Verdict(hits, int((kept & (np.isneginf(scores) | np.isnan(positive))).sum()))


@dataclasses.dataclass(frozen=True)
class CrossEncoderRule:
  """RocketQA's denoising (arXiv 2010.08191, 3.2): only what a cross-encoder finds irrelevant stays a negative.

  Attributes:
    scores: float32 [Q, K], probabilities that a candidate is relevant, NaN where it was not scored (it is removed);
      an array, or whatever `scores[block]` reads blocks of queries from.
    negative_below: stays where the probability is below it; RocketQA's is 0.1.
    positive_above: a pseudo-positive where it is above; RocketQA's is 0.9.
  """

  scores: Any
  negative_below: float = 0.1
  positive_above: float = 0.9

  def describe(self) -> dict[str, Any]:
    return {"rule": "cross-encoder", "negative_below": self.negative_below, "positive_above": self.positive_above}

  def judge(self, pool: Pool, block: slice, kept: np.ndarray) -> Verdict:
    scores = np.asarray(self.scores[block])
    wrong = kept & ((scores < 0) | (scores > 1))
    if wrong.any():
      fix = "Put the logits through a sigmoid"
      raise InputError("a cross-encoder's score is no probability", value=float(scores[wrong][0]), fix=fix)
    hits = {
      Reason.PSEUDO_POSITIVE: scores > self.positive_above,
      Reason.CROSS_ENCODER: scores >= self.negative_below,
      Reason.NOT_SCORED: np.isnan(scores),
    }
    return Verdict(hits, 0)


class Denoiser:
  """Applies rules to a pool block by block, and counts."""

  def __init__(self, rules: Sequence[Rule], names: Sequence[str]):
    """Applies `rules` in order to pools with the sources `names`."""
    self._rules, self._names = rules, names
    self._removed: list[dict[Reason, np.ndarray]] = [{} for _ in rules]
    self._unjudged = np.zeros(len(rules), np.int64)
    self._kept, self._emptied = 0, 0

  def __call__(self, pool: Pool, block: slice) -> Pool:
    """The pool of `block`'s queries with the reasons of all rules added to those that it has."""
    reasons, kept = np.array(pool.reasons), pool.kept(slice(None))
    for number, rule in enumerate(self._rules):
      verdict = rule.judge(pool, block, kept)
      self._unjudged[number] += verdict.unjudged
      for reason, hit in verdict.hits.items():
        removed = kept & hit
        reasons[removed] = reason
        kept &= ~hit
        counted = self._removed[number].setdefault(reason, np.zeros(1 + len(self._names), np.int64))
        counted += _by_source(pool.sources[removed], len(self._names))
    self._kept += int(kept.sum())
    self._emptied += int(((pool.rows >= 0).any(1) & ~kept.any(1)).sum())
    return dataclasses.replace(pool, reasons=reasons)

  def counts(self) -> dict[str, Any]:
    """Entries for the pool's manifest; see `denoise`."""
    applied = [
      {**rule.describe(), "removed": {reason.name: self._named(counted) for reason, counted in removed.items()},
       "unjudged": int(unjudged)}
      for rule, removed, unjudged in zip(self._rules, self._removed, self._unjudged, strict=True)
    ]  # fmt: skip
    return {"denoising": applied, "kept": self._kept, "emptied": self._emptied}

  def _named(self, counts: np.ndarray) -> dict[str, int]:
    return dict(zip(("all", *self._names), counts.tolist(), strict=True))


def denoise(directory: Path, pool: Path, rules: Sequence[Rule]) -> Pool:
  """Writes another pool with what rules remove and why; the one that is read stays as it is, its reasons are kept.

  Args:
    directory: of the new pool; one that is there is replaced.
    pool: a pool's directory.
    rules: in order.

  Returns:
    The denoised pool. Its manifest's "denoising" has an entry for each rule: its options, how many candidates each
    reason removed, in all and by source (a candidate of two sources counts for both), and how many it could not judge.
    "kept" is how many are left, "emptied" how many queries had candidates and have none now.
  """
  source = Pool.open(pool)
  denoiser = Denoiser(rules, source.names)
  with (
    PoolWriter(directory, *source.rows.shape, source.names) as writer,
    progress.bar("denoise", len(source), "query") as shown,
  ):
    for block in source.blocks():
      writer.append(denoiser(source.part(block), block))
      shown.advance(block.stop - block.start)
      preemption.check("denoising will begin again")
    counts = denoiser.counts()
    counts["denoising"] = [*source.manifest.get("denoising", ()), *counts["denoising"]]
    return writer.finish({**source.manifest, **counts})


def _by_source(bits: np.ndarray, num_sources: int) -> np.ndarray:
  """Candidates in all and by source, int64 [1 + S], of their source bits [n]."""
  return np.array([len(bits), *((bits >> source & 1).sum() for source in range(num_sources))], np.int64)
