"""Runs: which passages a search retrieved for each query, in memory by row and in files by id.

Files are TREC's six columns (`qid Q0 pid rank score tag`), plain or gzip; for MS MARCO's evaluation also its three
(`qid pid rank`, tabs), which are written alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dptdr_jax.core import progress, shards
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path, atomic_path, open_text
from dptdr_jax.core.team import SOLO, Team

_log = logging.getLogger(__name__)

FILL = -1  # in place of a passage row where a query has fewer than K passages
_BLOCK = 1 << 16  # lines of a run file that are looked up at a time
_QUERIES = 256  # whose lines are written together
_LARGEST = float(np.finfo(np.float32).max)
_KIND = "run"

Lookup = Callable[[Sequence[str]], np.ndarray]
Line = Callable[[str, str, int, float], str]  # query id, passage id, rank, score


@dataclasses.dataclass(frozen=True)
class Run:
  """The passages retrieved for Q queries, best first. Arrays on disk are read as they are sliced.

  Attributes:
    rows: int32 [Q, K], passage rows; −1 fills at the end of a query.
    scores: float32 [Q, K], descending, −inf at fills; equal scores are ordered by ascending row.
  """

  rows: np.ndarray | shards.Column
  scores: np.ndarray | shards.Column

  @classmethod
  def empty(cls, num_queries: int, depth: int) -> Run:
    """A run of fills, to be filled query block by query block."""
    return cls(np.full((num_queries, depth), FILL, np.int32), np.full((num_queries, depth), -np.inf, np.float32))

  @classmethod
  def ranked(cls, rows: np.ndarray, scores: np.ndarray, depth: int | None = None) -> Run:
    """Puts passages [Q, K'] into a run's order: score descending, then row ascending, fills last; cut to `depth`."""
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
    count, depth: Q and K.
    search: queries → their run of depth K.
    size: queries a shard: the work that a kill may cost, against one reading of the corpus.
    team: the processes that take turns at the shards.
  """

  def make(queries: range) -> dict[str, np.ndarray]:
    run = search(queries)
    return {"rows": run.rows, "scores": run.scores}

  shards.share_out(directory, count, size, _arrays(depth), make, about=_about(depth), team=team, what=what)
  return Run.open(directory)


def _arrays(depth: int) -> shards.Arrays:
  return {"rows": ("int32", (depth,)), "scores": ("float32", (depth,))}


def _about(depth: int) -> dict[str, object]:
  return {"format": 1, "kind": _KIND, "depth": depth}


def write_trec(path: Path, run: Run, query_ids: Sequence[str], passage_ids: Sequence[str], tag: str) -> None:
  """Writes a TREC run file, atomically; ranks from 1, scores with nine digits, which hold a float32 exactly.

  trec_eval reads scores, not ranks, and breaks ties by passage id: its figures differ from ours where scores tie.
  """

  def line(query: str, passage: str, rank: int, score: float) -> str:
    return f"{query} Q0 {passage} {rank} {score:.9g} {tag}\n"

  _write(path, run, query_ids, passage_ids, line)


def write_msmarco(path: Path, run: Run, query_ids: Sequence[str], passage_ids: Sequence[str]) -> None:
  """Writes MS MARCO's own format, `qid\\tpid\\trank`, atomically; ranks from 1."""
  _write(path, run, query_ids, passage_ids, lambda query, passage, rank, _: f"{query}\t{passage}\t{rank}\n")


def read_trec(path: Path, query_rows: Lookup, passage_rows: Lookup, num_queries: int, depth: int | None = None) -> Run:
  """Reads a TREC run file. Its order is that of the scores, ties by row; ranks that contradict it are an error.

  Args:
    path: the file, plain or gzip; a line takes 40 bytes of memory.
    query_rows: ids → rows of queries, int [n], −1 for an unknown one; passage_rows: the same for passages.
    num_queries: Q; a query that the file lacks has fills only; unknown queries are skipped, and the log says how many.
    depth: keeps the best `depth` of each query; default: the longest list in the file.

  Raises:
    InputError: with file and line, on a wrong column count, rank or score, an unknown passage, or one that is listed
      twice for a query; or if none of the file's queries is known.
  """
  parts, skipped, parsed = [(np.empty(0, np.int64),) * 5], set(), _lines(path)
  while block := list(itertools.islice(parsed, _BLOCK)):
    lines, queries, passages, ranks, scores = zip(*block, strict=True)
    known, rows = query_rows(queries), passage_rows(passages)
    if (rows < 0).any():
      at = int(np.argmax(rows < 0))
      raise InputError("unknown passage id", path=path, line=lines[at], value=passages[at])
    skipped.update(queries[at] for at in np.flatnonzero(known < 0))
    columns = known, rows.astype(np.int32), np.array(scores), np.array(ranks, np.int32), np.array(lines)
    parts.append(tuple(column[known >= 0] for column in columns))
  queries, rows, scores, ranks, lines = map(np.concatenate, zip(*parts, strict=True))
  if skipped and not len(queries):
    raise InputError("no query of this run is known here", path=path, value=min(skipped),
                     fix="Name a run of these queries")  # fmt: skip
  if skipped:
    _log.info("%s: %d queries are unknown here and skipped", path, len(skipped))
  _check_lists(queries, rows, scores, ranks, lines, path)
  order, counts = np.lexsort((rows, -scores, queries)), np.bincount(queries, minlength=num_queries)
  places = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
  run = Run.empty(num_queries, int(counts.max(initial=0)) if depth is None else depth)
  order, places = order[places < run.depth], places[places < run.depth]
  run.rows[queries[order], places], run.scores[queries[order], places] = rows[order], scores[order]
  return run


def _write(path: Path, run: Run, query_ids: Sequence[str], passage_ids: Sequence[str], line: Line) -> None:
  with (
    progress.bar("write run", len(run), "query") as shown,
    atomic_path(path) as partial,
    open(partial, "w", encoding="utf-8") as stream,
  ):
    for start in range(0, len(run), _QUERIES):
      rows, scores = (array[start : start + _QUERIES] for array in (run.rows, run.scores))
      names = {row: passage_ids[row] for row in np.unique(rows).tolist() if row >= 0}
      for query, ranked in enumerate(zip(rows.tolist(), scores.tolist(), strict=True), start):
        entries = enumerate(zip(*ranked, strict=True), 1)
        stream.writelines(line(query_ids[query], names[row], rank, score) for rank, (row, score) in entries if row >= 0)
      shown.advance(len(rows))


def _lines(path: Path) -> Iterator[tuple[int, str, str, int, float]]:
  """Yields (line number, query, passage, rank, score) of the lines that are not empty."""
  number = 0
  with open_text(path) as stream:
    try:
      for number, line in enumerate(progress.track(stream, "read run", unit="line"), 1):
        if not line.isspace():
          # A byte order mark would become part of the first query's id.
          yield number, *_fields(line.removeprefix("\ufeff") if number == 1 else line, path, number)
    except (EOFError, zlib.error, UnicodeDecodeError, OSError) as error:
      raise InputError(f"cannot be read any further ({error})", path=path, line=number + 1,
                       fix="Fetch the file again") from error  # fmt: skip


def _fields(line: str, path: Path, number: int) -> tuple[str, str, int, float]:
  fields = line.split()
  if len(fields) != 6:
    what = f"{len(fields)} columns where a TREC run has 6 (qid Q0 pid rank score tag)"
    raise InputError(what, path=path, line=number, value=line)
  query, _, passage, rank, score, _ = fields
  if not rank.isascii() or not rank.isdigit() or len(rank) > 9:
    raise InputError("rank is not a whole number from 0", path=path, line=number, value=rank)
  try:
    value = float(score)
  except ValueError:
    raise InputError("score is not a number", path=path, line=number, value=score) from None
  if not abs(value) <= _LARGEST:
    raise InputError("score is not finite in float32", path=path, line=number, value=score)
  return query, passage, int(rank), value


def _check_lists(
  queries: np.ndarray, rows: np.ndarray, scores: np.ndarray, ranks: np.ndarray, lines: np.ndarray, path: Path
) -> None:
  """Raises InputError for a passage that is listed twice, and where a later rank has the higher score."""

  def first_line(order: np.ndarray, *conditions: np.ndarray) -> int | None:
    wrong = np.all([np.diff(queries[order]) == 0, *conditions], axis=0)
    return int(lines[order[1:][wrong]].min()) if wrong.any() else None

  order = np.lexsort((lines, rows, queries))
  if (line := first_line(order, np.diff(rows[order]) == 0)) is not None:
    raise InputError("passage is listed twice for its query", path=path, line=line)
  order = np.lexsort((-scores, ranks, queries))
  if (line := first_line(order, np.diff(scores[order]) > 0, np.diff(ranks[order]) > 0)) is not None:
    fix = "Number the ranks by descending score"
    raise InputError("the score is higher than that of an earlier rank", path=path, line=line, fix=fix)
