"""The report page: one HTML file that needs nothing else. The same input gives the same bytes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dptdr_jax.reporting import curves as figures
from dptdr_jax.reporting import negatives, tables

if TYPE_CHECKING:
  import jinja2


def render(
  title: str,
  *,
  facts: Sequence[str],
  results: Mapping | None = None,
  summary: Mapping | None = None,
  curves: Sequence[tuple[str, Sequence[Mapping]]] = (),
  pools: Sequence[tuple[str, Mapping]] = (),
  refreshed: Sequence[tuple[str, Mapping[int, Mapping]]] = (),
  examples: Sequence[Mapping] = (),
) -> str:
  """Renders the report of a run.

  Args:
    title: of the run.
    facts: lines about it.
    results: results.json; None for a run without queries.
    summary: as for `tables.results`.
    curves: (title, records of metrics.jsonl) of each training.
    pools: (title, `negatives.summary`) of each pool.
    refreshed: (what trained, for instance "round 1", {step from which a pool was used: its summary}) of pools that were
      mined during training. Of several there is a table, and details of the first and the last.
    examples: of `examples.choose`.
  """
  pools, overviews = list(pools), []
  for name, by_step in refreshed:
    steps = sorted(by_step)
    if len(steps) > 1:
      overviews.append((f"Negatives mined during {name}", negatives.overview(by_step)))
    shown = dict.fromkeys([*steps[:1], *steps[-1:]])
    pools += [(f"Negatives of {name} from step {step:,}", by_step[step]) for step in shown]
  return fill(
    "report.html",
    title=title,
    facts=[*facts, *([*tables.trained(summary), *tables.recommended(summary)] if results else [])],
    splits=tables.by_split(results, summary) if results else [],
    curves=[(name, figures.curves(records)) for name, records in curves],
    pools=[(name, about, negatives.tables(about), _histograms(about)) for name, about in pools],
    overviews=overviews,
    examples=examples,
  )


def _histograms(about: Mapping) -> list[tuple[str, str]]:
  return [
    (f"{name}: score over the positive's score", figures.histogram(**counts, edges=negatives.EDGES))
    for name, counts in about["histograms"].items()
  ]


def fill(template: str, **values: Any) -> str:
  """Fills a template of this package; everything but figures is escaped."""
  return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> jinja2.Environment:
  import jinja2  # a tenth of a second that a run without a new report need not spend

  return jinja2.Environment(
    loader=jinja2.PackageLoader("dptdr_jax.reporting"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
