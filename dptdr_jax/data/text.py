"""The text that stands for a passage or a query: templates, title and separator. Pure functions.

A template is a Python format string. A passage's knows {title}, {separator} and {text}; a query's knows {text}.
A literal brace is doubled. Where a title is empty, {title} and {separator} are both empty. So E5 is
`query: {text}` with `passage: {title}{separator}{text}`, BGE is `Represent this sentence for searching relevant
passages: {text}` with the default, and the original's TSV path is the default with the tokenizer's separator token.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import Any

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.records import Passage, Query

GivenPassage = str | tuple[str | None, str] | Passage | dict[str, Any]  # what users may give for a passage

PASSAGE_TEMPLATE = "{title}{separator}{text}"
QUERY_TEMPLATE = "{text}"


def passage_text(passage: Passage, separator: str = " ", template: str = PASSAGE_TEMPLATE) -> str:
  """Returns the text to tokenize for a passage; without a title there is no separator either."""
  title = passage.title
  return template.format(title=title, separator=separator if title else "", text=passage.text)


def query_text(query: Query, template: str = QUERY_TEMPLATE) -> str:
  """Returns the text to tokenize for a query."""
  return template.format(text=query.text)


def passage_texts(passages: Iterable[GivenPassage], separator: str, template: str) -> list[str]:
  """Returns the texts to tokenize for passages as users give them.

  Args:
    passages: each its text, (title, text), a Passage, or {"text": …} with a "title" or none, as BEIR's lines have it;
      a title may be None.

  Raises:
    InputError: something else, or an empty one, named by its place; or one passage that stands where a list of them is
      wanted.
  """
  alone = isinstance(passages, tuple) and any(isinstance(part, str) for part in passages)
  _check_list(passages, "passage", alone)
  return [passage_text(_passage(item, place), separator, template) for place, item in enumerate(passages)]


def query_texts(queries: Iterable[str], template: str) -> list[str]:
  """Returns the texts to tokenize for queries as users give them.

  Raises:
    InputError: what is no string, or an empty one, named by its place; or one query that stands where a list of them is
      wanted.
  """
  _check_list(queries, "query")
  texts = []
  for place, item in enumerate(queries):
    if not isinstance(item, str):
      raise InputError(f"query {place} ({type(item).__name__}) is no text", value=item)
    if not item.strip():
      raise InputError(f"query {place} is empty", value=item)
    texts.append(query_text(Query("", item), template))
  return texts


def _check_list(items: Any, what: str, alone: bool = False) -> None:
  """Raises an InputError for one item in place of a list: its letters or parts would each pass for an item."""
  if alone or isinstance(items, str | bytes | dict) or not isinstance(items, Iterable):
    raise InputError(f"one {what} where a list is wanted", value=items, fix="Put it into a list")


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
    what = f"passage {place} ({type(item).__name__}) has no text, or a title that is none"
    raise InputError(what, value=item, fix=fix)
  if not f"{title or ''}{body}".strip():
    raise InputError(f"passage {place} is empty", value=item)
  return Passage("", title or "", body)


def check_templates(query_template: str, passage_template: str) -> None:
  """Raises an InputError for a template that has an unknown field, a stray brace, or no {text}."""
  for template, known in ((query_template, {"text"}), (passage_template, {"title", "separator", "text"})):
    try:
      fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
      raise InputError(f"broken template ({error})", value=template, fix="Double a literal brace") from error
    if not fields <= known or "text" not in fields:
      wanted = ", ".join(f"{{{name}}}" for name in sorted(known))
      raise InputError(f"a template must have {{text}} and no field but {wanted}", value=template)
    try:
      template.format(**dict.fromkeys(known, ""))
    except (ValueError, LookupError, AttributeError) as error:  # a conversion or a format that text does not have
      raise InputError(f"broken template ({error})", value=template, fix="Write a field's name alone") from error
