"""BEIR folders: corpus.jsonl, queries.jsonl (one file for all splits), qrels/SPLIT.tsv; each may be gzipped.

The format: https://github.com/beir-cellar/beir/wiki/Load-your-custom-dataset
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import find_file
from dptdr_jax.data.records import Judgement, Passage, Query
from dptdr_jax.data.sources.lines import (
  FileSource,
  Kind,
  Placed,
  grade_of,
  id_of,
  read_columns,
  read_json_lines,
  text_of,
  unicode_of,
)

_HEADERS = ("query-id", "query_id", "qid")
_EMPTY_TEXTS = ("error", "title", "keep")  # each takes what those before it take


class Beir(FileSource):
  """Reads a BEIR folder. A split's queries are those that its qrels name, in the order of queries.jsonl.

  Args:
    directory: the folder.
    empty_text: what becomes of a passage without text: "error"; "title", its title is its text (TREC-COVID has
      thousands of them), and one without a title too is an error; "keep", that one stays, with an empty text (FiQA).

  A query's `metadata.answers` (a list of strings), where there are any, become its answers.

  Raises:
    InputError: no such directory, or an unknown `empty_text`.
  """

  def __init__(self, directory: str | pathlib.Path, *, empty_text: str = "title"):
    super().__init__(directory)
    if empty_text not in _EMPTY_TEXTS:
      raise InputError("unknown data.empty_text", value=empty_text, fix=f"Use {', '.join(_EMPTY_TEXTS)}")
    self._empty_text = empty_text

  def splits(self) -> tuple[str, ...]:
    """Names of the files in qrels/, training first."""
    found = [path.name for ending in ("*.tsv", "*.tsv.gz") for path in (self.directory / "qrels").glob(ending)]
    names = {name.removesuffix(".gz").removesuffix(".tsv") for name in found}
    if not names:
      raise InputError("no qrels/SPLIT.tsv here", path=self.directory)
    return tuple(sorted(names, key=lambda name: (name != "train", name)))

  def files(self, split: str | None = None) -> list[pathlib.Path]:
    """Files of the corpus or of a split."""
    if split is None:
      return [find_file(self.directory, "corpus.jsonl")]
    return [find_file(self.directory, "queries.jsonl"), self._qrels(split)]

  def records(self, kind: Kind, split: str | None) -> Iterator[Placed]:
    """Yields (path, line, record) of one kind."""
    if kind == "passages":
      yield from self._passages()
    elif kind == "queries":
      yield from self._queries(str(split))
    elif kind == "judgements":
      yield from self._judgements(str(split))

  def _qrels(self, split: str) -> pathlib.Path:
    return find_file(self.directory / "qrels", f"{split}.tsv")

  def _passages(self) -> Iterator[Placed]:
    path = find_file(self.directory, "corpus.jsonl")
    for line, value in read_json_lines(path):
      title = value.get("title") or ""
      if not isinstance(title, str):
        raise InputError("a title must be a string", path=path, line=line, value=title)
      if "text" not in value:  # not an empty one: a file with another name for it would be read as titles alone
        raise InputError("no text", path=path, line=line, value=value)
      title, text = unicode_of(title.strip(), "title", path, line), value["text"]
      if text is None or (isinstance(text, str) and not text.strip()):
        title, text = self._of_empty(title, path, line)
      else:
        text = text_of(text, "text", path, line)
      yield path, line, Passage(_id(value, path, line), title, text)

  def _of_empty(self, title: str, path: pathlib.Path, line: int) -> tuple[str, str]:
    """Title and text of a passage that comes without text."""
    needed = "title" if title else "keep"
    if _EMPTY_TEXTS.index(self._empty_text) < _EMPTY_TEXTS.index(needed):
      what = "empty text" if title else "empty text and no title"
      fix = f"Give it a text, remove the line, or take it as it is with --config.data.empty_text={needed}"
      raise InputError(what, path=path, line=line, fix=fix)
    return "", title

  def _queries(self, split: str) -> Iterator[Placed]:
    path = find_file(self.directory, "queries.jsonl")
    judged = {judgement.query_id for judgement in self.judgements(split)}
    for line, value in read_json_lines(path):
      query_id = _id(value, path, line)
      text = text_of(value.get("text"), "text", path, line)
      if query_id in judged:
        yield path, line, Query(query_id, text, _answers(value, path, line))

  def _judgements(self, split: str) -> Iterator[Placed]:
    path = self._qrels(split)
    for line, (query_id, passage_id, grade) in read_columns(path, 3):
      if line == 1 and query_id.strip().lower() in _HEADERS:
        continue
      yield path, line, Judgement(query_id, passage_id, grade_of(grade, path, line))


def _id(value: dict[str, Any], path: pathlib.Path, line: int) -> str:
  if "_id" not in value:
    raise InputError("no _id", path=path, line=line, value=value)
  return id_of(value["_id"], "_id", path, line)


def _answers(value: dict[str, Any], path: pathlib.Path, line: int) -> tuple[str, ...]:
  metadata = value.get("metadata")
  answers = metadata.get("answers") if isinstance(metadata, dict) else None
  if answers is None:
    return ()
  if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
    raise InputError("metadata.answers must be a list of strings", path=path, line=line, value=answers)
  return tuple(unicode_of(answer, "an answer", path, line) for answer in answers)
