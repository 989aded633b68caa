"""Reading text files line by line so that every complaint can name its line; gzip everywhere."""

from __future__ import annotations

import codecs
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any, Literal

from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import open_text
from dptdr_jax.data.records import Judgement, Negatives, Passage, Query

Kind = Literal["passages", "queries", "judgements", "negatives"]
Record = Passage | Query | Judgement | Negatives
Placed = tuple[pathlib.Path, int, Record]

_ELEMENT_LIMIT = 1 << 26  # characters of one element of a JSON array; more is a sign of a broken file
_SPACES = re.compile(r"[ \t\r\n]*")


class FileSource:
  """A source over files in one directory. A reader implements `records`, `splits` and `files`; the rest follows.

  Attributes:
    directory: where the files are.
    skipped: {split: count} of queries that were left out because nothing was judged for them; filled while reading.
  """

  def __init__(self, directory: str | pathlib.Path):
    self.directory = pathlib.Path(directory)
    self.skipped: dict[str, int] = {}
    if not self.directory.is_dir():
      raise InputError("no such directory", path=self.directory)

  def records(self, kind: Kind, split: str | None) -> Iterator[Placed]:
    """Yields (path, line, record) of one kind; split is None for passages."""
    raise NotImplementedError

  def passages(self) -> Iterator[Passage]:
    """Yields the corpus in file order."""
    return self._bare("passages", None)

  def queries(self, split: str) -> Iterator[Query]:
    """Yields the queries of a split in file order."""
    return self._bare("queries", split)

  def judgements(self, split: str) -> Iterator[Judgement]:
    """Yields the judgements of a split in file order."""
    return self._bare("judgements", split)

  def negatives(self, split: str) -> Iterator[Negatives]:
    """Yields the hard negatives that come with the data; a query may come more than once."""
    return self._bare("negatives", split)

  def locate(self, kind: Kind, index: int, split: str | None = None) -> tuple[pathlib.Path, int]:
    """Returns (file, line) of the record at `index`, by reading again: for error messages."""
    path, line, _ = next(itertools.islice(self.records(kind, split), index, None))
    return path, line

  def _bare(self, kind: Kind, split: str | None) -> Iterator[Any]:
    for _, _, record in self.records(kind, split):
      yield record


def read_lines(path: str | pathlib.Path) -> Iterator[tuple[int, str]]:
  """Yields (line from 1, text without its end); only "\\n" ends a line, and a byte order mark is none of it. Bytes
  that are not UTF-8 are an InputError."""
  line = 0
  with open_text(path) as stream:
    try:
      for line, raw in enumerate(stream.buffer, start=1):
        yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
      raise InputError("not UTF-8", path=path, line=line, value=error.object[error.start : error.start + 8]) from error
    except (EOFError, zlib.error, OSError) as error:
      raise InputError(f"broken gzip ({error})", path=path, line=line + 1, fix="Download or pack it again") from error


def read_json_lines(path: str | pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line, object) of a JSONL file; blank lines are passed over."""
  for line, text in read_lines(path):
    if not text.strip():
      continue
    try:
      value = json.loads(text)
    except json.JSONDecodeError as error:
      raise InputError(f"broken JSON ({error.msg})", path=path, line=line, value=text) from error
    if not isinstance(value, dict):
      raise InputError("a line must be a JSON object", path=path, line=line, value=text)
    yield line, value


def read_columns(path: str | pathlib.Path, count: int, separator: str | None = "\t") -> Iterator[tuple[int, list[str]]]:
  """Yields (line, fields); a line of another number of fields than `count` is an InputError."""
  for line, text in read_lines(path):
    fields = text.split(separator)
    if len(fields) != count:
      if not text.strip():
        continue
      raise InputError(f"{count} columns expected, {len(fields)} found", path=path, line=line, value=text)
    yield line, fields


def read_json_array(path: str | pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line, object) of a file that is one JSON array of objects, without ever holding the file.

  Any number of gigabytes passes in a few megabytes: in memory are the element at hand and one block more.
  """
  blocks, buffer = _blocks(path), _Buffer(path)
  expected = "["
  while True:
    while not buffer.skip_spaces() and (block := next(blocks, "")):
      buffer.add(block)
    mark = buffer.peek()
    if not mark or mark not in expected:
      raise InputError(f"broken JSON (one of {expected!r} expected)", path=path, line=buffer.line, value=buffer.shown())
    if mark == "]":
      return
    if mark == "{":
      line = buffer.line
      while (value := buffer.take_object()) is None:
        block = next(blocks, "")
        if not block:
          raise InputError("broken JSON (the file ends within an object)", path=path, line=line)
        buffer.add(block)
      yield line, value
      expected = ",]"
    else:
      buffer.take(1)
      expected = "{]" if mark == "[" else "{"


