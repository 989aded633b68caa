"""Exports a pool for other trainers: the original's JSONL, and sentence-transformers' n-tuples.

Both stream: the texts of some hundred queries are in memory at a time.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from dptdr_jax.core import progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path, atomic_path
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.retrieval.texts import Texts

Passage = tuple[str, str]  # title, text

_AT_ONCE = 256  # queries whose passages are read together: one by one takes ten times as long


class Example(NamedTuple):
  """One query with its texts: positives in the order of their judgements, negatives best first."""

  query: str
  positives: list[Passage]
  negatives: list[Passage]


def training_examples(
  pool: Pool, queries: Iterable[str], positives: Callable[[int], np.ndarray], texts: Texts
) -> Iterator[Example]:
  """Yields the examples of a pool, by query row.

  Args:
    queries: the texts of the pool's queries, by row.
    positives: positives(query row) → passage rows, none for a query that is not trained on.
    texts: see Texts; a negative with neither title nor text is left out.
  """
  rows = zip(range(len(pool)), queries, strict=True)
  with progress.bar("export", len(pool), "query") as shown:
    while block := list(itertools.islice(rows, _AT_ONCE)):
      wanted = [(np.asarray(positives(query), np.int64), pool.candidates(query)) for query, _ in block]
      read = iter(texts(np.concatenate([part for pair in wanted for part in pair]).astype(np.int64)))
      for (_, text), parts in zip(block, wanted, strict=True):
        relevant, others = (list(itertools.islice(read, len(part))) for part in parts)
        yield Example(text, relevant, [passage for passage in others if any(passage)])
      shown.advance(len(block))


def write_original(path: Path, examples: Iterable[Example], *, separator: str = " ") -> dict[str, int]:
  """Writes the original's training JSONL, atomically: {"query", "positives": [passage, …], "negatives": [passage, …]}.

  A passage is one string, the input of the original's tokenizer. A query without a positive or without a negative is
  left out: the original would draw from an empty list and fail.

  Returns:
    Counts: "queries" written, those "without a positive" and "without a negative".
  """
  counts = {"queries": 0, "without a positive": 0, "without a negative": 0}
  with atomic_path(path) as partial, open(partial, "w", encoding="utf-8") as stream:
    for query, positives, negatives in examples:
      if not positives or not negatives:
        counts["without a negative" if positives else "without a positive"] += 1
        continue
      counts["queries"] += 1
      line = {"query": query, "positives": _joined(positives, separator), "negatives": _joined(negatives, separator)}
      stream.write(json.dumps(line, ensure_ascii=False) + "\n")
  return counts


def _joined(passages: list[Passage], separator: str) -> list[str]:
  return [f"{title}{separator}{text}" if title else text for title, text in passages]


def write_ntuples(
  path: Path, examples: Iterable[Example], num_negatives: int, *, separator: str = " "
) -> dict[str, int]:
  """Writes sentence-transformers' n-tuples as JSONL, atomically: {"anchor", "positive", "negative_1", …, "negative_n"}.

  One line for each (query, positive), with the query's first n negatives. Its losses need the same columns in every
  line, so a query with fewer than n negatives is left out, as in sentence-transformers' own mining.

  Returns:
    Counts: "lines" and "queries" written, queries "without a positive" and with "too few negatives".

  Raises:
    InputError: no query has n negatives and a positive.
  """
  if num_negatives < 1:
    raise InputError("n-tuples have at least 1 negative", value=num_negatives)
  counts = {"lines": 0, "queries": 0, "without a positive": 0, "too few negatives": 0}
  with atomic_path(path) as partial, open(partial, "w", encoding="utf-8") as stream:
    for query, positives, negatives in examples:
      if not positives:
        counts["without a positive"] += 1
        continue
      if len(negatives) < num_negatives:
        counts["too few negatives"] += 1
        continue
      counts["queries"] += 1
      joined = _joined(negatives[:num_negatives], separator)
      columns = {f"negative_{number}": text for number, text in enumerate(joined, 1)}
      for positive in _joined(positives, separator):
        line = {"anchor": query, "positive": positive, **columns}
        stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        counts["lines"] += 1
    if not counts["lines"]:
      raise InputError("no query has a positive and this many negatives", value=num_negatives)
  return counts
