"""The sources of candidates of a pool: BM25, retrievers, run files."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Literal

from dptdr_jax.pipeline.mine import Window
from dptdr_jax.pipeline.systems import BM25, System
from dptdr_jax.settings import Settings

DENSE = "dense"  # the retriever of the pool's own round
_RETRIEVER = re.compile(r"backbone|pretrain|train[1-9]\d*")


@dataclasses.dataclass(frozen=True)
class SourceName:
  """A source and what is taken of it."""

  name: str
  kind: Literal["bm25", "dense", "file"]
  window: Window
  path: str = ""

  @property
  def depth(self) -> int:
    """Ranks that are searched."""
    return self.window.depth

  def system(self, number: int, pooling: str) -> System:
    """A dense source as a system, of the pool of round `number`."""
    if self.name in ("backbone", "pretrain"):
      return System(self.name, "", "untuned", pooling=pooling, pretrained=self.name == "pretrain")
    return System(self.name, "", "trained", number=number if self.name == DENSE else _round(self.name))


def sources_of(settings: Settings, number: int) -> list[SourceName]:
  """The sources of the pool that the retriever of round `number` mines, in the order of their bits; 0: there is none
  yet, and mine.sources is not asked."""
  mine, listed = settings.mine, []
  if mine.bm25.depth and (not number or BM25 in mine.sources):
    listed.append(SourceName(BM25, "bm25", _window(mine.bm25)))
  if number and mine.dense.depth and DENSE in mine.sources:
    listed.append(SourceName(DENSE, "dense", _window(mine.dense)))
    # What a further retriever says of a positive is no measure: no margin.
    further = Window(first=mine.dense.first, depth=mine.dense.depth, margin=0.0)
    listed += [SourceName(name, "dense", further) for name in mine.retrievers if _round(name) < number]
  if mine.runs_depth and (not number or "runs" in mine.sources):
    window = Window(first=mine.runs_first, depth=mine.runs_depth, margin=mine.runs_relative_margin)
    listed += [SourceName(pathlib.Path(path).name, "file", window, path) for path in mine.runs]
  return listed


def mines_with_retriever(settings: Settings) -> bool:
  """Whether there are pools besides the one before round 1."""
  return settings.rounds > 1 or (settings.rounds > 0 and settings.train.refresh_every > 0)


def known_retrievers(settings: Settings) -> list[str]:
  """What mine.retrievers may name: what some pool has beside the retriever of its round."""
  if not (mines_with_retriever(settings) and settings.mine.dense.depth and DENSE in settings.mine.sources):
    return []
  last = settings.rounds if settings.train.refresh_every else settings.rounds - 1
  before = ["backbone", *(["pretrain"] if settings.pretrain.enabled else [])]
  return [*before, *(f"train{number}" for number in range(1, last))]


def is_retriever(name: str) -> bool:
  """Whether mine.retrievers may ever hold this name."""
  return bool(_RETRIEVER.fullmatch(name))


def scored(settings: Settings) -> list[str]:
  """All sources whose scores a pool may have."""
  return [BM25, DENSE, *settings.mine.retrievers, *(pathlib.Path(path).name for path in settings.mine.runs)]


def _window(options) -> Window:
  return Window(first=options.first, depth=options.depth, margin=options.relative_margin)


def _round(name: str) -> int:
  """The round that trains a retriever; 0 for an untuned one."""
  return int(name.removeprefix("train")) if name.startswith("train") else 0
