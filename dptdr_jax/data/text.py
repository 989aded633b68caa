"""The text that stands for a passage or a query: templates, title and separator. Pure functions.

A template is a Python format string. A passage's knows {title}, {separator} and {text}; a query's knows {text}.
A literal brace is doubled. Where a title is empty, {title} and {separator} are both empty. So E5 is
`query: {text}` with `passage: {title}{separator}{text}`, BGE is `Represent this sentence for searching relevant
passages: {text}` with the default, and the original's TSV path is the default with the tokenizer's separator token.
"""

from __future__ import annotations

import string

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.records import Passage, Query

PASSAGE_TEMPLATE = "{title}{separator}{text}"
QUERY_TEMPLATE = "{text}"


def passage_text(passage: Passage, separator: str = " ", template: str = PASSAGE_TEMPLATE) -> str:
  """Returns the text to tokenize for a passage; without a title there is no separator either."""
  title = passage.title
  return template.format(title=title, separator=separator if title else "", text=passage.text)


def titled_text(item: str | tuple[str, str] | Passage, separator: str, template: str) -> str:
  """Returns the same for a passage as users give it: its text, (title, text), or a Passage."""
  title, body = ("", item) if isinstance(item, str) else item[-2:]
  return passage_text(Passage("", title, body), separator, template)


def query_text(query: Query, template: str = QUERY_TEMPLATE) -> str:
  """Returns the text to tokenize for a query."""
  return template.format(text=query.text)


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
