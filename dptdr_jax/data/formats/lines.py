"""Text files, gzipped or not, line by line, so that every error can name its line."""

from __future__ import annotations

import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import open_text

_ELEMENT_LIMIT = 1 << 26  # characters of one element of a JSON array; more is a sign of a broken file
_AT_ONCE = 4096  # lines of a JSON array
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
  """Yields (line, object) of a file that is one JSON array of objects; holds some thousand lines at a time."""
  decoder, text, at, line, expected = json.JSONDecoder(), "", 0, 1, "["
  for block in itertools.chain(_blocks(path), [""]):
    text, at = text[at:] + block, 0
    while True:
      start = _SPACES.match(text, at).end()  # type: ignore[union-attr]
      line, at = line + text.count("\n", at, start), start
      if at == len(text):
        break
      if text[at] not in expected:
        what = f"broken JSON (one of {expected!r} expected)"
        raise InputError(what, path=path, line=line, value=text[at : at + 40])
      if text[at] == "]":
        return
      if text[at] != "{":
        at, expected = at + 1, "{]" if text[at] == "[" else "{"
        continue
      try:
        value, end = decoder.raw_decode(text, at)
      except (ValueError, RecursionError) as error:
        is_cut_off = _is_cut_off(error, text)
        if is_cut_off and block and len(text) - at < _ELEMENT_LIMIT:
          break
        if is_cut_off and not block:
          raise InputError("broken JSON (the file ends within an object)", path=path, line=line) from error
        place = getattr(error, "pos", at)
        line, shown = line + text.count("\n", at, place), text[max(at, place - 20) : place + 20]
        raise InputError(f"broken JSON ({_reason(error)})", path=path, line=line, value=shown) from error
      yield line, value
      line, at, expected = line + text.count("\n", at, end), end, ",]"
  raise InputError(f"broken JSON (one of {expected!r} expected)", path=path, line=line, value="")


def _blocks(path: str | pathlib.Path) -> Iterator[str]:
  lines = read_lines(path)
  while some := list(itertools.islice(lines, _AT_ONCE)):
    yield "".join(text if line == 1 else f"\n{text}" for line, text in some)


def _is_cut_off(error: Exception, text: str) -> bool:
  """Whether JSON only lacks what follows: it is broken at the very end, or in a string that never closes."""
  if not isinstance(error, json.JSONDecodeError):
    return False
  return error.msg.startswith("Unterminated string") or error.pos >= len(text) - 16


def _reason(error: Exception) -> str:
  return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


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
