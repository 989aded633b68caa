"""Runs: what a search found for each query, in memory by row and on disk by id.

In memory a run is passage rows and scores; ids are joined when a file is written. Files are TREC's six columns
(`qid Q0 pid rank score tag`) or MS MARCO's three (`qid pid rank`, tabs); gzip is accepted when reading.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

import numpy as np

from dptdr_jax.core import progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path, atomic_directory, atomic_path, open_text

_log = logging.getLogger(__name__)

FILL = -1  # in place of a passage row where a query has fewer than K passages
_LINES = 1 << 18  # of a run file that are looked up at a time

Lookup = Callable[[Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Run:
  """The passages found for Q queries, best first.

  Attributes:
    rows: int32 [Q, K], passage rows; −1 fills stand at the end of a query.
    scores: float32 [Q, K], descending, −inf at fills; equal scores stand by ascending row.
  """

  rows: np.ndarray
  scores: np.ndarray

  def __post_init__(self):
    if self.rows.ndim != 2 or self.rows.shape != self.scores.shape:
      raise ValueError(f"rows {self.rows.shape} and scores {self.scores.shape} must be equal [Q, K] shapes")

  @classmethod
  def empty(cls, num_queries: int, depth: int) -> Run:
    """A run of fills, to be filled query block by query block."""
    return cls(np.full((num_queries, depth), FILL, np.int32), np.full((num_queries, depth), -np.inf, np.float32))

  @classmethod
  def ranked(cls, rows: np.ndarray, scores: np.ndarray, depth: int | None = None) -> Run:
    """Puts found passages into a run's order: score descending, then row ascending, fills last; cut to `depth`.

    Args:
      rows: int [Q, K'], any negative row is a fill.
      scores: float [Q, K'], whatever stands at fills.
      depth: K; default K'.
    """
    absent = rows < 0
    scores = np.where(absent, -np.inf, scores).astype(np.float32)
    rows = np.where(absent, FILL, rows).astype(np.int32)
    order = np.lexsort((np.where(absent, np.iinfo(np.int32).max, rows), -scores))[:, :depth]
    return cls(np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1))

  @classmethod
  def open(cls, directory: Path) -> Run:
    """Maps a run that `save` wrote."""
    try:
      return cls(*(np.load(os.path.join(directory, f"{name}.npy"), mmap_mode="r") for name in ("rows", "scores")))
    except (OSError, ValueError) as error:
      raise InputError(f"no whole run here ({error})", path=directory, fix="Remove it: it is searched again") from error

  def save(self, directory: Path) -> None:
    """Writes rows.npy and scores.npy, both or neither."""
    with atomic_directory(directory) as partial:
      np.save(partial / "rows.npy", self.rows)
      np.save(partial / "scores.npy", self.scores)

  def __len__(self) -> int:
    """Number of queries Q."""
    return len(self.rows)

  @property
  def depth(self) -> int:
    """K, the most passages a query can have."""
    return self.rows.shape[1]

  def counts(self) -> np.ndarray:
    """Number of passages found for each query, int64 [Q]."""
    return (self.rows >= 0).sum(1)


def write_trec(path: Path, run: Run, query_ids: Sequence[str], passage_ids: Sequence[str], tag: str) -> None:
  """Writes a TREC run file, atomically; ranks from 1, scores with the nine digits that carry a float32 whole.

  trec_eval reads scores, not ranks, and breaks ties by passage id: its figures differ from ours where scores tie.
  """

  def lines(query: str, rows: list[int], scores: list[float]) -> Iterator[str]:
    for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1):
      yield f"{query} Q0 {passage_ids[row]} {rank} {score:.9g} {tag}\n"

  _write(path, run, query_ids, lines)


def write_msmarco(path: Path, run: Run, query_ids: Sequence[str], passage_ids: Sequence[str]) -> None:
  """Writes MS MARCO's own format, `qid\\tpid\\trank`, atomically; ranks from 1."""

  def lines(query: str, rows: list[int], _: list[float]) -> Iterator[str]:
    for rank, row in enumerate(rows, 1):
      yield f"{query}\t{passage_ids[row]}\t{rank}\n"

  _write(path, run, query_ids, lines)


def read_trec(path: Path, query_rows: Lookup, passage_rows: Lookup, num_queries: int, depth: int | None = None) -> Run:
  """Reads a TREC run file. Its order is that of the scores (ties by row): the rank column is checked, not used.

  What is kept of a file of any length is `depth` passages a query.

  Args:
    path: the file, plain or gzip.
    query_rows: ids → rows of queries, int [n], −1 for an unknown one; passage_rows: the same for passages.
    num_queries: Q; a query that the file lacks has fills only; others that it has are skipped, and the log says how
      many.
    depth: keeps the best `depth` of each query; default: the longest list in the file.

  Raises:
    InputError: with file and line, on a wrong column count, rank or score, an unknown passage, or one that stands twice
      for a query; or where none of the file's queries is known.
  """

  def parse(line: str) -> tuple[str, str, float]:
    fields = line.split()
    if len(fields) != 6:
      raise _BadLine(f"{len(fields)} columns where a TREC run has 6 (qid Q0 pid rank score tag)", line)
    _rank(fields[3])
    return fields[0], fields[2], _score(fields[4])

  return _read(path, parse, query_rows, passage_rows, num_queries, depth)


def read_msmarco(
  path: Path, query_rows: Lookup, passage_rows: Lookup, num_queries: int, depth: int | None = None
) -> Run:
  """Reads MS MARCO's own format. It has no scores: a passage's score here is −rank. Otherwise as `read_trec`."""

  def parse(line: str) -> tuple[str, str, float]:
    fields = line.rstrip("\n").split("\t")
    if len(fields) != 3:
      raise _BadLine(f"{len(fields)} columns where an MS MARCO run has 3 (qid, pid, rank, between tabs)", line)
    return fields[0], fields[1], -float(_rank(fields[2]))

  return _read(path, parse, query_rows, passage_rows, num_queries, depth)


class _BadLine(Exception):
  """What is wrong with a line, and the value that is; the reader adds file and line number."""


def _rank(text: str) -> int:
  if not text.isascii() or not text.isdigit():
    raise _BadLine("rank is not a whole number from 0", text)
  return int(text)


def _score(text: str) -> float:
  try:
    score = float(text)
  except ValueError:
    raise _BadLine("score is not a number", text) from None
  if not math.isfinite(score):
    raise _BadLine("score is not finite", text)
  return score


def _write(path: Path, run: Run, query_ids: Sequence[str], lines: Callable[..., Iterator[str]]) -> None:
  if len(query_ids) != len(run):
    raise ValueError(f"{len(query_ids)} query ids for a run of {len(run)} queries")
  counts = run.counts()
  with atomic_path(path) as partial, open(partial, "w", encoding="utf-8") as stream:
    for query in progress.track(range(len(run)), "write run", unit="query"):
      found = slice(0, counts[query])
      stream.writelines(lines(query_ids[query], run.rows[query, found].tolist(), run.scores[query, found].tolist()))


def _read(
  path: Path,
  parse: Callable[[str], tuple[str, str, float]],
  query_rows: Lookup,
  passage_rows: Lookup,
  num_queries: int,
  depth: int | None,
) -> Run:
  found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
  skipped: set[str] = set()
  with open_text(path) as stream:
    lines = _parsed(stream, path, parse)
    while block := list(itertools.islice(lines, _LINES)):
      numbers, queries, passages, scores = zip(*block, strict=True)
      rows = np.stack([query_rows(queries), passage_rows(passages)])
      if (rows[1] < 0).any():
        line = int(np.argmax(rows[1] < 0))
        raise InputError("unknown passage id", path=path, line=numbers[line], value=passages[line])
      known = rows[0] >= 0
      skipped.update(queries[line] for line in np.flatnonzero(~known))
      if known.any():
        _take(found, *rows[:, known], np.array(scores, np.float32)[known], np.array(numbers)[known], depth, path)
  if skipped and not found:
    raise InputError("no query of this run is known here", path=path, value=min(skipped),
                     fix="Name a run of these queries")  # fmt: skip
  if skipped:
    _log.info("%s: %d queries are unknown here and skipped", path, len(skipped))
  run = Run.empty(num_queries, max((len(rows) for rows, _ in found.values()), default=0) if depth is None else depth)
  for query, (rows, scores) in found.items():
    run.rows[query, : len(rows)], run.scores[query, : len(rows)] = rows, scores
  return run


def _parsed(stream: TextIO, path: Path, parse: Callable[[str], tuple]) -> Iterator[tuple[int, str, str, float]]:
  """Yields (line number, query, passage, score) of the lines that are not empty."""
  number = 0
  try:
    for line in progress.track(stream, "read run", unit="line"):
      number += 1
      if not line.isspace():
        yield number, *parse(line)
  except _BadLine as error:
    raise InputError(error.args[0], path=path, line=number, value=error.args[1]) from None
  except (EOFError, zlib.error, UnicodeDecodeError, OSError) as error:
    raise InputError(f"cannot be read on ({error})", path=path, line=number + 1, fix="Fetch the file again.") from error


def _take(
  found: dict[int, tuple[np.ndarray, np.ndarray]], queries: np.ndarray, passages: np.ndarray, scores: np.ndarray,
  numbers: np.ndarray, depth: int | None, path: Path,
) -> None:  # fmt: skip
  """Adds entries [E] to the lists by query, which stay in a run's order; `numbers` are lines, for the error."""
  order = np.argsort(queries, kind="stable")
  starts = np.flatnonzero(np.diff(queries[order], prepend=-1))
  for entries in np.split(order, starts[1:]):
    query = int(queries[entries[0]])
    rows, values, lines = passages[entries].astype(np.int32), scores[entries], numbers[entries]
    if query in found:  # its list is not in one piece, or goes on from the block before
      before, theirs = found[query]
      rows, values = np.concatenate([before, rows]), np.concatenate([theirs, values])
      lines = np.concatenate([np.zeros(len(before), lines.dtype), lines])
    by_row = np.lexsort((lines, rows))
    twice = by_row[1:][rows[by_row][1:] == rows[by_row][:-1]]
    if len(twice):
      raise InputError("passage stands twice for its query", path=path, line=int(lines[twice].min()))
    best = np.lexsort((rows, -values))[:depth]
    found[query] = rows[best], values[best]
