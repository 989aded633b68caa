"""Queries with their top passages, right and wrong, for people to look at."""

from __future__ import annotations

from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.data.records import Passage
from dptdr_jax.retrieval.runs import Run

_SHOWN_TEXT = 300  # characters of a passage
_TOP = 3  # passages a query


def choose(data: PreparedData, name: str, found: Run, wanted: int) -> list[dict]:
  """Describes queries of a split, half of them with a relevant passage on top where there are as many.

  A split that is measured by answers alone has no judgements to choose by: all of its queries count as wrong.

  Args:
    data: what the run was made on.
    name: of the split.
    found: the run.
    wanted: number of queries.
  """
  split = data.splits[name]
  ranks = {query: _first_relevant(found, query, split.positives(query)) for query in range(len(split))}
  right = [query for query, rank in ranks.items() if rank == 1]
  wrong = [query for query, rank in ranks.items() if rank != 1]
  half = min(len(right), max(wanted // 2, wanted - len(wrong)))
  chosen = sorted(_spread(right, half) + _spread(wrong, wanted - half))
  return [_describe(data, name, found, query, ranks[query]) for query in chosen]


def _first_relevant(found: Run, query: int, relevant) -> int | None:
  wanted = set(relevant.tolist())
  return next((rank for rank, row in enumerate(found.rows[query].tolist(), 1) if row in wanted), None)


def _spread(queries: list[int], count: int) -> list[int]:
  """`count` of the queries at even distances."""
  count = min(count, len(queries))
  return [queries[place * len(queries) // count] for place in range(count)]


def _describe(data: PreparedData, name: str, found: Run, query: int, rank: int | None) -> dict:
  split = data.splits[name]
  relevant = split.positives(query).tolist()
  top = [
    shown(data.passages[row]) | {"score": float(score), "relevant": row in relevant}
    for row, score in zip(found.rows[query, :_TOP].tolist(), found.scores[query, :_TOP], strict=True)
    if row >= 0
  ]
  wanted = shown(data.passages[relevant[0]]) if relevant else None
  return {
    "split": name, "query": split.queries[query].text, "rank": rank, "right": rank == 1, "top": top, "wanted": wanted
  }  # fmt: skip


def shown(passage: Passage) -> dict:
  """A passage as the report shows it."""
  text = passage.text if len(passage.text) <= _SHOWN_TEXT else passage.text[: _SHOWN_TEXT - 1] + "…"
  return {"id": passage.id, "title": passage.title, "text": text}
