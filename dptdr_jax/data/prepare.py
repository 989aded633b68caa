"""From a source to prepared data on disk: text, ids, judgements and negatives by row, everything checked.

  DIR/corpus/         prepared_text/ (TFDS), ids/, part.json
  DIR/splits/SPLIT/   prepared_text/ (TFDS), ids/, judgements/, shared/, negatives/, part.json

Each part is whole or absent; a part that is there for the same files is not made again.
"""

from __future__ import annotations

import hashlib
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from dptdr_jax.core import files, preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.data import ragged
from dptdr_jax.data.ids import DuplicateId, IdTable, IdTableWriter
from dptdr_jax.data.sources import Source

CORPUS = "corpus"
_CHUNK = 1 << 16
T = TypeVar("T")


class PreparedSplit:
  """The queries of one split, by row.

  Attributes:
    ids: IdTable, row ↔ id.
    queries: sequence of Query with random access; `queries.read(start)` streams.
    judgements: RowLists of judged passage rows, their grades as values.
    shared: RowLists of what is relevant to another query of the same text and not judged for this one; None in a
      directory that was prepared before there were any.
    negatives: RowLists of the negatives that came with the data.
  """

  def __init__(self, directory: pathlib.Path, split: str):
    from dptdr_jax.data.builders import TextRows  # brings TFDS, half a second that loader workers need not spend

    self.split = split
    self.ids = IdTable(directory / "ids")
    self.queries = TextRows(directory, split)
    self.judgements = ragged.RowLists(directory / "judgements")
    self.shared = ragged.RowLists(directory / "shared") if (directory / "shared").is_dir() else None
    self.negatives = ragged.RowLists(directory / "negatives")

  def __len__(self) -> int:
    return len(self.ids)

  def positives(self, query_row: int) -> np.ndarray:
    """Returns int64 [n]: passage rows judged relevant (grade above 0), in the source's order."""
    return self.judgements.rows(query_row)[self.judgements.values(query_row) > 0]

  def relevant(self, query_row: int) -> np.ndarray:
    """Returns int64 [n]: its positives, then those of queries with the same text: what training takes for right."""
    positives = self.positives(query_row)
    return positives if self.shared is None else np.concatenate([positives, self.shared.rows(query_row)])


class PreparedData:
  """Reads what `prepare_source` wrote.

  Attributes:
    ids: IdTable of the corpus, row ↔ id.
    passages: sequence of Passage with random access; `passages.take(rows)` reads many, `passages.read(start)` streams.
    splits: {name: PreparedSplit}.
  """

  def __init__(self, directory: str | pathlib.Path):
    from dptdr_jax.data.builders import TextRows

    directory = pathlib.Path(directory)
    self.directory = directory
    self.ids = IdTable(directory / CORPUS / "ids")
    self.passages = TextRows(directory / CORPUS, CORPUS)
    names = files.read_json(directory / "prepared.json")["splits"]
    self.splits = {name: PreparedSplit(directory / "splits" / name, name) for name in names}


def prepare_source(
  source: Source,
  directory: str | pathlib.Path,
  *,
  splits: Iterable[str] | None = None,
  training_split: str | None = "train",
) -> PreparedData:
  """Checks a source and writes it by parts; goes on with the first part that is missing.

  Args:
    source: where everything comes from.
    directory: gets the parts.
    splits: those to prepare; all of the source's by default.
    training_split: must have queries with a positive; None where nothing will be trained.

  Raises:
    InputError: a duplicate id, an unknown id in judgements or negatives, two grades for one pair, an empty corpus or
      split, no training query left; and whatever the source complains about.
  """
  directory = pathlib.Path(directory)
  known = source.splits()
  names = tuple(splits) if splits is not None else known
  for name in (*names, *([training_split] if training_split else [])):
    if name not in known or name not in names:
      raise InputError("no such split among those to prepare", value=name, fix=f"There are {', '.join(known)}")
  stamp = _stamp(source, None)
  if not _finished(directory / CORPUS, stamp):
    _write_corpus(source, directory / CORPUS, stamp)
  corpus = files.read_json(directory / CORPUS / "part.json")
  passages = IdTable(directory / CORPUS / "ids")
  for name in names:
    stamp = {**_stamp(source, name), "corpus_ids": corpus["ids_sha256"]}
    if not _finished(directory / "splits" / name, stamp):
      _write_split(source, name, directory / "splits" / name, stamp, passages, name == training_split)
  parts = {name: files.read_json(directory / "splits" / name / "part.json") for name in names}
  counts = {name: {key: part[key] for key in ("queries", "trainable", "skipped")} for name, part in parts.items()}
  files.write_json(directory / "prepared.json", {"passages": corpus["passages"], "splits": counts})
  return PreparedData(directory)


