"""Checked data on disk: text, ids, judgements and negatives by row.

  a corpus   text/ (ArrayRecord), ids/, counts.json {"passages"}
  a split    text/, ids/, judgements/, shared/, negatives/, counts.json {"queries", "trainable", "skipped"}

The writers begin anew and replace what a killed attempt left. array_records is imported in functions: it takes two
seconds, which a run that has nothing to do need not spend.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from dptdr_jax.core import files, preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.data import ragged
from dptdr_jax.data.formats import Format
from dptdr_jax.data.ids import DuplicateId, IdTable, IdTableWriter
from dptdr_jax.data.records import Passage, Query

_CHUNK = 1 << 16
T = TypeVar("T")
Locate = Callable[[int], tuple[pathlib.Path, int]]  # index of a record → file, line


class Corpus:
  """What `write_corpus` wrote; `len(corpus)` passages.

  Attributes:
    ids: IdTable, row ↔ id.
    passages: TextRows of Passage: random access; `.take(rows)` reads many, `.read(start)` streams.

  Raises:
    InputError: a file is missing, cut or damaged, here or when a passage is read.
  """

  def __init__(self, directory: str | pathlib.Path):
    from dptdr_jax.data.array_records import TextRows

    directory = pathlib.Path(directory)
    self.ids = IdTable(directory / "ids")
    self.passages = TextRows(directory / "text", "corpus", len(self))

  def __len__(self) -> int:
    return len(self.ids)


class Split:
  """What `write_split` wrote; `len(split)` queries.

  Attributes:
    name: of the split.
    ids: IdTable, row ↔ id.
    queries: TextRows of Query, as `Corpus.passages`.
    judgements: RowLists of judged passage rows, their grades as values.
    shared: RowLists of what is relevant to another query of the same text and not judged for this one.
    negatives: RowLists of the negatives that came with the data.
    trainable: int64, the rows of queries with a positive.

  Raises:
    InputError: a file is missing, cut or damaged, here or when a query is read.
  """

  def __init__(self, directory: str | pathlib.Path, name: str):
    from dptdr_jax.data.array_records import TextRows

    directory = pathlib.Path(directory)
    self.name = name
    self.ids = IdTable(directory / "ids")
    self.queries = TextRows(directory / "text", "queries", len(self))
    self.judgements = ragged.RowLists(directory / "judgements", len(self), valued=True)
    self.shared = ragged.RowLists(directory / "shared", len(self))
    self.negatives = ragged.RowLists(directory / "negatives", len(self))
    query_rows, _, grades = self.judgements.triples()
    self.trainable = np.unique(query_rows[grades > 0])

  def __len__(self) -> int:
    return len(self.ids)

  def positives(self, query_row: int) -> np.ndarray:
    """Returns int64 [n]: passage rows judged relevant (grade above 0), in the order of the judgements' file."""
    return self.judgements.rows(query_row)[self.judgements.values(query_row) > 0]

  def relevant(self, query_row: int) -> np.ndarray:
    """Returns int64 [n]: its positives, then those of queries with the same text. Training never uses them as
    negatives."""
    return np.concatenate([self.positives(query_row), self.shared.rows(query_row)])

  def check_trainable(self) -> None:
    """Raises an InputError if no query has a positive."""
    if not len(self.trainable):
      raise InputError("no training query left: none has a positive")


def write_corpus(data: Format, directory: str | pathlib.Path) -> None:
  """Checks and writes a corpus into `directory`, which exists.

  Raises:
    InputError: a duplicate id, no passage, and whatever the format finds.
  """
  directory = pathlib.Path(directory)
  ids = _write_text(data.passages(), directory, "corpus", functools.partial(data.locate, "passages"))
  if not len(ids):
    raise InputError("empty corpus", path=data.files()[-1])
  files.write_json(directory / "counts.json", {"passages": len(ids)})


def write_split(data: Format, split: str, corpus: Corpus, directory: str | pathlib.Path) -> None:
  """Checks and writes the queries of a split into `directory`, which exists.

  Raises:
    InputError: a duplicate id, an unknown id in judgements or negatives, two grades for one pair, no query, and
      whatever the format finds.
  """
  directory = pathlib.Path(directory)
  digests: list[bytes] = []

  def queries() -> Iterator[Query]:
    for query in data.queries(split):
      digests.append(_digest(query.text))
      yield query

  ids = _write_text(queries(), directory, "queries", functools.partial(data.locate, "queries", split=split))
  if not len(ids):
    fix = "A query counts if the split's qrels name it"
    raise InputError(f"no query in split {split}", path=data.files(split)[-1], fix=fix)
  rows, columns, grades = judged = _judgements(data, split, ids, corpus.ids)
  ragged.write_lists(directory / "judgements", len(ids), *judged)
  ragged.write_lists(directory / "shared", len(ids), *_shared(digests, *judged))
  ragged.write_lists(directory / "negatives", len(ids), *_negatives(data, split, ids, corpus.ids))
  trainable, skipped = len(np.unique(rows[grades > 0])), data.skipped.get(split, 0)
  files.write_json(directory / "counts.json", {"queries": len(ids), "trainable": trainable, "skipped": skipped})


