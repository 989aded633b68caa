"""Text without queries, for pretraining: one passage a line, or JSONL with 'text' and, if there is one, 'title'."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.records import Passage
from dptdr_jax.data.sources.lines import FileSource, Kind, Placed, read_json_lines, read_lines, text_of, unicode_of

_JSON = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_TEXT = (".txt", ".txt.gz")


class PlainText:
  """The passages of one file, gzip or not; a passage's id is its line. Blank lines are passed over.

  Args:
    path: its name decides: .jsonl or .ndjson (with or without .gz) is JSON lines, anything else is plain text, unless
      its first line is a JSON object.
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
    """Reads everything once: the number of passages, or an InputError that names the first bad line."""
    found = sum(1 for _ in self.read())
    if not found:
      raise InputError("empty corpus", path=self.path)
    return found

  def _lines(self) -> Iterator[Passage]:
    first = True
    for line, text in read_lines(self.path):
      if not text.strip():
        continue
      if first and _is_json(text):
        raise InputError("a file of plain text begins as JSON", path=self.path, line=line, value=text.strip(),
                         fix=f"A name that ends in {', '.join(_JSON)} says that these are JSON lines")  # fmt: skip
      first = False
      yield Passage(str(line), "", text.strip())

  def _json(self) -> Iterator[Passage]:
    for line, value in read_json_lines(self.path):
      title = value.get("title") or ""
      if not isinstance(title, str):
        raise InputError("a title must be a string", path=self.path, line=line, value=title)
      title = unicode_of(title.strip(), "title", self.path, line)
      yield Passage(str(line), title, text_of(value.get("text"), "text", self.path, line))


def _is_json(text: str) -> bool:
  """Whether a first line is an object, or what an array or an object over several lines begins with."""
  text = text.strip()
  if text in ("[", "{") or text.startswith("[{"):
    return True
  try:
    return isinstance(json.loads(text), dict)
  except ValueError:
    return False


class TextFolder(FileSource):
  """The passages of all text and JSONL files of a folder, in the order of their names; no queries.

  A passage's id is its file and line. Files of other names are left alone.
  """

  def records(self, kind: Kind, split: str | None) -> Iterator[Placed]:
    """Yields (path, line, record); there are passages alone."""
    for path in self.files() if kind == "passages" else ():
      for passage in PlainText(path).read():
        yield path, int(passage.id), passage._replace(id=f"{path.name}:{passage.id}")

  def splits(self) -> tuple[str, ...]:
    """None."""
    return ()

  def files(self, split: str | None = None) -> list[pathlib.Path]:
    """The files of the corpus; an InputError where there are none."""
    found = sorted(path for path in self.directory.iterdir() if path.is_file() and path.name.endswith(_TEXT + _JSON))
    if not found:
      raise InputError("no text in this folder", path=self.directory, fix=f"It wants {', '.join(_TEXT + _JSON)}")
    return found
