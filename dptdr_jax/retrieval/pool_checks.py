"""What to know of a pool before training on it: signs that it is no good, and what denoising did to known positives."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dptdr_jax.retrieval.candidates import Pool, Reason

# Shares above which a pool is suspicious; ours.
ABOVE_POSITIVE = 0.5
NOT_FOUND = 0.5
EMPTY = 0.01
ONE_SOURCE = 0.95


class HiddenStep(NamedTuple):
  """Where hidden positives stand after a step of denoising.

  Attributes:
    after: "merge" (nothing is removed yet), or the name of the reason that was applied last.
    hidden: share of all hidden pairs that stand among the negatives.
    others_lost: share of the other candidates that are gone.
  """

  after: str
  hidden: float
  others_lost: float


def hidden_positives(pool: Pool, queries: np.ndarray, rows: np.ndarray) -> list[HiddenStep]:
  """How many judged positives, held back when the pool was merged and denoised, each reason found, and at what cost.

  Steps add up in the order of the reasons' codes. For one rule alone, denoise by it alone.

  Args:
    pool: merged and denoised without knowing of them.
    queries, rows: int [J], the hidden (query, passage) pairs, none twice; J ≥ 1.

  Returns:
    The merged pool, then a step for each reason that took a candidate.
  """
  hidden_keys = np.asarray(queries, np.int64) << 32 | np.asarray(rows, np.int64)
  if not len(hidden_keys) or len(np.unique(hidden_keys)) < len(hidden_keys):
    raise ValueError(f"{len(hidden_keys)} hidden pairs: there must be one, and none twice")
  counts = np.zeros((2, len(Reason)), np.int64)  # of others, of hidden ones
  for block in pool.blocks():
    found, reasons = pool.rows[block], pool.verdicts(block)
    there = found >= 0
    keys = np.arange(block.start, block.stop)[:, None] << 32 | found.astype(np.int64)
    hidden = there & np.isin(keys, hidden_keys)
    counts[0] += np.bincount(reasons[there & ~hidden], minlength=len(Reason))
    counts[1] += np.bincount(reasons[hidden], minlength=len(Reason))
  (others, hidden_left), lost = counts.sum(1), 0
  steps = [HiddenStep("merge", float(hidden_left / len(hidden_keys)), 0.0)]
  for reason in Reason:
    if reason != Reason.KEPT and counts[:, reason].any():
      lost, hidden_left = lost + counts[0, reason], hidden_left - counts[1, reason]
      steps.append(HiddenStep(reason.name, float(hidden_left / len(hidden_keys)), float(lost / max(1, others))))
  return steps


def suspicions(pool: Pool) -> list[str]:
  """Says what makes a pool suspicious, a line each; an empty list where nothing does.

  Of what is left after denoising: most negatives that a source knows score above its positive there; queries without a
  negative; one source alone gave nearly all, though several were asked. And of what was found: a source doesn't know
  the positive's score for most queries that it answers, as a run that doesn't hold it; nothing can be compared there.
  """
  kept_in_all, empty = 0, 0
  above, compared, alone, answered, not_found = (np.zeros(len(pool.names), np.int64) for _ in range(5))
  for block in pool.blocks():
    kept = pool.kept(block)
    kept_in_all += int(kept.sum())
    empty += int((~kept.any(1)).sum())
    bits = pool.sources[block][kept]
    alone += [int((bits == 1 << source).sum()) for source in range(len(pool.names))]
    if pool.positive_scores is not None:
      judged = ~np.isnan(pool.positive_scores[block]).all(1, keepdims=True) | (len(pool.names) == 1)  # or none knows it
      for source in range(len(pool.names)):
        scores, positive = pool.scores[block, :, source], pool.positive_scores[block, source, None]
        unknown, scored = np.isnan(positive), scores > -np.inf
        asked = judged & (scored.any(1, keepdims=True) | ~unknown)
        answered[source] += int(asked.sum())
        not_found[source] += int((asked & unknown).sum())
        known = kept & scored & ~unknown
        compared[source] += int(known.sum())
        above[source] += int((known & (scores > positive)).sum())
  found = []
  for name, high, known in zip(pool.names, above, compared, strict=True):
    if high > ABOVE_POSITIVE * known:
      found.append(f"{high / known:.0%} of the negatives that {name} knows score above the positive there: "
                   "many may be positives, or it ranks badly")  # fmt: skip
  for name, missing, asked in zip(pool.names, not_found, answered, strict=True):
    if missing > NOT_FOUND * asked:
      found.append(f"{name} finds no positive for {missing / asked:.0%} of the queries that it answers: "
                   "a margin on it says nothing there, where all that it gives stands above the positive")  # fmt: skip
  if empty > EMPTY * len(pool):
    found.append(f"{empty} of {len(pool)} queries ({empty / len(pool):.1%}) have no negative: they get random passages")
  if len(pool.names) > 1 and alone.max() > ONE_SOURCE * kept_in_all:
    name = pool.names[int(alone.argmax())]
    found.append(f"{name} alone gave {alone.max() / kept_in_all:.0%} of the negatives, though "
                 f"{len(pool.names)} sources were asked")  # fmt: skip
  return found
