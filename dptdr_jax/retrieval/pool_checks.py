"""Signs of a bad pool, before anything is trained on it."""

from __future__ import annotations

import numpy as np

from dptdr_jax.retrieval.candidates import Pool

# Shares above which a pool is suspicious; ours.
ABOVE_POSITIVE = 0.5
NOT_RETRIEVED = 0.5
EMPTY = 0.01
ONE_SOURCE = 0.95


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
