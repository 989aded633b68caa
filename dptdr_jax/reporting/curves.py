"""Figures as SVG text for a page: training curves, histograms, quality against parameters.

Text and axes take the colour of the page's text, lines have colours that are visible on light and on dark.
matplotlib is imported when something is drawn: most processes draw nothing, and its import takes as long as jax's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from matplotlib.axes import Axes

TITLES = {
  "loss": "Loss",
  "accuracy": "Accuracy within the batch",
  "gradient_norm": "Gradient norm",
  "learning_rate": "Learning rate",
  "contrastive_loss": "Contrastive loss",
  "mlm_loss": "Masked language model: loss",
  "mlm_accuracy": "Masked language model: accuracy",
  "alignment": "Alignment (lower is better)",
  "uniformity": "Uniformity (lower is better)",
  "tokens_per_second": "Tokens per second",
}
_BLUE, _GREEN, _RED = "#3b82f6", "#2da44e", "#e5534b"
_TEXT = "#010203"  # stands for the page's text colour until the figure is text
_STYLE = {
  "svg.hashsalt": "dptdr",  # same figure, same bytes
  "svg.fonttype": "none",
  "font.family": "sans-serif",
  "font.size": 8,
  "text.parse_math": False,  # names may have a $
  "savefig.transparent": True,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.alpha": 0.15,
  "legend.frameon": False,
  "lines.linewidth": 1.4,
  "lines.markersize": 3.5,
} | dict.fromkeys(
  ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _TEXT
)


def curves(records: Sequence[Mapping]) -> list[tuple[str, str]]:
  """Draws each metric that the records of metrics.jsonl have over the steps; known ones first, then dev/….

  Args:
    records: {"step": int, metric: float or None (not finite), …}.

  Returns:
    (title, SVG) of each.
  """
  names = [name for name in TITLES if any(name in record for record in records)]
  names += sorted({name for record in records for name in record if name.startswith("dev/")})
  return [(TITLES.get(name, name), _curve(records, name)) for name in names]


def _curve(records: Sequence[Mapping], name: str) -> str:
  points = [(record["step"], record[name]) for record in records if name in record]
  values = [math.nan if value is None else value for _, value in points]

  def draw(axis: Axes) -> None:
    marker = "o" if name.startswith("dev/") or len(points) == 1 else None
    axis.plot([step for step, _ in points], values, color=_BLUE, marker=marker)
    axis.set_xlabel("step")

  return _svg(draw)


def histogram(kept: Sequence[int], removed: Sequence[int], edges: Sequence[float]) -> str:
  """Draws two histograms over each other, with a line at 1.

  Args:
    kept, removed: counts of each bin.
    edges: of the bins, one more.
  """

  def draw(axis: Axes) -> None:
    for counts, colour, label in ((kept, _GREEN, "kept"), (removed, _RED, "removed")):
      axis.stairs(counts, edges, fill=True, alpha=0.55, color=colour, label=label)
    axis.axvline(1, color=_TEXT, linewidth=0.8)
    axis.legend()

  return _svg(draw)


def against_parameters(systems: Mapping[str, Mapping], measure: str) -> str:
  """Draws quality against trained parameters, with intervals; systems that train none are horizontal lines.

  Args:
    systems: {label: {"parameters", "means" {measure: mean}, "interval" (low, high) of `measure`}}.
    measure: which one.
  """

  def draw(axis: Axes) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    for label, about in systems.items():
      mean, count = about["means"][measure], about["parameters"]
      if not count:
        axis.axhline(mean, linestyle=":", color=_TEXT, alpha=0.5)
        axis.annotate(label, (0.01, mean), xycoords=("axes fraction", "data"), va="bottom", alpha=0.7)
        continue
      low, high = about["interval"]
      axis.errorbar(count, mean, yerr=[[max(0, mean - low)], [max(0, high - mean)]], marker="o", capsize=3)
      axis.annotate(label, (count, mean), xytext=(6, 4), textcoords="offset points")
    axis.set_xscale("log")
    if counts := [about["parameters"] for about in systems.values() if about["parameters"]]:
      axis.set_xlim(min(counts) / 2, max(counts) * 4)  # wide enough for a tick and for the last label
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel("trained parameters")

  return _svg(draw, (7, 4))


def _svg(draw: Callable[[Axes], None], size: tuple[float, float] = (3.6, 2.2)) -> str:
  """Draws on axes of `size` inches; the same drawing gives the same bytes."""
  import io

  import matplotlib
  from matplotlib.figure import Figure

  stream = io.StringIO()
  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=size)
    width, height = size  # fixed margins in inches: panels of a grid are aligned, and a fitted layout draws twice
    figure.subplots_adjust(left=0.6 / width, right=1 - 0.1 / width, bottom=0.42 / height, top=1 - 0.2 / height)
    draw(figure.subplots())
    figure.savefig(stream, format="svg", metadata={"Date": None})
  text = stream.getvalue()
  text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
  return re.sub(r'<g id="[^"]*"', "<g", text).replace(_TEXT, "currentColor")
