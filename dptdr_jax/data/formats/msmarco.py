"""MS MARCO passage ranking and the TREC Deep Learning queries over it, in their official files.

Formats: https://microsoft.github.io/msmarco/Datasets; the titles come with RocketQA (para.title.txt).
"""

from __future__ import annotations

import collections
import itertools
import pathlib
from collections.abc import Iterator

from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import find_file
from dptdr_jax.data.formats import Format, Kind, Located
from dptdr_jax.data.formats.lines import grade_of, id_of, read_columns, text_of
from dptdr_jax.data.records import Judgement, Negatives, Passage, Query

# Split → pairs of (queries, qrels); the first pair whose qrels exist is read.
_SPLITS = {
  "train": (("queries.train.tsv", "qrels.train.tsv"),),
  "dev": (("queries.dev.small.tsv", "qrels.dev.small.tsv"), ("queries.dev.tsv", "qrels.dev.tsv")),
  "dl19": (("msmarco-test2019-queries.tsv", "2019qrels-pass.txt"),),
  "dl20": (("msmarco-test2020-queries.tsv", "2020qrels-pass.txt"),),
}
_NEGATIVES = 100  # read of a training query's official BM25 negatives; there are up to 1,000
_TRIPLES = "qidpidtriples.train.full.2.tsv"


class MsMarco(Format):
  """Reads MS MARCO's files in one directory, each plain or gzipped.

  A split's queries are those that its qrels name: 502,939 for training, 6,980 for dev (dev.small), 43 and 54 for
  TREC DL 2019 and 2020, which have grades 0–3.

  Args:
    directory: holds collection.tsv, queries.*.tsv, qrels.*.tsv and, if there are any, titles and negatives.
    titles: read titles from para.title.txt (`pid\\ttitle`, in the collection's order): the title-augmented corpus.
  """

  def __init__(self, directory: str | pathlib.Path, *, titles: bool = False):
    super().__init__(directory)
    self._titles = titles

  def splits(self) -> tuple[str, ...]:
    splits = tuple(split for split in _SPLITS if self._has(self._pair(split)[1]))
    if not splits:
      raise InputError("no qrels here (qrels.train.tsv, qrels.dev.small.tsv, …)", path=self.directory)
    return splits

  def files(self, split: str | None = None) -> list[pathlib.Path]:
    names = ["collection.tsv", *(["para.title.txt"] if self._titles else [])]
    if split is not None:
      names = [*self._pair(split), *([_TRIPLES] if split == "train" and self._has(_TRIPLES) else [])]
    return [find_file(self.directory, name) for name in names]

  def records(self, kind: Kind, split: str | None) -> Iterator[Located]:
    if kind == "passages":
      yield from self._passages()
    elif kind == "queries":
      yield from self._queries(str(split))
    elif kind == "judgements":
      yield from self._judgements(str(split))
    elif split == "train" and self._has(_TRIPLES):
      yield from self._negatives()

  def _pair(self, split: str) -> tuple[str, str]:
    """The names of the queries and of the qrels."""
    return next((pair for pair in _SPLITS[split] if self._has(pair[1])), _SPLITS[split][0])

  def _passages(self) -> Iterator[Located]:
    path = find_file(self.directory, "collection.tsv")
    titles = _Titles(find_file(self.directory, "para.title.txt")) if self._titles else None
    for line, (passage_id, text) in read_columns(path, 2):
      passage_id = id_of(passage_id, "passage id", path, line)
      title = titles.of(passage_id) if titles else ""
      yield path, line, Passage(passage_id, title, text_of(text, "text", path, line))
    if titles:
      titles.finish()

  def _queries(self, split: str) -> Iterator[Located]:
    path = find_file(self.directory, self._pair(split)[0])
    judged = {judgement.query_id for judgement in self.judgements(split)}
    count = 0
    for line, (query_id, text) in read_columns(path, 2):
      if query_id in judged:
        yield path, line, Query(id_of(query_id, "query id", path, line), text_of(text, "text", path, line))
      else:
        count += 1
    self.skipped[split] = count

  def _judgements(self, split: str) -> Iterator[Located]:
    path = find_file(self.directory, self._pair(split)[1])
    for line, (query_id, _, passage_id, grade) in read_columns(path, 4, separator=None):
      yield path, line, Judgement(query_id, passage_id, grade_of(grade, path, line))

  def _negatives(self) -> Iterator[Located]:
    """Groups neighbouring triples (query, positive, negative) of one query; takes the first ones of each query."""
    path = find_file(self.directory, _TRIPLES)
    taken: collections.Counter[str] = collections.Counter()
    for query_id, lines in itertools.groupby(read_columns(path, 3), key=lambda entry: entry[1][0]):
      first, room = 0, _NEGATIVES - taken[query_id]
      chosen: dict[str, None] = {}
      for line, (_, _, passage_id) in lines:
        first = first or line
        if len(chosen) < room:
          chosen[passage_id] = None
      if chosen:
        taken[query_id] += len(chosen)
        yield path, first, Negatives(query_id, tuple(chosen))


class _Titles:
  """Reads the titles file in step with the collection, which has the same order: no title is held in memory."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._entries = read_columns(path, 2)
    self._next = next(self._entries, None)

  def of(self, passage_id: str) -> str:
    """Returns the passage's title, "" if the file has none."""
    if self._next is None or self._next[1][0] != passage_id:
      return ""
    title = self._next[1][1].strip()
    self._next = next(self._entries, None)
    return title

  def finish(self) -> None:
    """Raises an InputError if titles are left: the file has another order than the collection."""
    if self._next is not None:
      line, (passage_id, _) = self._next
      fix = "Titles must be in the collection's order"
      raise InputError("no passage follows that has this id", path=self._path, line=line, value=passage_id, fix=fix)
