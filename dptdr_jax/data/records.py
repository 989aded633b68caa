"""What a source of text consists of: passages, queries, judgements, negatives."""

from __future__ import annotations

from typing import NamedTuple


class Passage(NamedTuple):
  """One passage of the corpus.

  Attributes:
    id: the corpus's own name for it, unique.
    title: the title of the page that it comes from; "" where there is none.
    text: the passage; empty only where those of a BEIR folder are kept (data.empty_text).
  """

  id: str
  title: str
  text: str


class Query(NamedTuple):
  """One query.

  Attributes:
    id: the source's own name for it, unique within a split.
    text: the question; never empty.
    answers: strings of which a passage must contain one, where retrieval is measured by answers (Natural Questions).
  """

  id: str
  text: str
  answers: tuple[str, ...] = ()


class Judgement(NamedTuple):
  """That `passage_id` was judged for `query_id` with `grade`: above 0 relevant, 0 or less not."""

  query_id: str
  passage_id: str
  grade: int


class Negatives(NamedTuple):
  """Passages that a source gives as hard negatives of a query, in the source's order."""

  query_id: str
  passage_ids: tuple[str, ...]
