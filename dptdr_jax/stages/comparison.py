"""Runs of an ablation beside each other: means over seeds, intervals, paired tests, quality against parameters."""

from __future__ import annotations

import dataclasses
import html
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from dptdr_jax.core import files
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.retrieval import measures
from dptdr_jax.stages import drawing, systems
from dptdr_jax.stages.layout import Layout

BASELINES = {"bm25": "BM25", "backbone": "untuned backbone", "pretrain": "pretrained backbone"}
RERANKED = ", reranked"


@dataclasses.dataclass(frozen=True)
class Done:
  """A run that has ended: one arm, one seed."""

  arm: str
  seed: int
  rounds: int
  workdir: pathlib.Path


def write(directory: pathlib.Path, runs: Sequence[Done], named: Mapping[str, str], arms: Mapping[str, dict]) -> None:
  """Writes ablation.json, ablation.md and ablation.html of the runs so far.

  An arm's value of a query is its mean over the arm's seeds: intervals and tests are over queries, and say nothing of
  other seeds; the spread over seeds stands beside them.

  Args:
    named: by split, the measure that the tests and the plot are about, as it is called there.
    arms: what was changed for each; differences are from the first, and there are none where it has no run.
  """
  first = next(iter(arms))
  there = any(run.arm == first for run in runs)
  found = {split: _compare(runs, list(arms), measure, split) for split, measure in named.items()}
  files.write_json(directory / "ablation.json", {**found, "arms": arms, "reference": first if there else None})
  tables = {split: f"{_table(systems, named[split])}\n\n{_caption(first, there)}" for split, systems in found.items()}
  with files.atomic_path(directory / "ablation.md") as partial:
    partial.write_text("\n\n".join(f"{split}\n\n{table}" for split, table in tables.items()) + "\n", encoding="utf-8")
  parts = [f"<h2>{html.escape(split)}</h2>{_plot(systems, named[split])}<pre>{html.escape(tables[split])}</pre>"
           for split, systems in found.items()]  # fmt: skip
  with files.atomic_path(directory / "ablation.html") as partial:
    partial.write_text(f"<!doctype html><meta charset=utf-8><title>ablation</title>{''.join(parts)}", encoding="utf-8")


def _compare(runs: Sequence[Done], arms: Sequence[str], measure: str, split: str) -> dict[str, dict]:
  """By system: 'seeds', 'parameters', 'means', 'interval' and 'spread' of the measure, and against the first arm, over
  the seeds that both have and where both have the same queries: 'difference' (see `paired`)."""
  found, layouts = {}, [Layout.of(run.workdir) for run in runs]
  results = [files.read_json(layout.results) for layout in layouts]
  elsewhere = {name: name for each in results for name in each if not systems.is_own(name)}
  for system, label in {**BASELINES, **elsewhere}.items():
    measured = [(layout, system) for layout in layouts if layout.per_query(system, split).exists()]
    if measured:
      found[label] = _system(measured[:1], split, measure) | {"parameters": 0}
  reference: dict[int, tuple[Layout, str]] = {}
  for arm in arms:
    mine = {
      run.seed: (layout, f"train{run.rounds}") for layout, run in zip(layouts, runs, strict=True) if run.arm == arm
    }
    if not mine:
      continue
    summary = files.read_json(next(iter(mine.values()))[0].summary)
    ranked = {arm: (mine, summary["trained_parameters"])}
    if crossed := summary.get("cross_parameters"):
      again = {seed: (layout, systems.RERANKED) for seed, (layout, _) in mine.items()}
      ranked[f"{arm}{RERANKED}"] = again, summary["trained_parameters"] + crossed
    for name, (by_seed, parameters) in ranked.items():
      found[name] = _system(list(by_seed.values()), split, measure) | {"parameters": parameters}
      seeds = [seed for seed in by_seed if seed in reference]
      if seeds and query_ids(by_seed[seeds[0]][0], split) == query_ids(reference[seeds[0]][0], split):
        pair = ([of[seed] for seed in seeds] for of in (by_seed, reference))
        found[name]["difference"] = paired(*(_mean(each, split, measure) for each in pair)) | {"seeds": len(seeds)}
      if name == arms[0]:
        reference = by_seed
  return found


