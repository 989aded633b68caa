"""Arms of an ablation beside each other: means over seeds, intervals, paired tests, quality against parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dptdr_jax.reporting import curves, page, tables
from dptdr_jax.retrieval import measures


@dataclasses.dataclass(frozen=True)
class Arm:
  """What the runs of an arm measured on one split.

  Attributes:
    values: {seed: {measure: float [Q]}}, of each query.
    parameters: that were trained for the task.
    queries: ids of the Q queries.
  """

  values: Mapping[int, Mapping[str, np.ndarray]]
  parameters: int
  queries: Sequence[str]


def compare(
  baselines: Mapping[str, Mapping[str, np.ndarray]], arms: Mapping[str, Arm], measure: str, reference: str
) -> dict[str, dict[str, Any]]:
  """Compares arms on one split.

  An arm's value of a query is its mean over the arm's seeds. Intervals and tests are over queries and say nothing about
  other seeds; the spread over seeds stands beside them.

  Args:
    baselines: {label: {measure: float [Q]}}, of systems that train nothing.
    arms: by name.
    measure: what intervals and tests are about.
    reference: the arm that others are compared with; there are no differences if it is missing.

  Returns:
    By label "seeds", "parameters", "means" of all measures, "interval" and "spread" of `measure`, and for arms that
    have the reference's queries and a seed in common with it "difference" (see `difference`) over the common seeds.
  """
  systems = {label: _system([values], measure, 0) for label, values in baselines.items()}
  first = arms.get(reference)
  for name, arm in arms.items():
    systems[name] = _system(list(arm.values.values()), measure, arm.parameters)
    if first is None or name == reference or list(arm.queries) != list(first.queries):
      continue
    if seeds := [seed for seed in arm.values if seed in first.values]:
      here, there = (_over_seeds((each.values[seed] for seed in seeds), measure) for each in (arm, first))
      systems[name]["difference"] = difference(here, there) | {"seeds": len(seeds)}
  return systems


def difference(values: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
  """How far a system is above another.

  Args:
    values, reference: float [Q], the same measure of the same queries.

  Returns:
    "mean" of the differences, "interval" (95 %, bootstrap over queries), "p" of a randomisation test over queries.
  """
  return {
    "mean": float(np.mean(values - reference)),
    "interval": measures.bootstrap_interval(values - reference),
    "p": measures.randomisation_test(values, reference),
  }


def _over_seeds(runs: Iterable[Mapping[str, np.ndarray]], measure: str) -> np.ndarray:
  return np.mean([values[measure] for values in runs], axis=0)


def _system(runs: Sequence[Mapping[str, np.ndarray]], measure: str, parameters: int) -> dict[str, Any]:
  by_seed = [{name: float(values.mean()) for name, values in run.items()} for run in runs]
  spread = [means[measure] for means in by_seed]
  return {
    "seeds": len(runs),
    "means": {name: float(np.mean([means[name] for means in by_seed])) for name in by_seed[0]},
    "interval": measures.bootstrap_interval(_over_seeds(runs, measure)),
    "spread": [min(spread), max(spread)],
    "parameters": parameters,
  }


def markdown(compared: Mapping[str, Mapping], named: Mapping[str, str], reference: str) -> str:
  """Markdown tables of what `compare` gave.

  Args:
    compared: by split.
    named: by split, the measure that it was called with.
    reference: as there.
  """
  parts = []
  for split, systems in compared.items():
    parts += [f"## {split}", tables.markdown(*_table(systems, named[split]))]
  return "\n\n".join([*parts, _caption(compared, reference)]) + "\n"


def html(compared: Mapping[str, Mapping], named: Mapping[str, str], reference: str) -> str:
  """A page of what `compare` gave; arguments as of `markdown`."""
  splits = [
    (split, named[split], curves.against_parameters(systems, named[split]), _table(systems, named[split]))
    for split, systems in compared.items()
  ]
  return page.fill("ablation.html", title="Ablation", splits=splits, caption=_caption(compared, reference))


def _table(systems: Mapping[str, Mapping], measure: str) -> tuple[list[str], list[list[str]]]:
  others = [name for name in next(iter(systems.values()))["means"] if name != measure]
  head = ["", "parameters", "seeds", f"{measure} [95 %]", *others, "over seeds", "difference [95 %]", "p"]
  rows = []
  for label, about in systems.items():
    (low, high), means = about["interval"], about["means"]
    rows.append(
      [
        label,
        f"{about['parameters']:,}",
        str(about["seeds"]),
        f"{means[measure]:.4f} [{low:.3f}, {high:.3f}]",
        *(f"{means[name]:.4f}" for name in others),
        "{:.4f} to {:.4f}".format(*about["spread"]) if about["seeds"] > 1 else "",
        *tables.difference(about.get("difference")),
      ]
    )
  return head, rows


def _caption(compared: Mapping[str, Mapping], reference: str) -> str:
  if any(reference in systems for systems in compared.values()):
    differences = (
      f"Differences are against {reference}, query by query, over the seeds that both arms have; an arm with other "
      f"queries has none. p is of a two-sided randomisation test over queries, not corrected for multiple tests."
    )
  else:
    differences = (
      f"No differences: the first arm, {reference}, has no finished run; `python -m dptdr_jax.compare` takes any two."
    )
  return (
    f"{differences} Intervals and p do not cover the choice of the seed: two runs that differ in their seed alone have "
    f"p < .05 in more than one case of twenty. Parameters are those trained for the task; a pretrained backbone, which "
    f"tasks share, does not count."
  )
