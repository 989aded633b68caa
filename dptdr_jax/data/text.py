"""The text of a passage or a query: templates, title and separator. Pure functions.

A template is a Python format string: of a passage with the fields {title}, {separator} and {text}, of a query with
{text}. A literal brace is doubled. If a title is empty, {title} and {separator} are both empty. E5 is `query: {text}`
with `passage: {title}{separator}{text}`; BGE is `Represent this sentence for searching relevant passages: {text}` with
the default; the original's TSV files are the default with the tokenizer's separator token.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import Any

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.records import Passage, Query

GivenPassage = str | tuple[str | None, str] | Passage | dict[str, Any]  # a passage as a user writes it

PASSAGE_TEMPLATE = "{title}{separator}{text}"
QUERY_TEMPLATE = "{text}"


def passage_text(passage: Passage, separator: str = " ", template: str = PASSAGE_TEMPLATE) -> str:
  """Returns the text of a passage to tokenise; without a title there is no separator."""
  title = passage.title
  return template.format(title=title, separator=separator if title else "", text=passage.text)


def query_text(query: Query, template: str = QUERY_TEMPLATE) -> str:
  """Returns the text of a query to tokenise."""
  return template.format(text=query.text)


def passage_texts(passages: Iterable[GivenPassage], separator: str, template: str) -> list[str]:
  """Returns the texts to tokenise of passages from a user.

  Args:
    passages: each a text, (title, text), a Passage, or {"text": …, "title": …} as in BEIR's lines; a title may be None
      or missing.

  Raises:
    InputError: an item, named by its place, is something else, empty or not Unicode; or `passages` is one passage.
  """
  is_one = isinstance(passages, tuple) and any(isinstance(part, str) for part in passages)
  _check_list(passages, "passages", is_one)
  return [passage_text(_passage(item, place), separator, template) for place, item in enumerate(passages)]


def query_texts(queries: Iterable[str], template: str) -> list[str]:
  """Returns the texts to tokenise of queries from a user.

  Raises:
    InputError: an item, named by its place, is no string, empty or not Unicode; or `queries` is one query.
  """
  _check_list(queries, "queries")
  texts = []
  for place, item in enumerate(queries):
    if not isinstance(item, str):
      raise InputError(f"query {place} ({type(item).__name__}) is not a text", value=item)
    _check_text(item, f"query {place}", item)
    texts.append(query_text(Query("", item), template))
  return texts


def _check_list(items: Any, what: str, is_one: bool = False) -> None:
  """Raises an InputError for one item instead of a list: its letters or parts would count as items."""
  if is_one or isinstance(items, str | bytes | dict) or not isinstance(items, Iterable):
    raise InputError(f"a list of {what} is expected, not one", value=items, fix="Put it into a list")


def _passage(item: GivenPassage, place: int) -> Passage:
  title, body = None, item
  if isinstance(item, Passage):
    title, body = item.title, item.text
  elif isinstance(item, dict):
    title, body = item.get("title"), item.get("text")
  elif isinstance(item, tuple | list) and len(item) == 2:
    title, body = item
  if not isinstance(body, str) or not isinstance(title, str | None):
    fix = "Give its text, (title, text), a Passage or {'title': …, 'text': …}"
    what = f"passage {place} ({type(item).__name__}) has no text, or a title that is not a text"
    raise InputError(what, value=item, fix=fix)
  _check_text(f"{title or ''}{body}", f"passage {place}", item)
  return Passage("", title or "", body)


def _check_text(text: str, what: str, item: object) -> None:
  if not text.strip():
    raise InputError(f"{what} is empty", value=item)
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise InputError(f"{what} has half a surrogate pair", value=item) from error


def check_templates(query_template: str, passage_template: str) -> None:
  """Raises an InputError for a template with an unknown field, a stray brace, a format, or no {text}."""
  for template, known in ((query_template, {"text"}), (passage_template, {"title", "separator", "text"})):
    try:
      fields = [field for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
      raise InputError(f"broken template ({error})", value=template, fix="Double a literal brace") from error
    names = {name for _, name, _, _ in fields}
    if not names <= known or "text" not in names:
      expected = ", ".join(f"{{{name}}}" for name in sorted(known))
      raise InputError(f"a template has {{text}} and no field but {expected}", value=template)
    if any(
      form or conversion for _, _, form, conversion in fields
    ):  # one format of 20 characters can ask for gigabytes
      raise InputError("a template's field has a format", value=template, fix="Write only the field's name")