class _Buffer:
  """A window onto a text that arrives in blocks, which knows its line."""

  def __init__(self, path: str | pathlib.Path):
    self.path, self.text, self.at, self.line = path, "", 0, 1
    self._decoder = json.JSONDecoder()

  def add(self, block: str) -> None:
    self.text, self.at = self.text[self.at :] + block, 0

  def take(self, count: int) -> None:
    self.line += self.text.count("\n", self.at, self.at + count)
    self.at += count

  def skip_spaces(self) -> bool:
    """Goes to the next character that is no white space; False where the text held so far has none."""
    end = _SPACES.match(self.text, self.at).end()  # type: ignore[union-attr]
    self.take(end - self.at)
    return self.at < len(self.text)

  def peek(self) -> str:
    return self.text[self.at : self.at + 1]

  def shown(self) -> str:
    return self.text[self.at : self.at + 40]

  def take_object(self) -> dict[str, Any] | None:
    """Decodes the object that starts here; None where it goes on in the next block."""
    try:
      value, end = self._decoder.raw_decode(self.text, self.at)
    except json.JSONDecodeError as error:
      # Cut off by the block's end, or broken? A cut shows at the very end, or as a string that never closes.
      cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16
      if cut_off and len(self.text) - self.at < _ELEMENT_LIMIT:
        return None
      line = self.line + self.text.count("\n", self.at, error.pos)
      value = self.text[max(self.at, error.pos - 20) : error.pos + 20]
      raise InputError(f"broken JSON ({error.msg})", path=self.path, line=line, value=value) from error
    self.take(end - self.at)
    return value


def _blocks(path: str | pathlib.Path, size: int = 1 << 22) -> Iterator[str]:
  """Yields a UTF-8 text file in blocks of about `size` bytes."""
  decoder = codecs.getincrementaldecoder("utf-8-sig")()
  line, raw = 1, b""
  with open_text(path) as stream:
    try:
      while raw := stream.buffer.read(size):
        if text := decoder.decode(raw):  # a block may end within a character, or be one's beginning alone
          yield text
        line += raw.count(b"\n")
      decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
      line += error.object.count(b"\n", 0, error.start)
      raise InputError("not UTF-8", path=path, line=line, value=error.object[error.start : error.start + 8]) from error
    except (EOFError, zlib.error, OSError) as error:
      raise InputError(f"broken gzip ({error})", path=path, line=line, fix="Download or pack it again") from error


def text_of(value: object, what: str, path: pathlib.Path, line: int) -> str:
  """Returns `value` when it is a string with something in it; otherwise an InputError that names `what`."""
  if not isinstance(value, str):
    raise InputError(f"{what} must be a string", path=path, line=line, value=value)
  if not value.strip():
    raise InputError(f"empty {what}", path=path, line=line, fix="Give it a text or remove the line")
  return unicode_of(value, what, path, line)


def unicode_of(value: str, what: str, path: pathlib.Path, line: int) -> str:
  """Returns `value` unless it has half a surrogate pair, which JSON can escape and UTF-8 cannot hold."""
  if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
    raise InputError(f"{what} has half a surrogate pair", path=path, line=line, value=value)
  return value


def id_of(value: object, what: str, path: pathlib.Path, line: int) -> str:
  """Returns an id as a string; numbers are taken as they are written, white space within is an InputError."""
  text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
  text = unicode_of(text_of(text, what, path, line), what, path, line)
  if len(text.split()) != 1 or text != text.strip():
    raise InputError(f"{what} has white space, which run files cannot hold", path=path, line=line, value=value)
  return text


def grade_of(value: str, path: pathlib.Path, line: int) -> int:
  """Returns a judgement's grade, a whole number."""
  try:
    return int(value)
  except ValueError:
    raise InputError("a grade must be a whole number", path=path, line=line, value=value) from None
