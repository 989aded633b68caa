"""A query and a passage in one sequence, which a cross-encoder reads: from token stores or lists in memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.batches import Batch, GroupBatches
from dptdr_jax.data.groups import TrainGroups
from dptdr_jax.data.ragged import Ragged
from dptdr_jax.data.store import TokenStore, bucketed
from dptdr_jax.data.tokenizer import PairTemplate, Tokenizer


@dataclasses.dataclass(frozen=True)
class PairFormat:
  """How two texts become one sequence: by the tokenizer's own template for pairs, the query first.

  The token type is 0 throughout, although BERT's pairs have 1 for the second text: RoBERTa has no second type, and
  models that were tuned on single texts (sentence encoders, a backbone after `pretrain`) have not seen it since.

  Attributes:
    template: special ids.
    pad_id: fills up a sequence.
    query_length: limit of a query, counted as if it were alone: with the special tokens before and after it.
    pair_length: limit of a sequence, special tokens included. The passage is cut to it, on the right.
  """

  template: PairTemplate
  pad_id: int
  query_length: int
  pair_length: int

  def __post_init__(self):
    if self.query_room < 1 or self.pair_length <= self.query_room + self.num_special:
      raise InputError(
        f"pairs of {self.pair_length} tokens leave no room for a passage beside queries of {self.query_length}",
        fix="Raise pair_length or lower query_length",
      )

  @classmethod
  def of(cls, tokenizer: Tokenizer, query_length: int, pair_length: int) -> PairFormat:
    """The format of a tokenizer's pairs."""
    return cls(tokenizer.pair_template(), tokenizer.pad_id, query_length, pair_length)

  @property
  def num_special(self) -> int:
    """Special tokens of a pair."""
    return sum(map(len, self.template))

  @property
  def query_room(self) -> int:
    """The most tokens of a query, special tokens not counted."""
    return self.query_length - len(self.template.before) - len(self.template.after)


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Pair i is query `query_rows[i]` with passage `passage_rows[i]`.

  Attributes:
    queries, passages: token ids by row, without special tokens: TokenStores, or Ragged in memory.
    query_rows, passage_rows: int64 [n].
    form: see PairFormat.
  """

  queries: Ragged
  passages: Ragged
  query_rows: np.ndarray
  passage_rows: np.ndarray
  form: PairFormat

  def __post_init__(self):
    most = getattr(self.passages, "max_tokens", None)
    if most is not None and most < self.form.pair_length - self.form.num_special:
      what = f"passages were cut to {most} tokens, which do not fill pairs of {self.form.pair_length}"
      raise InputError(what, fix="Lower pair_length, or raise data.max_stored_tokens")

  def __len__(self) -> int:
    return len(self.query_rows)

  @property
  def limit(self) -> int:
    """The length limit of a pair."""
    return self.form.pair_length

  def lengths(self) -> np.ndarray:
    """Returns int64 [n]: tokens of every pair, special tokens included."""
    return sum(self._counts(slice(None))) + self.form.num_special

  def batch(self, places: np.ndarray | slice, width: int) -> dict[str, np.ndarray]:
    """Gathers pairs.

    Returns:
      tokens int32 [b, width], padded on the right; lengths int32 [b], special tokens included; segments int8
      [b, width]: 1 at tokens of the query, 2 at tokens of the passage, 0 elsewhere.
    """
    queries, passages = self._counts(places)
    tokens = np.full((len(queries), width), self.form.pad_id, np.int32)
    segments = np.zeros((len(queries), width), np.int8)
    columns, end = np.arange(width), np.zeros(len(queries), np.int64)
    texts = (self.queries.heads(self.query_rows[places], queries), queries), (
      self.passages.heads(self.passage_rows[places], passages), passages,
    )  # fmt: skip
    parts = zip(self.form.template, (*texts, (None, None)), strict=True)
    for segment, (special, (flat, counts)) in enumerate(parts, 1):
      tokens[np.arange(len(end))[:, None], end[:, None] + np.arange(len(special))] = special
      end = end + len(special)
      if flat is not None:
        own = (columns >= end[:, None]) & (columns < (end + counts)[:, None])
        tokens[own], segments[own] = flat, segment
        end = end + counts
    return {"tokens": tokens, "lengths": end.astype(np.int32), "segments": segments}

  def _counts(self, places: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens of each query and each passage are read, int64."""
    queries = np.minimum(self.queries.lengths_at(self.query_rows[places]), self.form.query_room)
    room = self.form.pair_length - self.form.num_special - queries
    return queries, np.minimum(self.passages.lengths_at(self.passage_rows[places]), room)


class PairBatches(GroupBatches):
  """`batches[step]` → this host's slice of the global batch of pairs, each query with its positive and negatives.

  The global batch has B queries of G passages each, the positive first. Host p of n gets m = B·G / n pairs, after
  filling. T is the bucket that the global batch needs. A batch has:
    tokens int32 [m, T], lengths int32 [m], segments int8 [m, T]: see Pairs.batch.
    relevant bool [m].
    real bool [m]: False where a row only fills up the devices.

  Args:
    queries, passages: token stores.
    query_rows, groups, options: see GroupBatches. The group size is 2 at least.
    form: how two texts become one sequence.
  """

  def __init__(
    self,
    queries: TokenStore,
    passages: TokenStore,
    query_rows: np.ndarray,
    groups: TrainGroups,
    form: PairFormat,
    **options: Any,
  ):
    super().__init__(query_rows, groups, **options)
    if groups.group_size < 2:
      raise InputError("pairs need a negative for every positive", value=groups.group_size)
    self._queries, self._passages, self._form = queries, passages, form

  def __getitem__(self, step: int) -> Batch:
    rows, size = self.rows(step), self._groups.group_size
    pairs = Pairs(self._queries, self._passages, np.repeat(rows.queries, size), rows.passages.ravel(), self._form)
    width = bucketed(pairs.lengths().max(), self._form.pair_length)
    mine, real = self.own(len(pairs))
    return {**pairs.batch(mine, width), "relevant": mine % size == 0, "real": real}
