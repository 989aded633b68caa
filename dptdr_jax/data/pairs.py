"""A query and a passage in one sequence: what a cross-encoder reads, from token stores or from lists in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from dptdr_jax.core.errors import InputError
from dptdr_jax.data import ragged
from dptdr_jax.data.batches import Batch, GroupBatches
from dptdr_jax.data.groups import TrainGroups
from dptdr_jax.data.tokenizer import PairTemplate, Tokenizer


class Texts(Protocol):
  """Tokenised texts by row, without special tokens: a TokenStore, or TokenLists."""

  def lengths_at(self, rows: np.ndarray) -> np.ndarray:
    """Returns int64 [n]."""
    ...

  def heads(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the first `counts` tokens of each row, one row's behind the other's."""
    ...


class TokenLists:
  """Texts in memory, out of lists of token ids."""

  def __init__(self, lists: Sequence[Sequence[int]]):
    self._offsets = ragged.offsets_of(np.array([len(ids) for ids in lists], np.int64))
    self._tokens = np.fromiter((token for ids in lists for token in ids), np.int32, int(self._offsets[-1]))

  def lengths_at(self, rows: np.ndarray) -> np.ndarray:
    """As Texts."""
    return self._offsets[rows + 1] - self._offsets[rows]

  def heads(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """As Texts."""
    return ragged.gather(self._tokens, self._offsets[rows], counts)


@dataclasses.dataclass(frozen=True)
class PairFormat:
  """How two texts become one sequence: the tokenizer's own template for pairs, the query first.

  The token type is 0 throughout, where BERT's pairs had 1 for the second text: RoBERTa has no second type, and what was
  tuned on single texts since (sentence encoders, a backbone after `pretrain`) has not seen it for long.

  Attributes:
    template: special ids.
    pad_id: what stands behind the sequence.
    query_length: limit of a query, counted as where it stands alone: with the special tokens before and after it.
    pair_length: limit of a sequence, special tokens included. The passage is what is cut to it, on the right.
  """

  template: PairTemplate
  pad_id: int
  query_length: int
  pair_length: int

  def __post_init__(self):
    if self.query_room < 1 or self.pair_length <= self.query_room + self.num_special:
      raise InputError(
        f"pairs of {self.pair_length} tokens leave no room beside queries of {self.query_length}",
        fix="Raise pair_length or lower query_length",
      )

  @classmethod
  def of(cls, tokenizer: Tokenizer, query_length: int, pair_length: int) -> PairFormat:
    """The format that a tokenizer gives."""
    return cls(tokenizer.pair_template(), tokenizer.pad_id, query_length, pair_length)

  @property
  def num_special(self) -> int:
    """Special tokens of a pair."""
    return sum(map(len, self.template))

  @property
  def query_room(self) -> int:
    """The most tokens of a query, special ones not counted."""
    return self.query_length - len(self.template.before) - len(self.template.after)


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Pairs by place: query `query_rows[i]` with passage `passage_rows[i]`.

  Attributes:
    queries, passages: TokenStores or TokenLists.
    query_rows, passage_rows: int64 [n].
    form: see PairFormat.
  """

  queries: Texts
  passages: Texts
  query_rows: np.ndarray
  passage_rows: np.ndarray
  form: PairFormat

  def __post_init__(self):
    most = getattr(self.passages, "max_tokens", None)
    if most is not None and most < self.form.pair_length - self.form.num_special:
      what = f"passages were cut to {most} tokens, pairs of {self.form.pair_length} are asked for"
      raise InputError(what, fix="Lower pair_length, or raise data.max_stored_tokens")

  def __len__(self) -> int:
    return len(self.query_rows)

  @property
  def limit(self) -> int:
    """The longest that a pair can be."""
    return self.form.pair_length

  def lengths(self) -> np.ndarray:
    """Returns int64 [n]: tokens of every pair, special tokens included."""
    return sum(self._counts(slice(None))) + self.form.num_special

  def batch(self, places: np.ndarray | slice, width: int) -> dict[str, np.ndarray]:
    """Gathers pairs: tokens int32 [b, width], padded on the right, lengths int32 [b], special tokens included, and
    segments int8 [b, width]: 1 at tokens of the query, 2 at tokens of the passage, 0 elsewhere."""
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
    """Tokens of the query and of the passage that stay, int64 each."""
    queries = np.minimum(self.queries.lengths_at(self.query_rows[places]), self.form.query_room)
    room = self.form.pair_length - self.form.num_special - queries
    return queries, np.minimum(self.passages.lengths_at(self.passage_rows[places]), room)


class PairBatches(GroupBatches):
  """`batches[step]` → this host's slice of the global batch of pairs, each query with its positive and negatives.

  A batch, of B queries with G passages each, on host p of n (m = B·G / n after filling, the positive first of every G):
    tokens int32 [m, T], lengths int32 [m] and segments int8 [m, T], see Pairs.batch; relevant bool [m]; real bool [m]:
    False where it fills the devices up.
  T is the bucket that the global batch needs.

  Args:
    queries, passages: token stores.
    query_rows, groups, and what `options` holds: see GroupBatches. The group size is 2 at least.
    form: how two texts become one sequence.
    bucket: T is a multiple of it, or the pair's limit.
  """

  def __init__(
    self,
    queries: Texts,
    passages: Texts,
    query_rows: np.ndarray,
    groups: TrainGroups,
    form: PairFormat,
    *,
    bucket: int = 16,
    **options: Any,
  ):
    super().__init__(query_rows, groups, **options)
    if groups.group_size < 2:
      raise InputError("pairs want a negative beside every positive", value=groups.group_size)
    self._queries, self._passages, self._form, self._bucket = queries, passages, form, bucket

  def __getitem__(self, step: int) -> Batch:
    rows, size = self.rows(step), self._groups.group_size
    pairs = Pairs(self._queries, self._passages, np.repeat(rows.queries, size), rows.passages.ravel(), self._form)
    longest = int(pairs.lengths().max())
    width = min(-(-longest // self._bucket) * self._bucket, self._form.pair_length)
    mine, real = self.own(len(pairs))
    return {**pairs.batch(mine, width), "relevant": mine % size == 0, "real": real}
