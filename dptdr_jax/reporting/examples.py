"""Queries with their top passages, right and wrong, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

COUNT = 12  # queries that a report shows
_TEXT = 300  # characters of a passage
_TOP = 3  # passages a query


def choose(split, passages, run, count: int = COUNT) -> list[dict]:
  """Chooses queries at even distances, half of them with a relevant passage on top if there are as many.

  A split that is measured by answers alone has no judgements to choose by: all of its queries count as wrong.

  Args:
    split: Q queries: `.name`, `.queries[row].text`, `.positives(row)`.
    passages: the corpus by row: `.id`, `.title`, `.text`.
    run: `.rows` and `.scores` [Q, K].
    count: number of queries.

  Returns:
    For each: "split", "query", "rank" of the first relevant passage from 1 or None, "right", "top" passages with
    "score" and "relevant", and "wanted", the first relevant passage or None.
  """
  ranks: list[int | None] = []
  for query in range(len(split)):
    found = np.flatnonzero(np.isin(run.rows[query], split.positives(query)))
    ranks.append(int(found[0]) + 1 if len(found) else None)
  right = [query for query, rank in enumerate(ranks) if rank == 1]
  wrong = [query for query, rank in enumerate(ranks) if rank != 1]
  half = min(len(right), max(count // 2, count - len(wrong)))
  chosen = sorted(spread(right, half) + spread(wrong, count - half))
  return [_describe(split, passages, run, query, ranks[query]) for query in chosen]


def spread(items: Sequence[int], count: int) -> list[int]:
  """`count` of the items at even distances, all of them if they are fewer."""
  count = min(count, len(items))
  return [items[place * len(items) // count] for place in range(count)]


def _describe(split, passages, run, query: int, rank: int | None) -> dict[str, Any]:
  relevant = split.positives(query).tolist()
  top = [
    shown(passages[row]) | {"score": float(score), "relevant": row in relevant}
    for row, score in zip(run.rows[query, :_TOP].tolist(), run.scores[query, :_TOP], strict=True)
    if row >= 0
  ]
  return {
    "split": split.name,
    "query": split.queries[query].text,
    "rank": rank,
    "right": rank == 1,
    "top": top,
    "wanted": shown(passages[relevant[0]]) if relevant else None,
  }


def shown(passage) -> dict[str, str]:
  """A passage as a page shows it: its text is cut."""
  text = passage.text if len(passage.text) <= _TEXT else passage.text[: _TEXT - 1] + "…"
  return {"id": passage.id, "title": passage.title, "text": text}
