"""Figures as text of a page."""

from __future__ import annotations

import io

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("Agg")  # a server has no display


def svg(figure: plt.Figure) -> str:
  """Draws and closes a figure; the same figure gives the same bytes."""
  figure.tight_layout()
  drawn = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": "dptdr"}):  # a fixed salt and no date
    figure.savefig(drawn, format="svg", metadata={"Date": None})
  plt.close(figure)
  return drawn.getvalue()[drawn.getvalue().index("<svg") :]
