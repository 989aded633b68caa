"""Takes false negatives out of a pool of candidates: rules, each with its counts, and the pool that they leave.

A rule looks at a block of queries and says which candidates go and for which reason. Rules are applied in the order
in which they are given, a later one sees what the earlier ones left, so that every candidate has one reason at most.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from dptdr_jax.core import preemption, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path, atomic_directory, write_json
from dptdr_jax.retrieval.candidates import MERGED, Pool, Reason, open_arrays


class Verdict(NamedTuple):
  """What a rule says of a block of b queries.

  Attributes:
    hits: {reason: bool [b, K]}, the candidates that go; where several hit, the first one counts.
    unjudged: how many candidates it could not judge (no score, no positive); they stay.
  """

  hits: Mapping[Reason, np.ndarray]
  unjudged: int


class Rule(Protocol):
  """A way to tell false negatives; frozen, so that a pool's manifest can name what was applied."""

  def describe(self) -> dict[str, Any]:
    """Its name and options, as JSON has them."""
    ...

  def judge(self, pool: Pool, block: slice, kept: np.ndarray) -> Verdict:
    """Judges the candidates of a block of queries that are still negatives, `kept` bool [b, K]."""
    ...


@dataclasses.dataclass(frozen=True)
class MarginRule:
  """Positive-aware margins (NV-Retriever, arXiv 2407.15831): what scores too near to the positive, or above it, goes.

  The positive's score s⁺ is the best of the query's positives in that source (`Pool.positive_scores`; sentence-
  transformers takes the worst). Nothing goes where s⁺ is unknown, or where the source doesn't know the candidate.

  Attributes:
    source: whose scores.
    relative: a share r; s > s⁺ − (1 − r) · |s⁺| goes: above r · s⁺ where s⁺ > 0 (TopK-PercPos, there 0.95; sentence-
      transformers calls 1 − r relative_margin), as far below a negative s⁺ as below a positive one, and r = 1 is the
      positive's own score whatever its sign.
    absolute: m, in the score's unit; s > s⁺ − m goes.
  """

  source: str
  relative: float | None = None
  absolute: float | None = None

  def __post_init__(self):
    if self.relative is None and self.absolute is None:
      raise InputError("margins on a source without a relative or an absolute one", value=self.source)
    if self.relative is not None and not 0 < self.relative < np.inf:
      raise InputError("a relative margin is a share above 0 of the positive's score", value=self.relative)
    if self.absolute is not None and not np.isfinite(self.absolute):
      raise InputError("an absolute margin is a finite number", value=self.absolute)

  def describe(self) -> dict[str, Any]:
    """As Rule."""
    return {"rule": "margins", **dataclasses.asdict(self)}

  def judge(self, pool: Pool, block: slice, kept: np.ndarray) -> Verdict:
    """As Rule. Raises InputError where the pool has no such source, or no scores of positives."""
    number = pool.source_number(self.source)
    if pool.positive_scores is None:
      raise InputError("this pool has no scores of positives", value=self.source, fix="Mine it again.")
    scores = pool.scores[block, :, number]
    positive = pool.positive_scores[block, number, None]
    hits = {}
    if self.relative is not None:
      factor = np.where(positive > 0, np.float32(self.relative), np.float32(2 - self.relative))
      hits[Reason.RELATIVE_MARGIN] = scores > factor * positive  # as `relative` says it; never where NaN, as below
    if self.absolute is not None:
      hits[Reason.ABSOLUTE_MARGIN] = scores > positive - self.absolute
    return Verdict(hits, int((kept & (np.isneginf(scores) | np.isnan(positive))).sum()))


