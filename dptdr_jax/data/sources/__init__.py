"""Formats that corpora and queries come in. Each source streams; none holds a corpus in memory."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from dptdr_jax.data.records import Judgement, Negatives, Passage, Query


@runtime_checkable
class Source(Protocol):
  """A corpus with queries in splits.

  Every method reads its files anew, in their order, so that two passes agree. Bad input is an
  `core.errors.InputError` that names file, line and value, raised when the iterator comes to it.
  """

  def passages(self) -> Iterator[Passage]:
    """Yields the corpus in file order; a passage's row is its place in this order."""
    ...

  def splits(self) -> tuple[str, ...]:
    """Names of the splits that have queries here, such as ('train', 'dev')."""
    ...

  def queries(self, split: str) -> Iterator[Query]:
    """Yields the queries of a split in file order; a query's row is its place in this order."""
    ...

  def judgements(self, split: str) -> Iterator[Judgement]:
    """Yields a split's judgements; nothing for a split that is measured by answers."""
    ...

  def negatives(self, split: str) -> Iterator[Negatives]:
    """Yields hard negatives that come with the data; nothing where there are none."""
    ...

  def files(self, split: str | None = None) -> list[pathlib.Path]:
    """Files that the corpus (None) or a split is read from: what a stage's manifest hashes."""
    ...