def query_ids(layout: Layout, split: str) -> list[str]:
  """The ids of the queries that a run has in a split."""
  ids = PreparedData(layout.prepared).splits[split].ids
  return list(ids.ids(range(len(ids))))


def paired(values: np.ndarray, reference: np.ndarray) -> dict[str, float | tuple[float, float]]:
  """How far a system is above another, from a measure of each query, float [J] both.

  Returns:
    'mean' of the differences, 'interval' (95 %, bootstrap over queries), 'p' of a randomisation test over queries.
  """
  return {
    "mean": float(np.mean(values - reference)),
    "interval": measures.bootstrap_interval(values - reference),
    "p": measures.randomisation_test(values, reference),
  }


def _system(runs: Sequence[tuple[Layout, str]], split: str, measure: str) -> dict:
  by_seed = [files.read_json(layout.part(system, split))["means"] for layout, system in runs]
  means = {name: float(np.mean([each[name] for each in by_seed])) for name in by_seed[0]}
  spread = [each[measure] for each in by_seed]
  return {
    "seeds": len(runs),
    "means": means,
    "interval": measures.bootstrap_interval(_mean(runs, split, measure)),
    "spread": [min(spread), max(spread)],
  }


def _mean(runs: Sequence[tuple[Layout, str]], split: str, measure: str) -> np.ndarray:
  """The measure of every query, float [J], averaged over seeds."""
  return np.mean([np.load(layout.per_query(system, split))[measure] for layout, system in runs], axis=0)


def _table(arms: dict[str, dict], measure: str) -> str:
  """Markdown."""
  names = [measure, *(name for name in next(iter(arms.values()))["means"] if name != measure)]
  head = f"| | parameters | seeds | {names[0]} [95 %] | {' | '.join(names[1:])} | over seeds | difference [95 %] | p |"
  lines = [head, "|---" * (len(names) + 6) + "|"]
  for arm, about in arms.items():
    low, high = about["interval"]
    others = " | ".join(f"{about['means'][name]:.4f}" for name in names[1:])
    spread = f"{about['spread'][0]:.4f} to {about['spread'][1]:.4f}" if about["seeds"] > 1 else ""
    test = shown(about["difference"]) if "difference" in about else " | "
    lines.append(
      f"| {arm} | {about['parameters']:,} | {about['seeds']} | {about['means'][measure]:.4f} [{low:.3f}, {high:.3f}] "
      f"| {others} | {spread} | {test} |"
    )
  return "\n".join(lines)


def shown(difference: Mapping) -> str:
  """What `paired` gives, as two cells of a table: the difference with its interval, and p."""
  low, high = difference["interval"]
  return f"{difference['mean']:+.4f} [{low:+.4f}, {high:+.4f}] | {difference['p']:.4f}"


def _caption(first: str, there: bool) -> str:
  differences = (
    f"Differences and p (randomisation test over queries, two-sided, not corrected for several tests) are against "
    f"{first}, query by query, over the seeds that both have; an arm with other queries has none."
  )
  missing = f"No differences: the first arm, {first}, is missing; `python -m dptdr_jax.compare` has any other pair's."
  return (
    f"{differences if there else missing} Intervals and p are over queries: what another seed would give is in none of "
    f"them, and of two runs that differ in their seeds alone p is below .05 in more than one case of twenty. "
    f"Parameters are those that are trained for the task: pretraining's, of the backbone that tasks share, do not "
    f"count."
  )


def _plot(arms: dict[str, dict], measure: str) -> str:
  """Quality against trained parameters, with intervals; systems that train none are lines."""
  figure, ((axis,),) = drawing.panels(1, 1, (7, 4))
  for arm, about in arms.items():
    mean, (low, high) = about["means"][measure], about["interval"]
    if not about["parameters"]:
      axis.axhline(mean, linestyle=":", color="grey")
      axis.annotate(arm, (0.01, mean), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
      continue
    axis.errorbar(about["parameters"], mean, yerr=[[mean - low], [high - mean]], marker="o", capsize=3)
    axis.annotate(arm, (about["parameters"], mean), xytext=(5, 4), textcoords="offset points", fontsize=8)
  axis.set_xscale("log")
  axis.set_xlabel("trained parameters")
  axis.set_ylabel(measure)
  axis.grid(alpha=0.3)
  return drawing.svg(figure)
