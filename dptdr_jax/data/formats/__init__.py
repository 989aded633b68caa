"""File formats of corpora and queries. Each reader streams; none holds a corpus in memory."""

from __future__ import annotations

import abc
import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.records import Judgement, Negatives, Passage, Query

Kind = Literal["passages", "queries", "judgements", "negatives"]
Located = tuple[pathlib.Path, int, Passage | Query | Judgement | Negatives]  # file, line, record


class Format(abc.ABC):
  """A corpus with queries in splits, in files of one directory.

  Every method reads its files anew, in their order, so that two passes agree. Bad input is an `InputError` that names
  file, line and value, raised when the iterator reaches it. A reader implements `splits`, `files` and `records`.

  Attributes:
    directory: where the files are.
    skipped: {split: count} of queries that were left out because they have no judgement; filled while reading.
  """

  def __init__(self, directory: str | pathlib.Path):
    self.directory = pathlib.Path(directory)
    self.skipped: dict[str, int] = {}
    if not self.directory.is_dir():
      raise InputError("no such directory", path=self.directory)

  @abc.abstractmethod
  def splits(self) -> tuple[str, ...]:
    """Names of the splits that have queries here, such as ('train', 'dev')."""

  @abc.abstractmethod
  def files(self, split: str | None = None) -> list[pathlib.Path]:
    """Files that the corpus (None) or a split is read from."""

  @abc.abstractmethod
  def records(self, kind: Kind, split: str | None) -> Iterator[Located]:
    """Yields (path, line, record) of one kind; split is None for passages."""

  def passages(self) -> Iterator[Passage]:
    """Yields the corpus in file order; a passage's row is its place in this order."""
    return self._bare("passages", None)

  def queries(self, split: str) -> Iterator[Query]:
    """Yields the queries of a split in file order; a query's row is its place in this order."""
    return self._bare("queries", split)

  def judgements(self, split: str) -> Iterator[Judgement]:
    """Yields a split's judgements in file order; nothing for a split that is measured by answers."""
    return self._bare("judgements", split)

  def negatives(self, split: str) -> Iterator[Negatives]:
    """Yields the hard negatives that come with the data; a query may come more than once."""
    return self._bare("negatives", split)

  def locate(self, kind: Kind, index: int, split: str | None = None) -> tuple[pathlib.Path, int]:
    """Returns (file, line) of the record at `index`, by reading again: for error messages."""
    path, line, _ = next(itertools.islice(self.records(kind, split), index, None))
    return path, line

  def _has(self, *names: str) -> bool:
    """Whether one of these files is here, as it is or gzipped."""
    return any((self.directory / (name + suffix)).is_file() for name in names for suffix in ("", ".gz"))

  def _bare(self, kind: Kind, split: str | None) -> Iterator[Any]:
    for _, _, record in self.records(kind, split):
      yield record


def in_order(splits: Iterable[str], directory: pathlib.Path) -> tuple[str, ...]:
  """Returns the names of splits that a directory has, training first, each once.

  Raises:
    InputError: a name that would lead out of a directory of its own.
  """
  names = set(splits)
  for name in names:
    if name in ("", ".", "..") or any(letter in name for letter in "/\\\0"):
      what = "a split cannot have this name"
      raise InputError(what, path=directory, value=name, fix="Rename or remove its file")
  return tuple(sorted(names, key=lambda name: (name != "train", name)))
