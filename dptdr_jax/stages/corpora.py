"""The corpora that pretraining reads: this run's own, another run's, plain text and JSONL files."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from dptdr_jax.core.errors import InputError
from dptdr_jax.data import text
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.data.records import Passage
from dptdr_jax.data.sources.plain import PlainText
from dptdr_jax.stages.layout import Layout

OWN = "data"  # the name of this run's own corpus


@dataclasses.dataclass(frozen=True)
class Corpus:
  """One of config.pretrain.corpora.

  Attributes:
    name: as the config names it.
    passages: what holds them: read(start) streams.
    separator: between title and text.
  """

  name: str
  passages: object
  separator: str

  def count(self) -> int:
    """The number of passages; a file is read through once, so that a bad line is met before any work."""
    return self.passages.count() if isinstance(self.passages, PlainText) else len(self.passages)

  def texts(self, start: int = 0) -> Iterator[str]:
    """Titles and texts from passage `start` on; no template: its words would stand in some spans only."""
    passage: Passage
    for passage in self.passages.read(start):
      yield text.passage_text(passage, self.separator)


def open_corpora(config: ConfigDict, layout: Layout) -> list[Corpus]:
  """Opens all of config.pretrain.corpora; `prepare` has written this run's text."""
  opened = []
  for name in config.pretrain.corpora:
    if name == OWN:
      passages = PreparedData(layout.prepared).passages
    elif (directory := _run(name)) is not None:
      passages = PreparedData(directory.prepared).passages
    else:
      passages = PlainText(name)
    opened.append(Corpus(name, passages, config.text.separator))
  return opened


def outside_files(config: ConfigDict) -> list[pathlib.Path]:
  """Files from outside that the corpora depend on.

  Raises:
    InputError: a name that is neither a file nor the directory of a prepared run.
  """
  found = []
  for name in config.pretrain.corpora:
    if name == OWN:
      continue
    directory = _run(name)
    if directory is not None:
      found += [directory.prepared / "prepared.json", directory.prepared / "corpus" / "part.json"]
    elif pathlib.Path(name).is_file():
      found.append(pathlib.Path(name))
    else:
      raise InputError(
        "no such corpus for pretraining", path=name,
        fix=f"Name '{OWN}' (this run's own), a text or JSONL file, or the workdir of a run whose prepare is done",
      )  # fmt: skip
  return found


def _run(name: str) -> Layout | None:
  layout = Layout.of(name)
  return layout if (layout.prepared / "prepared.json").is_file() else None
