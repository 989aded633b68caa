"""Tables as text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

MISSING = "–"


class System(NamedTuple):
  """A row: what people read for a system, and {measure: mean}, {measure: (low, high)}; it may lack a measure."""

  label: str
  means: Mapping[str, float]
  intervals: Mapping[str, Sequence[float]]


class Split(NamedTuple):
  """The results of one split: its name with its sizes, its columns {measure: the highest mean}, its rows."""

  title: str
  best: dict[str, float]
  systems: list[System]


def by_split(results: Mapping, summary: Mapping) -> list[Split]:
  """Turns results.json, {system: {split: {measure: mean}}}, into one table a split.

  Args:
    results: as in the file.
    summary: "passages", "queries" {split: count}, "labels" {system: what people read}, "intervals" like `results`.
  """
  splits = []
  for name in dict.fromkeys(split for system in results.values() for split in system):
    systems = [
      System(summary["labels"].get(system, system), means[name], summary["intervals"][system][name])
      for system, means in results.items()
      if name in means
    ]
    best: dict[str, float] = {}
    for system in systems:
      best |= {measure: max(mean, best.get(measure, mean)) for measure, mean in system.means.items()}
    title = f"{name} ({summary['queries'][name]:,} queries, {summary['passages']:,} passages)"
    splits.append(Split(title, best, systems))
  return splits


def trained(summary: Mapping) -> list[str]:
  """One line about the trained parameters; none if nothing was trained."""
  count, whole = summary.get("trained_parameters"), summary["backbone_parameters"]
  return [f"trained: {count:,} parameters, {count / whole:.2%} of the backbone's {whole:,}"] if count else []


def recommended(summary: Mapping) -> list[str]:
  """Lines about the recommended system and how far it is above each baseline; none if nothing is recommended."""
  if (about := summary.get("recommended")) is None:
    return []
  labels = summary["labels"]
  lines = [f"recommended, by {about['chosen_by']}: {labels[about['system']]}"]
  for split, baselines in about["differences"].items():
    for name, measures in baselines.items():
      measure = next(iter(measures))
      lines.append(f"  {split}, {measure}, against {labels[name]}: {difference(measures[measure])[0]}")
  return lines


def results(
  results: Mapping | None, summary: Mapping | None, seconds: Mapping[str, float], ended: Sequence[str]
) -> str:
  """The text that a run ends with.

  Args:
    results: results.json; None or {} for a run without queries.
    summary: as for `by_split`, with "trained_parameters" and "backbone_parameters".
    seconds: the time of each stage.
    ended: last lines: where the report is, say.
  """
  lines = []
  for split in by_split(results, summary) if results else []:
    first = max(35, *(len(system.label) + 2 for system in split.systems))
    widths = {name: max(11, len(name) + 2) for name in split.best}
    lines += [split.title, f"  {'':<{first}}" + "".join(f"{name:>{width}}" for name, width in widths.items())]
    for label, means, _ in split.systems:
      cells = (f"{means[name]:.4f}" if name in means else MISSING for name in widths)
      row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths.values(), strict=True))
      lines.append(f"  {label:<{first}}{row}")
  lines += [*trained(summary), *recommended(summary)] if results else []
  return "\n".join([*lines, "time: " + " · ".join(f"{name} {value:,.0f} s" for name, value in seconds.items()), *ended])


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A Markdown table; its first column is aligned left, the others right."""
  lines = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
  head_line, *others = (f"| {' | '.join(line)} |" for line in lines)
  return "\n".join([head_line, "|---|" + "---:|" * (len(head) - 1), *others])


def difference(about: Mapping[str, Any] | None) -> tuple[str, str]:
  """Two cells: a mean difference with its interval, and p (see `comparison.difference`); empty if there is none."""
  if about is None:
    return "", ""
  low, high = about["interval"]
  return f"{about['mean']:+.4f} [{low:+.4f}, {high:+.4f}]", f"{about['p']:.4f}"


def paired(title: str, rows: Iterable[tuple[str, str, float, float, Mapping[str, Any]]]) -> str:
  """A Markdown table of systems against a reference system.

  Args:
    title: of the first column, for instance "dev, against runs/plain".
    rows: (system, measure, mean of the reference, mean of the system, `comparison.difference` of the two).
  """
  head = (title, "measure", "reference", "system", "difference [95 %]", "p")
  cells = (
    (system, measure, f"{there:.4f}", f"{here:.4f}", *difference(about)) for system, measure, there, here, about in rows
  )
  return markdown(head, cells)
