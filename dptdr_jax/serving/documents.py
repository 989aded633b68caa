"""Documents as clients send them: checked records, from JSON or JSON lines."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from dptdr_jax.core.errors import InputError

MAX_ID = 512  # characters
MAX_TITLE = 2_000
MAX_TEXT = 200_000
MAX_FIELDS = 64_000  # bytes of JSON
MAX_DEPTH = 32  # of a field's value
MAX_LINE = 1_000_000  # bytes of a JSON line
_RESERVED = ("score", "vector")  # keys of a hit that a field would hide
_FIELD = re.compile(r"[\w.-]{1,64}")
_SCALARS = (str, int, float, bool)


@dataclasses.dataclass(frozen=True)
class Document:
  """A document: what is encoded is its title and text; fields are shown, and filtered by."""

  id: str
  text: str
  title: str = ""
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(cls, given: Any, where: str = "document") -> Document:
    """Checks one document.

    Args:
      given: {"id", "text", "title"?, other fields…}; "_id" may stand for "id", and a whole number is a valid id.
      where: names it in errors.

    Raises:
      InputError: something is missing, empty, too long, or not Unicode.
    """
    if not isinstance(given, dict):
      raise InputError(f"{where} is not an object", value=given)
    fields = dict(given)
    name = fields.pop("id", None)
    if name is None:
      name = fields.pop("_id", None)
    if isinstance(name, int) and not isinstance(name, bool):
      name = str(name)
    title = fields.pop("title", None)
    title = "" if title is None else title
    _check(name, f"{where}: id", MAX_ID)
    _check(fields.get("text"), f"{where}: text", MAX_TEXT)
    _check(title, f"{where}: title", MAX_TITLE, empty=True)
    if not name.isprintable():
      raise InputError(f"{where}: id has a control character", value=name)
    text = fields.pop("text")
    _check_fields(fields, where)
    return cls(name, text, title, fields)

  def searched(self) -> str:
    """What BM25 reads: title and text joined by a space, as in a run's index."""
    return f"{self.title} {self.text}".strip()

  def pairs(self) -> list[tuple[str, str]]:
    """Names and values that a filter can ask for, the title's too: texts of up to 256 characters, numbers, booleans."""
    return [
      (name, filter_value(value))
      for name, value in {**self.fields, "title": self.title}.items()
      if isinstance(value, _SCALARS) and not (isinstance(value, str) and len(value) > 256)
    ]


def filter_value(value: Any) -> str:
  """How a value of a field is compared: as JSON, so that 1 and "1" differ; 1.0 equals 1."""
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  return json.dumps(value, ensure_ascii=False)


def check_filter(given: dict[str, Any] | None) -> dict[str, str]:
  """A filter {field: value, …}, all of which must be equal, in the form that is compared.

  Raises:
    InputError: a value that is no text, number or boolean.
  """
  for name, value in (given or {}).items():
    if not isinstance(value, _SCALARS):
      raise InputError(f"filter: {name} must be a text, a number or a boolean", value=value)
    _check(name, "filter: a name", 64)
    if isinstance(value, str):
      _check(value, f"filter: {name}", 256, empty=True)
  return {name: filter_value(value) for name, value in (given or {}).items()}


def parse(content: bytes, where: str) -> Any:
  """JSON of a request.

  Raises:
    InputError: broken JSON, nested too deep, not UTF-8, NaN or infinity.
  """
  try:
    return json.loads(content.decode(), parse_constant=_refuse_constant)
  except json.JSONDecodeError as error:
    raise InputError(f"{where}: broken JSON ({error.msg}, character {error.pos})") from error
  except UnicodeDecodeError as error:
    raise InputError(f"{where}: not UTF-8 (byte {error.start})") from error
  except RecursionError as error:
    raise InputError(f"{where}: nested too deep") from error
  except ValueError as error:  # NaN, or a number of thousands of digits
    raise InputError(f"{where}: {error}") from error


def from_json(given: Any) -> list[Document]:
  """The documents of {"documents": […]}.

  Raises:
    InputError: another form, or a document that is not valid; its place from 0 is named.
  """
  listed = given.get("documents") if isinstance(given, dict) else None
  if not isinstance(listed, list):
    raise InputError('expected {"documents": [{"id": …, "text": …}, …]}')
  return [Document.of(one, f"documents[{place}]") for place, one in enumerate(listed)]


def from_line(line: bytes, number: int) -> Document:
  """The document of a JSON line.

  Raises:
    InputError: names the line, from 1.
  """
  return Document.of(parse(line, f"line {number}"), f"line {number}")


def _refuse_constant(name: str) -> None:
  raise ValueError(f"{name} is not JSON")


def _check(value: Any, what: str, most: int, empty: bool = False) -> None:
  if not isinstance(value, str):
    raise InputError(f"{what} must be a text", value=value)
  if not empty and not value.strip():
    raise InputError(f"{what} is empty")
  if len(value) > most:
    raise InputError(f"{what} has {len(value)} characters; at most {most} are accepted", fix="Split it")
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise InputError(f"{what} has half a surrogate pair") from error


def _check_fields(fields: dict[str, Any], where: str) -> None:
  for name in fields:
    if not _FIELD.fullmatch(name) or name in _RESERVED:
      raise InputError(f"{where}: a field cannot have this name", value=name, fix="Use letters, digits, _, . and -")
    if _depth(fields[name]) > MAX_DEPTH:
      raise InputError(f"{where}: a field is nested deeper than {MAX_DEPTH}", value=name)
  try:
    size = len(json.dumps(fields, ensure_ascii=False, allow_nan=False).encode())
  except UnicodeEncodeError as error:
    raise InputError(f"{where}: a field has half a surrogate pair") from error
  except ValueError as error:
    raise InputError(f"{where}: a field has a number that is not a finite number") from error
  if size > MAX_FIELDS:
    raise InputError(f"{where}: its fields have {size} bytes; at most {MAX_FIELDS} are accepted")


def _depth(value: Any) -> int:
  """How deep lists and objects are nested; stops counting where it is too deep."""
  depth, level = 0, [value]
  while level and depth <= MAX_DEPTH:
    inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
    level = [part for one in inner for part in one]
    depth += 1
  return depth
