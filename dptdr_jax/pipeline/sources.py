"""The sources of candidates of a pool: BM25, the retriever of its round, run files."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

from dptdr_jax.pipeline.mine import Window
from dptdr_jax.pipeline.systems import BM25
from dptdr_jax.settings import Settings

DENSE = "dense"  # the retriever of the pool's own round


@dataclasses.dataclass(frozen=True)
class SourceName:
  """A source and what is taken of it."""

  name: str
  kind: Literal["bm25", "dense", "file"]
  window: Window
  path: str = ""


def sources_of(settings: Settings, number: int) -> list[SourceName]:
  """The sources of the pool that the retriever of round `number` mines, in the order of their bits; 0: there is none
  yet, and mine.sources is not asked."""
  mine, listed = settings.mine, []
  if mine.bm25.depth and (not number or BM25 in mine.sources):
    listed.append(SourceName(BM25, "bm25", _window(mine.bm25)))
  if number and mine.dense.depth and DENSE in mine.sources:
    listed.append(SourceName(DENSE, "dense", _window(mine.dense)))
  if mine.runs_depth and (not number or "runs" in mine.sources):
    window = Window(first=mine.runs_first, depth=mine.runs_depth, margin=mine.runs_relative_margin)
    listed += [SourceName(pathlib.Path(path).name, "file", window, path) for path in mine.runs]
  return listed


def mines_with_retriever(settings: Settings) -> bool:
  """Whether there are pools besides the one before round 1."""
  return settings.rounds > 1 or (settings.rounds > 0 and settings.train.refresh_every > 0)


def scored(settings: Settings) -> list[str]:
  """All sources whose scores a pool may have."""
  return [BM25, DENSE, *(pathlib.Path(path).name for path in settings.mine.runs)]


def _window(options) -> Window:
  return Window(first=options.first, depth=options.depth, margin=options.relative_margin)
