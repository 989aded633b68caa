"""Figures as text of a page.

matplotlib is imported where something is drawn: most processes draw nothing, and it takes as long as jax.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from matplotlib.figure import Figure


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
  """A figure, outside of pyplot's books, with axes [rows, columns] of `size` inches each."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(size[0] * columns, size[1] * rows))
  return figure, figure.subplots(rows, columns, squeeze=False)


def svg(figure: Figure) -> str:
  """Draws a figure; the same figure gives the same bytes."""
  import matplotlib

  figure.tight_layout()
  drawn = io.StringIO()
  with matplotlib.rc_context({"svg.hashsalt": "dptdr"}):  # a fixed salt and no date
    figure.savefig(drawn, format="svg", metadata={"Date": None})
  return drawn.getvalue()[drawn.getvalue().index("<svg") :]
