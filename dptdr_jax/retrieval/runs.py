"""Runs: which passages a search retrieved for each query, in memory by row and in files by id.

Files are TREC's six columns (`qid Q0 pid rank score tag`) or MS MARCO's three (`qid pid rank`, tabs); gzip and a byte
order mark are accepted when reading.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TextIO

import numpy as np

from dptdr_jax.core import progress, shards
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path, atomic_path, open_text
from dptdr_jax.core.team import SOLO, Team

_log = logging.getLogger(__name__)

FILL = -1  # in place of a passage row where a query has fewer than K passages
_LINES = 1 << 16  # of a run file that are looked up at a time
_QUERIES = 256  # whose lines are written together
_LARGEST = float(np.finfo(np.float32).max)
_KIND = "run"

Lookup = Callable[[Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Run:
  """The passages retrieved for Q queries, best first. Arrays on disk are read as they are sliced.

  Attributes:
    rows: int32 [Q, K], passage rows; −1 fills at the end of a query.
    scores: float32 [Q, K], descending, −inf at fills; equal scores are ordered by ascending row.
  """

  rows: np.ndarray | shards.Column
  scores: np.ndarray | shards.Column

  def __post_init__(self):
    if self.rows.ndim != 2 or self.rows.shape != self.scores.shape:
      raise ValueError(f"rows {self.rows.shape} and scores {self.scores.shape} must be equal [Q, K] shapes")

  @classmethod
  def empty(cls, num_queries: int, depth: int) -> Run:
    """A run of fills, to be filled query block by query block."""
    return cls(np.full((num_queries, depth), FILL, np.int32), np.full((num_queries, depth), -np.inf, np.float32))

  @classmethod
  def ranked(cls, rows: np.ndarray, scores: np.ndarray, depth: int | None = None) -> Run:
    """Puts passages into a run's order: score descending, then row ascending, fills last; cut to `depth`.

    Args:
      rows: int [Q, K'], any negative row is a fill.
      scores: float [Q, K'], whatever the value at fills.
      depth: K; default K'.
    """
    absent = rows < 0
    scores = np.where(absent, -np.inf, scores).astype(np.float32)
    rows = np.where(absent, FILL, rows).astype(np.int32)
    order = np.lexsort((np.where(absent, np.iinfo(np.int32).max, rows), -scores))[:, :depth]
    return cls(np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1))

  @classmethod
  def open(cls, directory: Path) -> Run:
    """Opens a run that `save` or `write_run` wrote.

    Raises:
      InputError: there is none, or a file is missing, cut, or of another shape or dtype.
    """
    manifest = shards.read_manifest(directory, kind=_KIND)
    depth = manifest.get("depth")
    if type(depth) is not int or depth < 0:
      raise InputError("depth must be a number from 0", path=pathlib.Path(directory, shards.MANIFEST), value=depth)
    arrays = shards.Shards(directory, manifest["count"], manifest["shard_rows"], _arrays(depth))
    return cls(arrays["rows"], arrays["scores"])

  def save(self, directory: Path) -> None:
    """Writes the run in one shard; another run in this directory is replaced."""
    writer = shards.ShardWriter(directory, len(self), max(1, len(self)), _arrays(self.depth), _about(self.depth))
    writer.begin()
    if len(self):
      writer.write(0, {"rows": self.rows[:], "scores": self.scores[:]})
    writer.finish()

  def __len__(self) -> int:
    """Number of queries Q."""
    return len(self.rows)

  @property
  def depth(self) -> int:
    """K, the most passages a query can have."""
    return self.rows.shape[1]

  def counts(self) -> np.ndarray:
    """Number of passages retrieved for each query, int64 [Q]."""
    return (np.asarray(self.rows) >= 0).sum(1)


def write_run(
  directory: Path, count: int, depth: int, search: Callable[[range], Run], *, size: int, team: Team = SOLO,
  what: str = "search",
) -> Run:  # fmt: skip
  """Searches for Q queries in shards on disk; what an earlier attempt left is kept.

  Args:
    directory: of this run alone.
    count: Q.
    depth: K.
    search: queries → their run of depth K.
    size: queries a shard: the work that a kill may cost, against one reading of the corpus.
    team: the processes that take turns at the shards.
    what: names the search in messages.
  """

  def make(queries: range) -> dict[str, np.ndarray]:
    run = search(queries)
    return {"rows": run.rows, "scores": run.scores}

  shards.share_out(directory, count, size, _arrays(depth), make, about=_about(depth), team=team, what=what, shows=False)
  return Run.open(directory)


def _arrays(depth: int) -> shards.Arrays:
  return {"rows": ("int32", (depth,)), "scores": ("float32", (depth,))}


def _about(depth: int) -> dict[str, object]:
  return {"format": 1, "kind": _KIND, "depth": depth}


def write_trec(path: Path, run: Run, query_ids: Sequence[str], passage_ids: Sequence[str], tag: str) -> None:
  """Writes a TREC run file, atomically; ranks from 1, scores with nine digits, which hold a float32 exactly.

  trec_eval reads scores, not ranks, and breaks ties by passage id: its figures differ from ours where scores tie.
  """
  _write(path, run, query_ids, passage_ids, lambda rank: f"\0 Q0 %s {rank} %.9g {_escaped(tag)}\n", scored=True)


def write_msmarco(path: Path, run: Run, query_ids: Sequence[str], passage_ids: Sequence[str]) -> None:
  """Writes MS MARCO's own format, `qid\\tpid\\trank`, atomically; ranks from 1."""
  _write(path, run, query_ids, passage_ids, lambda rank: f"\0\t%s\t{rank}\n", scored=False)


def read_trec(path: Path, query_rows: Lookup, passage_rows: Lookup, num_queries: int, depth: int | None = None) -> Run:
  """Reads a TREC run file. Its order is that of the scores, ties by row; ranks that contradict it are an error.

  What is kept of a file of any length is `depth` passages a query.

  Args:
    path: the file, plain or gzip.
    query_rows: ids → rows of queries, int [n], −1 for an unknown one; passage_rows: the same for passages.
    num_queries: Q; a query that the file lacks has fills only; unknown queries are skipped, and the log says how many.
    depth: keeps the best `depth` of each query; default: the longest list in the file.

  Raises:
    InputError: with file and line, on a wrong column count, rank or score, an unknown passage, or one that is listed
      twice for a query; or if none of the file's queries is known.
  """

  def parse(line: str) -> tuple[str, str, int, float]:
    fields = line.split()
    if len(fields) != 6:
      raise _BadLine(f"{len(fields)} columns where a TREC run has 6 (qid Q0 pid rank score tag)", line)
    return fields[0], fields[2], _rank(fields[3]), _score(fields[4])

  return _read(path, parse, query_rows, passage_rows, num_queries, depth)


def read_msmarco(
  path: Path, query_rows: Lookup, passage_rows: Lookup, num_queries: int, depth: int | None = None
) -> Run:
  """Reads MS MARCO's own format. It has no scores: a passage's score here is −rank. Otherwise as `read_trec`."""

  def parse(line: str) -> tuple[str, str, int, float]:
    fields = line.rstrip("\n").split("\t")
    if len(fields) != 3:
      raise _BadLine(f"{len(fields)} columns where an MS MARCO run has 3 (qid, pid, rank, between tabs)", line)
    rank = _rank(fields[2])
    return fields[0], fields[1], rank, -float(rank)

  return _read(path, parse, query_rows, passage_rows, num_queries, depth)


class _BadLine(Exception):
  """What is wrong with a line, and the value; the reader adds file and line number."""


def _rank(text: str) -> int:
  if not text.isascii() or not text.isdigit() or len(text) > 9:
    raise _BadLine("rank is not a whole number from 0", text)
  return int(text)


def _score(text: str) -> float:
  try:
    score = float(text)
  except ValueError:
    raise _BadLine("score is not a number", text) from None
  if not abs(score) <= _LARGEST:
    raise _BadLine("score is not finite in float32", text)
  return score


def _escaped(text: str) -> str:
  return text.replace("%", "%%")


def _write(
  path: Path, run: Run, query_ids: Sequence[str], passage_ids: Sequence[str], line: Callable[[int], str], *,
  scored: bool,
) -> None:  # fmt: skip
  """Writes all lines of a query by one `%`, which is twice as fast as a line at a time.

  Args:
    line: rank → a format for the passage's id and, if `scored`, its score, with NUL in place of the query's id.
  """
  if len(query_ids) != len(run):
    raise ValueError(f"{len(query_ids)} query ids for a run of {len(run)} queries")
  formats = [line(rank) for rank in range(1, run.depth + 1)]
  with (
    progress.bar("write run", len(run), "query") as shown,
    atomic_path(path) as partial,
    open(partial, "w", encoding="utf-8") as stream,
  ):
    for start in range(0, len(run), _QUERIES):
      rows, scores = (array[start : start + _QUERIES] for array in (run.rows, run.scores))
      distinct, place = np.unique(rows, return_inverse=True)
      ids = np.array([passage_ids[row] if row >= 0 else "" for row in distinct.tolist()], object)
      for query, count in enumerate((rows >= 0).sum(1).tolist()):
        names = ids[place.reshape(rows.shape)[query, :count]].tolist()
        fields = names
        if scored:
          fields = [None] * (2 * count)
          fields[::2], fields[1::2] = names, scores[query, :count].tolist()
        text = "".join(formats[:count]).replace("\0", _escaped(query_ids[start + query]))
        stream.write(text % tuple(fields))
      shown.advance(len(rows))


class _Entries(NamedTuple):
  """Lines of a run file, or one query's list; arrays [n]."""

  rows: np.ndarray
  scores: np.ndarray  # float64, as the file has them
  ranks: np.ndarray
  lines: np.ndarray

  def take(self, places: np.ndarray) -> _Entries:
    return _Entries(*(column[places] for column in self))


def _read(
  path: Path, parse: Callable[[str], tuple[str, str, int, float]], query_rows: Lookup, passage_rows: Lookup,
  num_queries: int, depth: int | None,
) -> Run:  # fmt: skip
  lists: dict[int, _Entries] = {}
  skipped: set[str] = set()
  with open_text(path) as stream:
    parsed = _parsed(stream, path, parse)
    while block := list(itertools.islice(parsed, _LINES)):
      lines, queries, passages, ranks, scores = zip(*block, strict=True)
      known, rows = query_rows(queries), passage_rows(passages)
      if (rows < 0).any():
        at = int(np.argmax(rows < 0))
        raise InputError("unknown passage id", path=path, line=lines[at], value=passages[at])
      skipped.update(queries[at] for at in np.flatnonzero(known < 0))
      entries = _Entries(rows.astype(np.int32), np.array(scores), np.array(ranks), np.array(lines))
      _add(lists, known[known >= 0], entries.take(known >= 0), depth, path)
  if skipped and not lists:
    raise InputError("no query of this run is known here", path=path, value=min(skipped),
                     fix="Name a run of these queries")  # fmt: skip
  if skipped:
    _log.info("%s: %d queries are unknown here and skipped", path, len(skipped))
  run = Run.empty(num_queries, max((len(one.rows) for one in lists.values()), default=0) if depth is None else depth)
  for query, one in lists.items():
    run.rows[query, : len(one.rows)], run.scores[query, : len(one.rows)] = one.rows, one.scores
  return run


def _parsed(stream: TextIO, path: Path, parse: Callable[[str], tuple]) -> Iterator[tuple[int, str, str, int, float]]:
  """Yields (line number, query, passage, rank, score) of the lines that are not empty."""
  number = 0
  try:
    for line in progress.track(stream, "read run", unit="line"):
      number += 1
      if number == 1:
        line = line.removeprefix("\ufeff")  # a byte order mark would become part of the first query's id
      if not line.isspace():
        yield number, *parse(line)
  except _BadLine as error:
    raise InputError(error.args[0], path=path, line=number, value=error.args[1]) from None
  except (EOFError, zlib.error, UnicodeDecodeError, OSError) as error:
    raise InputError(f"cannot be read any further ({error})", path=path, line=number + 1,
                     fix="Fetch the file again") from error  # fmt: skip


def _add(lists: dict[int, _Entries], queries: np.ndarray, entries: _Entries, depth: int | None, path: Path) -> None:
  """Adds entries to the lists of their queries, rows [E], and cuts these to `depth`."""
  order = np.argsort(queries, kind="stable")
  starts = np.flatnonzero(np.diff(queries[order], prepend=-1))
  for of_query in np.split(order, starts[1:]) if len(order) else ():
    query, own = int(queries[of_query[0]]), entries.take(of_query)
    if query in lists:  # it is not in one piece, or goes on from the block before
      own = _Entries(*map(np.concatenate, zip(lists[query], own, strict=True)))
    _check_list(own, path)
    lists[query] = own.take(np.lexsort((own.rows, -own.scores))[:depth])


def _check_list(own: _Entries, path: Path) -> None:
  """Raises InputError for a passage that is listed twice, and where a later rank has the higher score."""
  order = np.lexsort((own.lines, own.rows))
  twice = order[1:][own.rows[order][1:] == own.rows[order][:-1]]
  if len(twice):
    raise InputError("passage is listed twice for its query", path=path, line=int(own.lines[twice].min()))
  order = np.lexsort((-own.scores, own.ranks))
  rises = order[1:][(np.diff(own.scores[order]) > 0) & (np.diff(own.ranks[order]) > 0)]
  if len(rises):
    raise InputError("the score is higher than that of an earlier rank", path=path, line=int(own.lines[rises].min()),
                     fix="Number the ranks by descending score")  # fmt: skip
