"""A pool of negatives in numbers: where they come from, what denoising removed and why, and a sample of queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dptdr_jax.reporting.examples import COUNT, shown, spread
from dptdr_jax.retrieval.candidates import Pool, Reason
from dptdr_jax.retrieval.denoise import MarginRule

EDGES = np.linspace(0, 1.5, 31)  # of score over positive; what lies outside counts in the first or the last bin
_SHOWN = 4  # negatives of a query, and removed candidates
Table = tuple[list[str], list[list[str]]]  # a head, and rows


def summary(
  pool: Pool, passages, split, *, separator: str, pseudo_positives: bool, warnings: Sequence[str]
) -> dict[str, Any]:
  """Describes a denoised pool, as JSON has it.

  Args:
    pool: of the split's queries, denoised.
    passages: the corpus by row: `.id`, `.title`, `.text`.
    split: its Q queries: `.name`, `.queries[row].text`, `.positives(row)`, `.trainable`, the rows that have a positive.
    separator: between a title and a text; for readers of the summary, as the next one.
    pseudo_positives: whether training takes what the cross-encoder is sure of as positives.
    warnings: what is suspicious in the pool.
  """
  manifest = pool.manifest
  ratios = {name: _ratios(pool, number) for number, name in enumerate(pool.names)}
  return {
    "split": split.name,
    "separator": separator,
    "pseudo_positives": pseudo_positives,
    "sources": list(pool.names),
    **{name: manifest[name] for name in ("counts", "combinations", "unanswered", "denoising", "kept", "emptied")},
    "warnings": list(warnings),
    "histograms": {name: histogram for name, (histogram, _) in ratios.items()},
    "without_ratio": {name: without for name, (_, without) in ratios.items()},
    "examples": [_example(pool, passages, split, query) for query in spread(split.trainable.tolist(), COUNT)],
  }


def _ratios(pool: Pool, source: int) -> tuple[dict[str, list[int]], int]:
  """Histograms of score over the positive's score in one source, of the negatives ("kept") and of what was removed.

  Second: how many queries the source has candidates of, but no positive with a score above 0 to divide by.
  """
  counts = {name: np.zeros(len(EDGES) - 1, np.int64) for name in ("kept", "removed")}
  without = 0
  for block in pool.blocks():
    scores, positive = pool.scores[block, :, source], pool.positive_scores[block, source, None]
    known, divides = np.isfinite(scores) & (pool.rows[block] >= 0), positive > 0
    without += int((known.any(1) & ~divides[:, 0]).sum())
    with np.errstate(invalid="ignore", divide="ignore"):
      ratio = np.clip(scores / positive, EDGES[0], EDGES[-1])
    kept = pool.kept(block)
    for name, chosen in (("kept", kept), ("removed", ~kept)):
      counts[name] += np.histogram(ratio[known & divides & chosen], EDGES)[0]
  return {name: values.tolist() for name, values in counts.items()}, without


def _example(pool: Pool, passages, split, query: int) -> dict[str, Any]:
  part = pool.part(slice(query, query + 1))
  kept = part.kept(slice(None))[0]
  removed = (part.rows[0] >= 0) & ~kept
  margins = _margin_sources(part)

  def described(places: np.ndarray) -> list[dict[str, Any]]:
    candidates = []
    for place in places[:_SHOWN].tolist():
      reason = _words(Reason(int(part.reasons[0, place])).name)
      candidates.append(
        shown(passages[int(part.rows[0, place])])
        | {"scores": _finite(pool.names, part.scores[0, place])}
        | {"reason": f"{margins[place]}: {reason}" if place in margins else reason}
      )
    return candidates

  positive = shown(passages[int(split.positives(query)[0])])
  return {
    "query": split.queries[query].text,
    "positive": positive | {"scores": _finite(pool.names, part.positive_scores[0])},
    "negatives": described(np.flatnonzero(kept)),
    "removed": described(np.flatnonzero(removed)),
    "num_negatives": int(kept.sum()),
    "num_removed": int(removed.sum()),
  }


def _margin_sources(part: Pool) -> dict[int, str]:
  """Whose margin removed a candidate of the one query, {place: source}: `reasons` is the same for all sources."""
  sources: dict[int, str] = {}
  for step in part.manifest["denoising"]:
    if step["rule"] == "margins":
      hits = MarginRule(step["source"], step["relative"]).judge(part, slice(0, 1), part.rows >= 0).hits
      for reason, hit in hits.items():
        for place in np.flatnonzero(hit[0] & (part.reasons[0] == reason)).tolist():
          sources.setdefault(place, step["source"])  # rules are applied in order: the first one removed it
  return sources


def _finite(names: Sequence[str], scores: np.ndarray) -> dict[str, float]:
  """Scores by source, without those that a source doesn't know."""
  return {name: round(float(score), 4) for name, score in zip(names, scores, strict=True) if np.isfinite(score)}


def tables(about: Mapping[str, Any]) -> list[Table]:
  """A summary's counts, and what denoising removed, by rule and source."""
  numbers = dict(about["counts"])
  numbers |= {f"from {name}": number for name, number in about["combinations"].items()}
  for words, by_source in (
    ("queries that {} does not answer", about["unanswered"]),
    ("queries not in {}'s histogram: no positive scores above 0", about["without_ratio"]),
  ):
    numbers |= {words.format(name): number for name, number in by_source.items() if number}
  numbers |= {"negatives after denoising": about["kept"], "queries without negatives after it": about["emptied"]}
  columns, removed = ["all", *about["sources"]], []
  for step in about["denoising"]:
    rule = " of ".join(str(step[key]) for key in ("rule", "source") if key in step)
    reasons = dict(step["removed"]) | ({"not judged, kept": {"all": step["unjudged"]}} if step["unjudged"] else {})
    for reason, of in reasons.items():
      removed.append([f"{rule}: {_words(reason)}", *(f"{of[name]:,}" if name in of else "" for name in columns)])
  counts = ["all queries", "count"], [[name, f"{number:,}"] for name, number in numbers.items()]
  return [counts, (["removed by", *columns], removed)] if removed else [counts]


def overview(by_step: Mapping[int, Mapping]) -> Table:
  """The counts of several pools of one training, {step from which it was used: its summary}."""
  head = ["from step", "candidates", "positives removed", "negatives after denoising", "queries without negatives"]
  rows = [
    (step, about["counts"]["candidates"], about["counts"]["positives removed"], about["kept"], about["emptied"])
    for step, about in sorted(by_step.items())
  ]
  return head, [[f"{number:,}" for number in row] for row in rows]


def _words(reason: str) -> str:
  return reason.lower().replace("_", " ")
