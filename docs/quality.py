"""Draws docs/quality.svg: RR@10 against the parameters that a task adds; all figures stand in docs/results.md.

python docs/quality.py
"""

from __future__ import annotations

import pathlib

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

# Data set: BM25, untuned backbone, and of each trained system (% of the backbone's parameters, RR@10).
SETS = {
  "quickstart (docstrings)": (0.4978, 0.5250, {"prompts": [(0.33, 0.6132)], "fine-tuning": [(100, 0.6169)]}),
  "squad-wiki": (0.8453, 0.5523, {
    "prompts": [(0.16, 0.6648), (0.65, 0.6654), (2.6, 0.6539)],
    "prompts, RIP and UNM": [(0.65, 0.6770)], "fine-tuning": [(100, 0.6531)],
  }),
  "medquad": (0.5008, 0.5212, {
    "prompts": [(0.65, 0.7706)], "prompts, RIP and UNM": [(0.65, 0.8086)], "fine-tuning": [(100, 0.8357)],
  }),
}  # fmt: skip
STYLES = {
  "prompts": ("o", "#1f6feb"),
  "prompts, RIP and UNM": ("^", "#1a7f37"),
  "fine-tuning": ("s", "#bc4c00"),
}
GREY = "#6e7781"


def draw(path: pathlib.Path) -> None:
  """Writes the picture: a panel for each data set."""
  plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "dptdr", "font.size": 8, "font.family": "sans-serif"}
  figure, panels = plt.subplots(1, len(SETS), figsize=(8.2, 2.7), sharey=True, layout="constrained")
  for panel, (title, (bm25, untuned, systems)) in zip(panels, SETS.items(), strict=True):
    for label, value, style in (("BM25", bm25, ":"), ("untuned backbone", untuned, "--")):
      panel.axhline(value, color=GREY, linestyle=style, linewidth=1, label=label)
    for label, (marker, colour) in STYLES.items():
      if points := systems.get(label):
        panel.plot(*zip(*points, strict=True), marker, color=colour, markersize=6, label=label)
    panel.set(title=title, xscale="log", xlim=(0.1, 200), ylim=(0.45, 0.9), xticks=[0.1, 1, 10, 100])
    panel.set_xticklabels(["0.1", "1", "10", "100"])
    panel.minorticks_off()
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)
  panels[0].set_ylabel("RR@10")
  panels[1].set_xlabel("parameters that a task adds, % of the backbone")
  figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
  figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
  draw(pathlib.Path(__file__).with_name("quality.svg"))