def _write_text(
  rows: Iterable[Passage] | Iterable[Query], directory: pathlib.Path, kind: str, locate: Locate
) -> IdTable:
  from dptdr_jax.data.array_records import write_rows

  ids = IdTableWriter()

  def noted() -> Iterator[Passage | Query]:
    for number, row in enumerate(rows):
      if "\0" in row.id:  # which arrays of ids cannot hold
        path, line = locate(number)
        raise InputError("an id with a NUL character", path=path, line=line, value=row.id)
      ids.append(row.id)
      yield row

  write_rows(noted(), directory / "text", kind)
  files.remove(directory / "ids")
  try:
    return ids.write(directory / "ids")
  except DuplicateId as error:
    path, line = locate(error.row)
    raise InputError("duplicate id", path=path, line=line, value=error.value) from error


def _judgements(data: Format, split: str, queries: IdTable, passages: IdTable) -> tuple[np.ndarray, ...]:
  """Query rows, passage rows and grades of a split, int64 each, every pair once."""
  locate = functools.partial(data.locate, "judgements", split=split)
  parts = [(np.empty(0, np.int64),) * 3]
  for start, chunk in _chunks(data.judgements(split)):
    query_ids, passage_ids, grades = zip(*chunk, strict=True)
    places = range(start, start + len(chunk))
    query_rows = _known(queries, query_ids, "query id in judgements", locate, places)
    passage_rows = _known(passages, passage_ids, "passage id in judgements", locate, places)
    parts.append((query_rows, passage_rows, np.array(grades, np.int64)))
  rows, columns, values = map(np.concatenate, zip(*parts, strict=True))
  order = np.lexsort((columns, rows))
  equal = np.flatnonzero((np.diff(rows[order]) == 0) & (np.diff(columns[order]) == 0))
  again = order[equal + 1]
  differing = again[values[again] != values[order[equal]]]
  if len(differing):
    first = int(differing.min())
    path, line = locate(first)
    pair = (queries[rows[first]], passages[columns[first]])
    raise InputError("one pair is judged twice, with different grades", path=path, line=line, value=pair)
  once = np.ones(len(rows), bool)
  once[again] = False
  return rows[once], columns[once], values[once]


def _digest(text: str) -> bytes:
  """Equal for texts that differ only in case and white space."""
  return hashlib.blake2b(" ".join(text.split()).casefold().encode(), digest_size=8).digest()


def _shared(
  digests: list[bytes], rows: np.ndarray, columns: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Query rows and passage rows of what is relevant to another query of the same text and not judged for this one."""
  _, group, sizes = np.unique(np.array(digests, "S8"), return_inverse=True, return_counts=True)
  relevant = (values > 0) & (sizes[group[rows]] > 1)
  pairs = np.unique(np.stack([group[rows[relevant]], columns[relevant]], axis=1), axis=0)
  starts, ends = (np.searchsorted(pairs[:, 0], group, side) for side in ("left", "right"))
  queries = np.repeat(np.arange(len(group)), ends - starts)
  passages = ragged.gather(pairs[:, 1], starts, ends - starts)
  width = int(max(columns.max(initial=0), passages.max(initial=0))) + 1
  new = ~np.isin(queries * width + passages, rows * width + columns)
  return queries[new], passages[new]


def _negatives(data: Format, split: str, queries: IdTable, passages: IdTable) -> tuple[np.ndarray, np.ndarray]:
  """Query rows and passage rows of the negatives that come with a split, int32."""
  locate = functools.partial(data.locate, "negatives", split=split)
  parts = [(np.empty(0, np.int32),) * 2]
  for start, chunk in _chunks(data.negatives(split)):
    counts = [len(entry.passage_ids) for entry in chunk]
    passage_ids = [passage_id for entry in chunk for passage_id in entry.passage_ids]
    places = np.arange(start, start + len(chunk))
    query_rows = _known(queries, [entry.query_id for entry in chunk], "query id in negatives", locate, places)
    fix = "It is among the negatives of one query, which begin on this line"
    rows = _known(passages, passage_ids, "passage id in negatives", locate, np.repeat(places, counts), fix)
    parts.append((np.repeat(query_rows, counts).astype(np.int32), rows.astype(np.int32)))
  return tuple(map(np.concatenate, zip(*parts, strict=True)))


def _known(
  table: IdTable, ids: Sequence[str], what: str, locate: Locate, places: Sequence[int], fix: str | None = None
) -> np.ndarray:
  """Returns the rows of `ids`; an InputError names the line of record `places[i]` if ids[i] is unknown."""
  rows = table.rows(ids)
  unknown = np.flatnonzero(rows < 0)
  if len(unknown):
    first = int(unknown[0])
    path, line = locate(int(places[first]))
    raise InputError(f"unknown {what}", path=path, line=line, value=ids[first], fix=fix)
  return rows


def _chunks(records: Iterator[T]) -> Iterator[tuple[int, list[T]]]:
  start = 0
  while chunk := list(itertools.islice(records, _CHUNK)):
    yield start, chunk
    start += len(chunk)
    preemption.check("judgements and negatives will be read again")
