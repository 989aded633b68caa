"""Passages without queries, for pretraining: one a line, or JSONL with 'text' and optionally 'title'."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.formats import Format, Kind, Located
from dptdr_jax.data.formats.lines import read_json_lines, read_lines, text_of, title_of
from dptdr_jax.data.records import Passage

_JSON = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_TEXT = (".txt", ".txt.gz")


class PlainText:
  """The passages of one file, gzipped or not; a passage's id is its line. Blank lines are skipped.

  Args:
    path: a name that ends in .jsonl or .ndjson (or the same with .gz) means JSON lines, any other one plain text.
      Plain text whose first line is JSON is an InputError.
  """

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    if not self.path.is_file():
      raise InputError("no such file", path=path)

  def read(self, start: int = 0) -> Iterator[Passage]:
    """Yields passages in file order from passage `start` on."""
    passages = self._json() if self.path.name.endswith(_JSON) else self._lines()
    return itertools.islice(passages, start, None)

  def count(self) -> int:
    """Returns the number of passages, by reading all; an InputError names the first bad line."""
    count = sum(1 for _ in self.read())
    if not count:
      raise InputError("empty corpus", path=self.path)
    return count

  def _lines(self) -> Iterator[Passage]:
    first = True
    for line, text in read_lines(self.path):
      if not text.strip():
        continue
      if first and _is_json(text):
        raise InputError("a file of plain text begins as JSON", path=self.path, line=line, value=text.strip(),
                         fix=f"JSON lines need a name that ends in {', '.join(_JSON)}")  # fmt: skip
      first = False
      yield Passage(str(line), "", text.strip())

  def _json(self) -> Iterator[Passage]:
    for line, value in read_json_lines(self.path):
      text = text_of(value.get("text"), "text", self.path, line)
      yield Passage(str(line), title_of(value, self.path, line), text)


def _is_json(text: str) -> bool:
  """Whether a first line is a JSON object, or the beginning of an array or object over several lines."""
  text = text.strip()
  if text in ("[", "{") or text.startswith("[{"):
    return True
  try:
    return isinstance(json.loads(text), dict)
  except ValueError:
    return False


class TextFolder(Format):
  """The passages of all text and JSONL files of a folder, in the order of their names; no queries.

  A passage's id is its file and line. Files with other endings are ignored.
  """

  def records(self, kind: Kind, split: str | None) -> Iterator[Located]:
    for path in self.files() if kind == "passages" else ():
      for passage in PlainText(path).read():
        yield path, int(passage.id), passage._replace(id=f"{path.name}:{passage.id}")

  def splits(self) -> tuple[str, ...]:
    return ()

  def files(self, split: str | None = None) -> list[pathlib.Path]:
    paths = sorted(path for path in self.directory.iterdir() if path.is_file() and path.name.endswith(_TEXT + _JSON))
    if not paths:
      raise InputError("no text in this folder", path=self.directory, fix=f"Files end in {', '.join(_TEXT + _JSON)}")
    return paths