@dataclasses.dataclass(frozen=True)
class CrossEncoderRule:
  """RocketQA's denoising (arXiv 2010.08191, 3.2): only what a cross-encoder is sure of stays a negative.

  Attributes:
    scores: float32 [Q, K], probabilities that a candidate is relevant, NaN where it was not scored (it goes); an array,
      or whatever has a shape and gives blocks of queries.
    negative_below: stays where the probability is below it; RocketQA's is 0.1.
    positive_above: a pseudo-positive where it is above; RocketQA's is 0.9.
  """

  scores: Any
  negative_below: float = 0.1
  positive_above: float = 0.9

  def __post_init__(self):
    if not 0 <= self.negative_below <= self.positive_above <= 1:
      thresholds = (self.negative_below, self.positive_above)
      raise InputError("thresholds go 0 ≤ negative_below ≤ positive_above ≤ 1", value=thresholds)

  def describe(self) -> dict[str, Any]:
    """As Rule."""
    return {"rule": "cross-encoder", "negative_below": self.negative_below, "positive_above": self.positive_above}

  def judge(self, pool: Pool, block: slice, kept: np.ndarray) -> Verdict:
    """As Rule. Raises InputError for a number that is no probability."""
    if self.scores.shape != pool.rows.shape:
      raise ValueError(f"scores {self.scores.shape} for candidates {pool.rows.shape}")
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


def denoise(directory: Path, pool: Path, rules: Sequence[Rule]) -> Pool:
  """Applies rules to a pool and writes, atomically, another one that says what goes and why.

  The pool that is read stays as it is; where it was denoised before, its reasons stay and new ones are added. (So one
  can take out what is cheap to tell, score what is left by a cross-encoder, and denoise again.) Works block by block:
  some 20 MB, and what the rules take.

  Args:
    directory: replaced if it exists; another one than `pool`.
    pool: a pool's directory.
    rules: in order.

  Returns:
    The denoised pool. Its manifest's "denoising" has an entry for each rule: its options, how many candidates each
    reason took, in all and by the source that gave them (a candidate of two counts for both), and how many it could
    not judge. "kept" is how many are left, "emptied" how many queries had candidates and have none now.
  """
  source, target = pathlib.Path(pool), pathlib.Path(directory)
  opened = Pool.open(source)
  if source.resolve() == target.resolve():
    raise ValueError(f"{target}: a pool cannot be denoised onto itself")
  width = opened.rows.shape[1]
  counts: list[dict[Reason, np.ndarray]] = [{} for _ in rules]
  unjudged, kept_in_all, emptied = np.zeros(len(rules), np.int64), 0, 0
  with atomic_directory(target) as partial, progress.bar("denoise", len(opened), "query") as shown:
    for name in MERGED:
      if (source / f"{name}.npy").exists():
        shutil.copyfile(source / f"{name}.npy", partial / f"{name}.npy")
    with open_arrays(partial, ["reasons"], len(opened), width, len(opened.names)) as streams:
      for block in opened.blocks():
        reasons, kept = opened.verdicts(block), opened.kept(block)
        answered = (opened.rows[block, :1] >= 0).any(1)
        for number, rule in enumerate(rules):
          verdict = rule.judge(opened, block, kept)
          unjudged[number] += verdict.unjudged
          for reason, hit in verdict.hits.items():
            removed = kept & hit
            reasons[removed] = reason
            kept &= ~hit
            taken = counts[number].setdefault(reason, np.zeros(1 + len(opened.names), np.int64))
            taken += _by_source(opened.sources[block][removed], len(opened.names))
        streams["reasons"].write(reasons.tobytes())
        kept_in_all += int(kept.sum())
        emptied += int((answered & ~kept.any(1)).sum())
        shown.advance(block.stop - block.start)
        preemption.check("the pool will be denoised again")
    applied = [
      {**rule.describe(), "removed": {reason.name: _named(taken, opened.names) for reason, taken in counted.items()},
       "unjudged": int(missing)}
      for rule, counted, missing in zip(rules, counts, unjudged, strict=True)
    ]  # fmt: skip
    manifest = {**opened.manifest, "denoising": [*opened.manifest.get("denoising", []), *applied],
                "kept": kept_in_all, "emptied": emptied}  # fmt: skip
    write_json(partial / "manifest.json", manifest)
  return Pool.open(target)


def _by_source(bits: np.ndarray, num_sources: int) -> np.ndarray:
  """Candidates in all and by source, int64 [1 + S], of their source bits [n]."""
  return np.array([len(bits), *((bits >> source & 1).sum() for source in range(num_sources))], np.int64)


def _named(counts: np.ndarray, names: Sequence[str]) -> dict[str, int]:
  return {"all": int(counts[0]), **{name: int(count) for name, count in zip(names, counts[1:], strict=True)}}
