"""Records of a dataset: passages, queries, judgements, negatives."""

from __future__ import annotations

from typing import NamedTuple


class Passage(NamedTuple):
  """One passage of the corpus.

  Attributes:
    id: as the corpus names it, unique.
    title: of the page that it is part of; "" if there is none.
    text: the passage; empty only with data.empty_text=keep.
  """

  id: str
  title: str
  text: str


class Query(NamedTuple):
  """One query.

  Attributes:
    id: as the dataset names it, unique within a split.
    text: the question; never empty.
    answers: strings of which a relevant passage contains one, if retrieval is measured by answers (Natural Questions).
  """

  id: str
  text: str
  answers: tuple[str, ...] = ()


class Judgement(NamedTuple):
  """The grade of a passage for a query: above 0 relevant, 0 or less not."""

  query_id: str
  passage_id: str
  grade: int


class Negatives(NamedTuple):
  """Hard negatives of a query that come with a dataset, in its order."""

  query_id: str
  passage_ids: tuple[str, ...]
