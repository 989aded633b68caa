"""Text files, gzipped or not, line by line, so that every error can name its line."""

from __future__ import annotations

import codecs
import json
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import open_text

_ELEMENT_LIMIT = 1 << 26  # characters of one element of a JSON array; more is a sign of a broken file
_SPACES = re.compile(r"[ \t\r\n]*")


def read_lines(path: str | pathlib.Path) -> Iterator[tuple[int, str]]:
  """Yields (line from 1, text without its end). Only "\\n" ends a line; a byte order mark is skipped; bytes that are
  not UTF-8 are an InputError."""
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
  """Yields (line, object) of a JSONL file; blank lines are skipped."""
  for line, text in read_lines(path):
    if not text.strip():
      continue
    try:
      value = json.loads(text)
    except (ValueError, RecursionError) as error:  # besides broken JSON: a number too long, lists too deep
      raise InputError(f"broken JSON ({_reason(error)})", path=path, line=line, value=text) from error
    if not isinstance(value, dict):
      raise InputError("a line must be a JSON object", path=path, line=line, value=text)
    yield line, value


def read_columns(path: str | pathlib.Path, count: int, separator: str | None = "\t") -> Iterator[tuple[int, list[str]]]:
  """Yields (line, fields); a line whose number of fields is not `count` is an InputError, a blank one is skipped."""
  for line, text in read_lines(path):
    fields = text.split(separator)
    if len(fields) != count:
      if not text.strip():
        continue
      raise InputError(f"{count} columns expected, {len(fields)} found", path=path, line=line, value=text)
    yield line, fields


def read_json_array(path: str | pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line, object) of a file that is one JSON array of objects; holds one object and one block at a time."""
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
  """A window onto a text that arrives in blocks; counts lines."""

  def __init__(self, path: str | pathlib.Path):
    self.path, self.text, self.at, self.line = path, "", 0, 1
    self._decoder = json.JSONDecoder()

  def add(self, block: str) -> None:
    self.text, self.at = self.text[self.at :] + block, 0

  def take(self, count: int) -> None:
    self.line += self.text.count("\n", self.at, self.at + count)
    self.at += count

  def skip_spaces(self) -> bool:
    """Goes to the next character that is not white space; False if the text so far has none."""
    end = _SPACES.match(self.text, self.at).end()  # type: ignore[union-attr]
    self.take(end - self.at)
    return self.at < len(self.text)

  def peek(self) -> str:
    return self.text[self.at : self.at + 1]

  def shown(self) -> str:
    return self.text[self.at : self.at + 40]

  def take_object(self) -> dict[str, Any] | None:
    """Decodes the object that starts here; None if it continues in the next block."""
    try:
      value, end = self._decoder.raw_decode(self.text, self.at)
    except json.JSONDecodeError as error:
      # Cut off by the block's end, or broken? A cut is at the very end, or in a string that never closes.
      cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16
      if cut_off and len(self.text) - self.at < _ELEMENT_LIMIT:
        return None
      line = self.line + self.text.count("\n", self.at, error.pos)
      value = self.text[max(self.at, error.pos - 20) : error.pos + 20]
      raise InputError(f"broken JSON ({error.msg})", path=self.path, line=line, value=value) from error
    except (ValueError, RecursionError) as error:
      raise InputError(f"broken JSON ({_reason(error)})", path=self.path, line=self.line, value=self.shown()) from error
    self.take(end - self.at)
    return value


def _reason(error: ValueError | RecursionError) -> str:
  return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _blocks(path: str | pathlib.Path, size: int = 1 << 22) -> Iterator[str]:
  """Yields a UTF-8 text file in blocks of about `size` bytes."""
  decoder = codecs.getincrementaldecoder("utf-8-sig")()
  line, raw = 1, b""
  with open_text(path) as stream:
    try:
      while raw := stream.buffer.read(size):
        if text := decoder.decode(raw):  # a block may end within a character
          yield text
        line += raw.count(b"\n")
      decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
      line += error.object.count(b"\n", 0, error.start)
      raise InputError("not UTF-8", path=path, line=line, value=error.object[error.start : error.start + 8]) from error
    except (EOFError, zlib.error, OSError) as error:
      raise InputError(f"broken gzip ({error})", path=path, line=line, fix="Download or pack it again") from error


def text_of(value: object, what: str, path: pathlib.Path, line: int) -> str:
  """Returns `value` if it is a string that is not blank; else an InputError that names `what`."""
  if not isinstance(value, str):
    raise InputError(f"{what} must be a string", path=path, line=line, value=value)
  if not value.strip():
    raise InputError(f"empty {what}", path=path, line=line, fix="Give it a text or remove the line")
  return unicode_of(value, what, path, line)


def unicode_of(value: str, what: str, path: pathlib.Path, line: int) -> str:
  """Returns `value`; an InputError if it has half a surrogate pair, which JSON can escape and UTF-8 cannot encode."""
  if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
    raise InputError(f"{what} has half a surrogate pair", path=path, line=line, value=value)
  return value


def id_of(value: object, what: str, path: pathlib.Path, line: int) -> str:
  """Returns an id as a string; a number becomes its digits, white space is an InputError."""
  text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
  text = unicode_of(text_of(text, what, path, line), what, path, line)
  if len(text.split()) != 1 or text != text.strip():
    raise InputError(f"{what} has white space, which separates columns in run files", path=path, line=line, value=value)
  return text


def grade_of(value: str, path: pathlib.Path, line: int) -> int:
  """Returns a judgement's grade, a whole number of 32 bits."""
  try:
    grade = int(value)
  except ValueError:
    raise InputError("a grade must be a whole number", path=path, line=line, value=value) from None
  if not -(2**31) <= grade < 2**31:
    raise InputError("a grade must have 32 bits", path=path, line=line, value=value)
  return grade


def title_of(value: dict[str, Any], path: pathlib.Path, line: int) -> str:
  """Returns the 'title' of a JSON object, stripped; '' if it is missing or null."""
  title = value.get("title") or ""
  if not isinstance(title, str):
    raise InputError("a title must be a string", path=path, line=line, value=title)
  return unicode_of(title.strip(), "title", path, line)