def _write_corpus(source: Source, target: pathlib.Path, stamp: dict[str, Any]) -> None:
  with files.atomic_directory(target) as partial:
    ids = _write_text(source, CORPUS, partial)
    if not len(ids):
      raise InputError("empty corpus", path=_first_file(source, None))
    digest = hashlib.sha256((partial / "ids" / "bytes.npy").read_bytes())
    digest.update((partial / "ids" / "offsets.npy").read_bytes())
    part = {"stamp": stamp, "passages": len(ids), "ids_sha256": digest.hexdigest()}
    files.write_json(partial / "part.json", part)


def _write_split(
  source: Source, split: str, target: pathlib.Path, stamp: dict[str, Any], passages: IdTable, training: bool
) -> None:
  from dptdr_jax.data.builders import TextRows

  with files.atomic_directory(target) as partial:
    queries = _write_text(source, split, partial)
    if not len(queries):
      what = "no training query left" if training else f"no query in split {split}"
      raise InputError(what, path=_first_file(source, split), fix="A query counts when the split's qrels name it")
    judgements = _write_judgements(source, split, partial / "judgements", queries, passages)
    _write_shared((query.text for query in TextRows(partial, split).read()), judgements, partial / "shared")
    _write_negatives(source, split, partial / "negatives", queries, passages)
    trainable = int(sum(bool((judgements.values(row) > 0).any()) for row in range(len(queries))))
    if training and not trainable:
      raise InputError("no training query left: none has a positive", path=_first_file(source, split))
    skipped = getattr(source, "skipped", {}).get(split, 0)
    part = {"stamp": stamp, "queries": len(queries), "trainable": trainable, "skipped": skipped}
    files.write_json(partial / "part.json", part)


def _write_text(source: Source, part: str, directory: pathlib.Path) -> IdTable:
  from dptdr_jax.data.builders import write_text

  ids = IdTableWriter()
  write_text(source, part, directory, ids.append)
  try:
    return ids.write(directory / "ids")
  except DuplicateId as error:
    kind, split = ("passages", None) if part == CORPUS else ("queries", part)
    path, line = _place(source, kind, error.row, split)
    raise InputError("duplicate id", path=path, line=line, value=error.value) from error


def _write_judgements(
  source: Source, split: str, directory: pathlib.Path, queries: IdTable, passages: IdTable
) -> ragged.RowLists:
  query_rows, passage_rows, grades = [_empty()], [_empty()], [_empty()]
  for start, chunk in _chunks(source.judgements(split)):
    query_ids, passage_ids, values = zip(*chunk, strict=True)
    query_rows.append(
      _known(queries, query_ids, "query", source, "judgements", split, range(start, start + len(chunk)))
    )
    passage_rows.append(
      _known(passages, passage_ids, "passage", source, "judgements", split, range(start, start + len(chunk)))
    )
    grades.append(np.array(values, np.int64))
  rows, columns, values = (np.concatenate(part) for part in (query_rows, passage_rows, grades))
  order = np.lexsort((columns, rows))
  twins = np.flatnonzero((np.diff(rows[order]) == 0) & (np.diff(columns[order]) == 0))
  again = order[twins + 1]
  differing = again[values[again] != values[order[twins]]]
  if len(differing):
    path, line = _place(source, "judgements", int(differing.min()), split)
    pair = (queries[rows[differing.min()]], passages[columns[differing.min()]])
    raise InputError("one pair is judged twice, with different grades", path=path, line=line, value=pair)
  keep = np.ones(len(rows), bool)
  keep[again] = False
  return ragged.write_lists(directory, len(queries), rows[keep], columns[keep], values[keep])


