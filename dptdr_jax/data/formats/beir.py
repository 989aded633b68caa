"""BEIR folders: corpus.jsonl, queries.jsonl (one file for all splits), qrels/SPLIT.tsv; each may be gzipped.

Source of the layout: https://github.com/beir-cellar/beir/wiki/Load-your-custom-dataset
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import find_file
from dptdr_jax.data.formats import Format, Kind, Located, in_order
from dptdr_jax.data.formats.lines import (
  grade_of,
  id_of,
  read_columns,
  read_json_lines,
  text_of,
  title_of,
  unicode_of,
)
from dptdr_jax.data.records import Judgement, Passage, Query

_HEADERS = ("query-id", "query_id", "qid")
_EMPTY_TEXTS = ("error", "title", "keep")  # each accepts what those before it accept


class Beir(Format):
  """Reads a BEIR folder. A split's queries are those that its qrels name, in the order of queries.jsonl.

  Args:
    directory: the folder.
    empty_text: for passages without text. "error": an error. "title": the title becomes the text (TREC-COVID has
      thousands of them); without a title it is an error. "keep": without a title it stays, with an empty text (FiQA).

  A query's `metadata.answers` (a list of strings) become its answers.
  """

  def __init__(self, directory: str | pathlib.Path, *, empty_text: Literal["error", "title", "keep"] = "title"):
    super().__init__(directory)
    self._empty_text = empty_text

  def splits(self) -> tuple[str, ...]:
    qrels = self.directory / "qrels"
    names = [path.name for ending in ("*.tsv", "*.tsv.gz") for path in qrels.glob(ending)]
    if not names:
      raise InputError("no qrels/SPLIT.tsv here", path=self.directory)
    return in_order((name.removesuffix(".gz").removesuffix(".tsv") for name in names), qrels)

  def files(self, split: str | None = None) -> list[pathlib.Path]:
    if split is None:
      return [find_file(self.directory, "corpus.jsonl")]
    return [find_file(self.directory, "queries.jsonl"), self._qrels(split)]

  def records(self, kind: Kind, split: str | None) -> Iterator[Located]:
    if kind == "passages":
      yield from self._passages()
    elif kind == "queries":
      yield from self._queries(str(split))
    elif kind == "judgements":
      yield from self._judgements(str(split))

  def _qrels(self, split: str) -> pathlib.Path:
    return find_file(self.directory / "qrels", f"{split}.tsv")

  def _passages(self) -> Iterator[Located]:
    path = find_file(self.directory, "corpus.jsonl")
    for line, value in read_json_lines(path):
      if "text" not in value:  # a missing field, unlike an empty one: its name may be another
        raise InputError("no text", path=path, line=line, value=value)
      title, text = title_of(value, path, line), value["text"]
      if text is None or (isinstance(text, str) and not text.strip()):
        title, text = self._without_text(title, path, line)
      else:
        text = text_of(text, "text", path, line)
      yield path, line, Passage(_id(value, path, line), title, text)

  def _without_text(self, title: str, path: pathlib.Path, line: int) -> tuple[str, str]:
    """The title and text of a passage without text."""
    needed = "title" if title else "keep"
    if _EMPTY_TEXTS.index(self._empty_text) < _EMPTY_TEXTS.index(needed):
      what = "empty text" if title else "empty text and no title"
      fix = f"Give it a text, remove the line, or accept it with --config.data.empty_text={needed}"
      raise InputError(what, path=path, line=line, fix=fix)
    return "", title

  def _queries(self, split: str) -> Iterator[Located]:
    path = find_file(self.directory, "queries.jsonl")
    judged = {judgement.query_id for judgement in self.judgements(split)}
    for line, value in read_json_lines(path):
      query_id = _id(value, path, line)
      text = text_of(value.get("text"), "text", path, line)
      if query_id in judged:
        yield path, line, Query(query_id, text, _answers(value, path, line))

  def _judgements(self, split: str) -> Iterator[Located]:
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
