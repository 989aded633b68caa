"""What the report shows of a pool of negatives: where they come from, what was taken out and why, and a sample."""

from __future__ import annotations

import html
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from dptdr_jax.data.prepare import PreparedData, PreparedSplit
from dptdr_jax.retrieval.candidates import Pool, Reason
from dptdr_jax.retrieval.denoise import MarginRule
from dptdr_jax.stages import drawing
from dptdr_jax.stages.examples import shown

EDGES = np.linspace(0, 1.5, 31)  # of score over positive; what lies outside counts in the first or the last bin
_QUERIES = 12  # of the sample
_SHOWN = 4  # negatives of a query, and candidates that were taken out


def summary(config: ConfigDict, data: PreparedData, pool: Pool, warnings: list[str]) -> dict:
  """Describes a denoised pool, as JSON has it."""
  manifest = pool.manifest
  return {
    "split": config.data.train_split,
    "separator": config.text.separator,
    "pseudo_positives": config.mine.pseudo_positives,
    "sources": list(pool.names),
    "counts": manifest["counts"],
    "combinations": manifest["combinations"],
    "unanswered": manifest["unanswered"],
    "denoising": manifest["denoising"],
    "kept": manifest["kept"],
    "emptied": manifest["emptied"],
    "warnings": warnings,
    "histograms": {name: _histogram(pool, number) for number, name in enumerate(pool.names)},
    "beside_histograms": {name: _beside_histogram(pool, number) for number, name in enumerate(pool.names)},
    "examples": _examples(config, data, pool),
  }


def _histogram(pool: Pool, source: int) -> dict[str, list[int]]:
  """Counts of score over positive in a source: of the negatives ('kept') and of what was taken out ('removed')."""
  counts = {"kept": np.zeros(len(EDGES) - 1, np.int64), "removed": np.zeros(len(EDGES) - 1, np.int64)}
  for block in pool.blocks():
    scores, positive = pool.scores[block, :, source], pool.positive_scores[block, source, None]
    known = np.isfinite(scores) & (positive > 0)
    with np.errstate(invalid="ignore"):
      ratio = np.clip(scores / positive, EDGES[0], EDGES[-1])
    for name, chosen in (("kept", pool.kept(block)), ("removed", ~pool.kept(block))):
      counts[name] += np.histogram(ratio[known & chosen & (pool.rows[block] >= 0)], EDGES)[0]
  return {name: values.tolist() for name, values in counts.items()}


def _beside_histogram(pool: Pool, source: int) -> int:
  """How many queries a source knows candidates of, but no positive's score above 0: there is nothing to divide by."""
  count = 0
  for block in pool.blocks():
    known = (np.isfinite(pool.scores[block, :, source]) & (pool.rows[block] >= 0)).any(1)
    count += int((known & ~(pool.positive_scores[block, source] > 0)).sum())
  return count


