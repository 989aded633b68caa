"""Checks of a pool before training on it: signs of a bad one, and what denoising does to known positives."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dptdr_jax.retrieval.candidates import Pool, Reason

# Shares above which a pool is suspicious; ours.
ABOVE_POSITIVE = 0.5
NOT_RETRIEVED = 0.5
EMPTY = 0.01
ONE_SOURCE = 0.95


class HiddenStep(NamedTuple):
  """How many hidden positives are left after a step of denoising.

  Attributes:
    after: "merge" (nothing is removed yet), or the name of the reason that was applied last.
    hidden: share of all hidden pairs that are among the negatives.
    others_lost: share of the other candidates that were removed.
  """

  after: str
  hidden: float
  others_lost: float


def hidden_positives(pool: Pool, queries: np.ndarray, rows: np.ndarray) -> list[HiddenStep]:
  """How many judged positives, held back when the pool was made, each reason removes, and at what cost.

  Steps add up in the order of the reasons' codes. For one rule alone, denoise by it alone.

  Args:
    pool: merged and denoised without the hidden judgements.
    queries, rows: int [J], the hidden (query, passage) pairs, none twice; J ≥ 1.

  Returns:
    The merged pool, then a step for each reason that removed a candidate.
  """
  hidden_keys = np.asarray(queries, np.int64) << 32 | np.asarray(rows, np.int64)
  if not len(hidden_keys) or len(np.unique(hidden_keys)) < len(hidden_keys):
    raise ValueError(f"{len(hidden_keys)} hidden pairs: there must be at least one, and none twice")
  codes = max(Reason) + 1
  counts = np.zeros((2, codes), np.int64)  # of others, of hidden ones
  for block in pool.blocks():
    rows_of, reasons = pool.rows[block], pool.reasons[block]
    keys = np.arange(block.start, block.stop)[:, None] << 32 | rows_of.astype(np.int64)
    hidden = (rows_of >= 0) & np.isin(keys, hidden_keys)
    counts[0] += np.bincount(reasons[(rows_of >= 0) & ~hidden], minlength=codes)
    counts[1] += np.bincount(reasons[hidden], minlength=codes)
  (others, hidden_left), lost = counts.sum(1), 0
  steps = [HiddenStep("merge", float(hidden_left / len(hidden_keys)), 0.0)]
  for reason in Reason:
    if reason != Reason.KEPT and counts[:, reason].any():
      lost, hidden_left = lost + counts[0, reason], hidden_left - counts[1, reason]
      steps.append(HiddenStep(reason.name, float(hidden_left / len(hidden_keys)), float(lost / max(1, others))))
  return steps


def suspicions(pool: Pool) -> list[str]:
  """Says what makes a pool suspicious, a line each; an empty list if nothing does.

  Of the negatives that denoising kept: most of those that a source knows score above its positive; queries without a
  negative; one of several sources contributed nearly all. Of each source: it doesn't know the positive's score for most
  queries that it answers, so that its margin cannot apply to them.
  """
  kept_in_all, empty = 0, 0
  above, compared, alone, answered, unknown = (np.zeros(len(pool.names), np.int64) for _ in range(5))
  for block in pool.blocks():
    kept = pool.kept(block)
    kept_in_all += int(kept.sum())
    empty += int((~kept.any(1)).sum())
    bits = pool.sources[block][kept]
    alone += [int((bits == 1 << source).sum()) for source in range(len(pool.names))]
    # Queries without a positive don't count: no source knows its score.
    judged = ~np.isnan(pool.positive_scores[block]).all(1, keepdims=True) | (len(pool.names) == 1)
    for source in range(len(pool.names)):
      scores, positive = pool.scores[block, :, source], pool.positive_scores[block, source, None]
      missing, scored = np.isnan(positive), scores > -np.inf
      asked = judged & (scored.any(1, keepdims=True) | ~missing)
      answered[source] += int(asked.sum())
      unknown[source] += int((asked & missing).sum())
      known = kept & scored & ~missing
      compared[source] += int(known.sum())
      above[source] += int((known & (scores > positive)).sum())
  lines = []
  for name, high, known in zip(pool.names, above, compared, strict=True):
    if high > ABOVE_POSITIVE * known:
      lines.append(f"{high / known:.0%} of the negatives that {name} retrieved score above the positive: "
                   "many may be positives, or it ranks badly")  # fmt: skip
  for name, missing, asked in zip(pool.names, unknown, answered, strict=True):
    if missing > NOT_RETRIEVED * asked:
      lines.append(f"{name} retrieves no positive for {missing / asked:.0%} of the queries that it answers: "
                   "its margin cannot apply there")  # fmt: skip
  if empty > EMPTY * len(pool):
    lines.append(f"{empty} of {len(pool)} queries ({empty / len(pool):.1%}) have no negative: they get random passages")
  if len(pool.names) > 1 and alone.max() > ONE_SOURCE * kept_in_all:
    name = pool.names[int(alone.argmax())]
    lines.append(f"{name} alone contributed {alone.max() / kept_in_all:.0%} of the negatives, though "
                 f"there are {len(pool.names)} sources")  # fmt: skip
  return lines
