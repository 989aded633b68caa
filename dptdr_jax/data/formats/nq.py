"""Natural Questions as DPR prepared it: psgs_w100.tsv, biencoder-nq-{train,dev}.json, nq-*.qa.csv.

Formats: https://github.com/facebookresearch/DPR (resources in its download script).
"""

from __future__ import annotations

import ast
import csv
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import find_file
from dptdr_jax.data.formats import Format, Kind, Located
from dptdr_jax.data.formats.lines import id_of, read_json_array, read_lines, text_of, unicode_of
from dptdr_jax.data.records import Judgement, Negatives, Passage, Query

_HEADER = ["id", "text", "title"]


class NaturalQuestions(Format):
  """Reads DPR's files in one directory, each plain or gzipped.

  A split S is read from biencoder-nq-S.json (judgements and hard negatives) or, if that is missing, from nq-S.qa.csv
  (answers and no judgements: measured by answer match). Questions without a positive are left out and counted in
  `skipped`. A question's id is `nq-SPLIT-N`, N its place in the file from 0.

  Args:
    directory: holds psgs_w100.tsv and the rest.
  """

  def splits(self) -> tuple[str, ...]:
    splits = tuple(split for split in ("train", "dev", "test") if self._has(*_names(split)))
    if not splits:
      raise InputError("neither biencoder-nq-SPLIT.json nor nq-SPLIT.qa.csv is here", path=self.directory)
    return splits

  def files(self, split: str | None = None) -> list[pathlib.Path]:
    return [find_file(self.directory, *(["psgs_w100.tsv"] if split is None else _names(split)))]

  def records(self, kind: Kind, split: str | None) -> Iterator[Located]:
    if kind == "passages":
      yield from self._passages()
      return
    path = find_file(self.directory, *_names(str(split)))
    if ".qa.csv" not in path.name:
      yield from self._biencoder(kind, str(split), path)
    elif kind == "queries":
      yield from _questions(str(split), path)

  def _passages(self) -> Iterator[Located]:
    path = find_file(self.directory, "psgs_w100.tsv")
    for line, fields in _quoted_columns(path, 3):
      if line == 1:
        if fields != _HEADER:
          raise InputError(f"the header {_HEADER} expected", path=path, line=line, value=fields)
        continue
      passage_id, text, title = fields
      yield path, line, Passage(id_of(passage_id, "id", path, line), title.strip(), text_of(text, "text", path, line))

  def _biencoder(self, kind: Kind, split: str, path: pathlib.Path) -> Iterator[Located]:
    skipped = 0
    for index, (line, entry) in enumerate(read_json_array(path)):
      query_id = f"nq-{split}-{index}"
      positives = _passage_ids(entry, "positive_ctxs", path, line)
      if not positives:
        skipped += 1
      elif kind == "queries":
        text = text_of(entry.get("question"), "question", path, line)
        yield path, line, Query(query_id, text, _answers(entry.get("answers", []), path, line))
      elif kind == "judgements":
        for passage_id in dict.fromkeys(positives):
          yield path, line, Judgement(query_id, passage_id, 1)
      elif negatives := _passage_ids(entry, "hard_negative_ctxs", path, line):
        yield path, line, Negatives(query_id, tuple(dict.fromkeys(negatives)))
    self.skipped[split] = skipped


def _names(split: str) -> tuple[str, str]:
  return f"biencoder-nq-{split}.json", f"nq-{split}.qa.csv"


def _passage_ids(entry: dict[str, Any], key: str, path: pathlib.Path, line: int) -> list[str]:
  contexts = entry.get(key, [])
  if not isinstance(contexts, list):
    raise InputError(f"{key} must be a list", path=path, line=line, value=contexts)
  ids = []
  for context in contexts:
    value = context.get("passage_id", context.get("psg_id")) if isinstance(context, dict) else None
    if value is None:
      raise InputError(f"{key} has an entry without passage_id or psg_id", path=path, line=line, value=context)
    ids.append(id_of(value, "passage_id", path, line))
  return ids


def _questions(split: str, path: pathlib.Path) -> Iterator[Located]:
  for index, (line, (question, answers)) in enumerate(_quoted_columns(path, 2)):
    try:
      parsed = ast.literal_eval(answers)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
      raise InputError("answers must be a list of strings", path=path, line=line, value=answers) from error
    text = text_of(question, "question", path, line)
    yield path, line, Query(f"nq-{split}-{index}", text, _answers(parsed, path, line))


def _answers(value: object, path: pathlib.Path, line: int) -> tuple[str, ...]:
  if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
    raise InputError("answers must be a list of strings", path=path, line=line, value=value)
  return tuple(unicode_of(answer, "an answer", path, line) for answer in value)


def _quoted_columns(path: pathlib.Path, count: int) -> Iterator[tuple[int, list[str]]]:
  """Yields (line, fields) of a tab-separated file whose fields may be quoted as in CSV ("" for a quote)."""
  csv.field_size_limit(sys.maxsize)
  reader = csv.reader((text + "\n" for _, text in read_lines(path)), delimiter="\t")
  while True:
    line = reader.line_num + 1
    try:
      fields = next(reader, None)
    except csv.Error as error:
      raise InputError(f"broken table ({error})", path=path, line=line) from error
    if fields is None:
      return
    if any("\n" in field for field in fields):  # the field goes on to the next quote, maybe many rows further
      raise InputError("a quote that is not closed in its line", path=path, line=line, value=fields)
    if len(fields) != count:
      if not fields:
        continue
      raise InputError(f"{count} columns expected, {len(fields)} found", path=path, line=line, value=fields)
    yield line, fields