def _examples(config: ConfigDict, data: PreparedData, pool: Pool) -> list[dict]:
  split = data.splits[config.data.train_split]
  trained = [query for query in range(len(split)) if len(split.positives(query))]
  chosen = [trained[place * len(trained) // _QUERIES] for place in range(_QUERIES)]
  return [_example(data, pool, split, query) for query in sorted(set(chosen))]


def _example(data: PreparedData, pool: Pool, split: PreparedSplit, query: int) -> dict:
  there = np.flatnonzero(pool.rows[query] >= 0)
  reasons = pool.verdicts(slice(query, query + 1))[0]
  removed = reasons[there] != Reason.KEPT
  margins = _margins(pool, query)

  def described(places: np.ndarray) -> list[dict]:
    return [
      shown(data.passages[int(pool.rows[query, place])])
      | {"scores": _finite(pool.names, pool.scores[query, place]), "reason": Reason(int(reasons[place])).name}
      | ({"margin_of": margins[place]} if place in margins else {})
      for place in places[:_SHOWN]
    ]

  return {
    "query": split.queries[query].text,
    "positive": shown(data.passages[int(split.positives(query)[0])]),
    "positive_scores": {} if pool.positive_scores is None else _finite(pool.names, pool.positive_scores[query]),
    "negatives": described(there[~removed]),
    "removed": described(there[removed]),
    "numbers": [int((~removed).sum()), int(removed.sum())],
  }


def _margins(pool: Pool, query: int) -> dict[int, str]:
  """Whose margin took a candidate of a query, {place: source}: the reason is the same for all sources."""
  block, found = slice(query, query + 1), {}
  reasons = pool.verdicts(block)
  for step in pool.manifest["denoising"]:
    if step["rule"] == "margins":
      rule = MarginRule(step["source"], step["relative"], step["absolute"])
      for reason, hit in rule.judge(pool, block, pool.kept(block)).hits.items():
        for place in np.flatnonzero(hit & (reasons == reason)):
          found.setdefault(int(place), rule.source)  # the first that hits took it
  return found


def _finite(names: tuple[str, ...], scores: np.ndarray) -> dict[str, float]:
  """Scores by source, without those that a source doesn't know."""
  return {name: round(float(score), 4) for name, score in zip(names, scores, strict=True) if np.isfinite(score)}


def section(title: str, about: Mapping) -> str:
  """What `summary` found, as a part of the report."""
  parts = [f"<h2>{html.escape(title)}</h2>"]
  parts += [f"<p class=warning>{html.escape(line)}</p>" for line in about["warnings"]]
  rows = {**about["counts"], "left after denoising": about["kept"], "queries emptied by it": about["emptied"]}
  rows |= {f"from {name}": number for name, number in about["combinations"].items()}
  rows |= {f"queries that {name} does not answer": number for name, number in about["unanswered"].items() if number}
  rows |= {
    f"queries that {name}'s histogram leaves out, their positive's score is unknown or not above 0": number
    for name, number in about.get("beside_histograms", {}).items() if number  # older runs lack it
  }  # fmt: skip
  for step in about["denoising"]:
    rule = " of ".join(str(step[key]) for key in ("rule", "source") if key in step)
    for reason, numbers in step["removed"].items():
      shares = ", ".join(f"{name} {number:,}" for name, number in numbers.items() if name != "all")
      rows[f"taken out by {rule}: {_words(reason)} ({shares})"] = numbers["all"]
    rows |= {f"not judged by {rule}": step["unjudged"]} if step["unjudged"] else {}
  cells = (f"<tr><th>{html.escape(name)}</th><td>{number:,}</td></tr>" for name, number in rows.items())
  parts += ["<table>", *cells, "</table>", _histograms(about["histograms"])]
  parts += [_shown(example) for example in about["examples"]]
  return "\n".join(parts)


def overview(title: str, found: Mapping[int, Mapping]) -> str:
  """The counts of several pools of one round, {step from which it holds: what `summary` found}, as a table."""
  names = ("from step", "candidates", "positives removed", "left after denoising", "queries emptied by it")
  rows = [
    (step, about["counts"]["candidates"], about["counts"]["positives removed"], about["kept"], about["emptied"])
    for step, about in found.items()
  ]
  head = "".join(f"<th>{name}</th>" for name in names)
  lines = ("<tr>" + "".join(f"<td>{number:,}</td>" for number in row) + "</tr>" for row in rows)
  return "\n".join([f"<h2>{html.escape(title)}</h2>", f"<table><tr>{head}</tr>", *lines, "</table>"])


def _histograms(histograms: Mapping) -> str:
  figure, axes = drawing.panels(1, len(histograms), (4.2, 2.8))
  for axis, (name, counts) in zip(axes.flat, histograms.items(), strict=True):
    for kind, colour in (("kept", "#1a7f37"), ("removed", "#cf222e")):
      axis.stairs(counts[kind], EDGES, fill=True, alpha=0.5, color=colour, label=kind)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_title(f"{name}: score over the positive's", fontsize=9)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)
  return drawing.svg(figure)


def _shown(example: Mapping) -> str:
  kept, removed = example["numbers"]
  items = [_item(example["positive"] | {"scores": example["positive_scores"]}, "relevant", "positive")]
  items += [_item(candidate, "other", "negative") for candidate in example["negatives"]]
  items += [_item(candidate, "removed", _why(candidate)) for candidate in example["removed"]]
  return (
    f"<details><summary>{html.escape(example['query'])} <small>{kept} negatives, {removed} taken out</small></summary>"
    f"<ul>{''.join(items)}</ul></details>"
  )


def _why(candidate: Mapping) -> str:
  words = _words(candidate["reason"])
  return f"{candidate['margin_of']}: {words}" if "margin_of" in candidate else words


def _words(reason: str) -> str:
  return reason.lower().replace("_", " ")


def _item(passage: Mapping, kind: str, label: str) -> str:
  scores = ", ".join(f"{html.escape(name)} {score:g}" for name, score in passage["scores"].items())
  return (
    f"<li class={kind}><small>{html.escape(label)} · {scores}</small> "
    f"<b>{html.escape(passage['title'] or passage['id'])}</b> {html.escape(passage['text'])}</li>"
  )