def _write_shared(texts: Iterable[str], judgements: ragged.RowLists, directory: pathlib.Path) -> None:
  """Writes for each query what is relevant to another one of its text (but for case and white space), and not judged
  for itself: a question that was asked twice has right answers that neither may be taught to be wrong."""
  rows, columns, values = judgements.flat()
  digests = [hashlib.blake2b(" ".join(text.split()).casefold().encode(), digest_size=8).digest() for text in texts]
  _, group, sizes = np.unique(np.array(digests, "S8"), return_inverse=True, return_counts=True)
  relevant = (values > 0) & (sizes[group[rows]] > 1)
  pairs = np.unique(np.stack([group[rows[relevant]], columns[relevant]], axis=1), axis=0)
  starts, ends = (np.searchsorted(pairs[:, 0], group, side) for side in ("left", "right"))
  queries = np.repeat(np.arange(len(group)), ends - starts)
  passages = ragged.gather(pairs[:, 1], starts, ends - starts)
  width = int(max(columns.max(initial=0), passages.max(initial=0))) + 1
  new = ~np.isin(queries * width + passages, rows * width + columns)
  ragged.write_lists(directory, len(group), queries[new], passages[new])


def _write_negatives(
  source: Source, split: str, directory: pathlib.Path, queries: IdTable, passages: IdTable
) -> ragged.RowLists:
  query_rows, passage_rows = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
  for start, chunk in _chunks(source.negatives(split)):
    counts = [len(entry.passage_ids) for entry in chunk]
    flat = [passage_id for entry in chunk for passage_id in entry.passage_ids]
    origin = np.repeat(np.arange(start, start + len(chunk)), counts)
    indices = range(start, start + len(chunk))
    rows = _known(queries, [entry.query_id for entry in chunk], "query", source, "negatives", split, indices)
    query_rows.append(np.repeat(rows, counts).astype(np.int32))
    passage_rows.append(_known(passages, flat, "passage", source, "negatives", split, origin).astype(np.int32))
  return ragged.write_lists(directory, len(queries), np.concatenate(query_rows), np.concatenate(passage_rows))


def _known(
  table: IdTable, ids: Sequence[str], what: str, source: Source, kind: str, split: str, indices: Sequence[int]
) -> np.ndarray:
  """Returns the rows of `ids`; an unknown one is an InputError that names the line of record `indices[i]`."""
  rows = table.rows(ids)
  unknown = np.flatnonzero(rows < 0)
  if len(unknown):
    path, line = _place(source, kind, int(indices[int(unknown[0])]), split)
    fix = "It is among one query's that begin on this line" if (what, kind) == ("passage", "negatives") else None
    raise InputError(f"unknown {what} id in {kind}", path=path, line=line, value=ids[unknown[0]], fix=fix)
  return rows


def _place(source: Source, kind: str, index: int, split: str | None) -> tuple[pathlib.Path | None, int | None]:
  locate = getattr(source, "locate", None)
  return locate(kind, index, split) if locate else (_first_file(source, split), None)


def _first_file(source: Source, split: str | None) -> pathlib.Path | None:
  return next(iter(source.files(split)[-1:]), None)


def _stamp(source: Source, split: str | None) -> dict[str, Any]:
  """What a part was made from: cheap to take, and another after any change that matters."""
  listed = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in source.files(split)]
  return {"source": type(source).__name__, "files": listed}


def _finished(part: pathlib.Path, stamp: dict[str, Any]) -> bool:
  return (part / "part.json").is_file() and files.read_json(part / "part.json")["stamp"] == stamp


def _chunks(records: Iterator[T]) -> Iterator[tuple[int, list[T]]]:
  start = 0
  while chunk := list(itertools.islice(records, _CHUNK)):
    yield start, chunk
    start += len(chunk)
    preemption.check("judgements and negatives will be read again")


def _empty() -> np.ndarray:
  return np.empty(0, np.int64)
