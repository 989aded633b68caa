"""Training batches as a function of (seed, stage, step): to resume, a run needs only the step."""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dptdr_jax.data.groups import TrainGroups, generator
from dptdr_jax.data.store import TokenStore

Batch = dict[str, np.ndarray]


class BatchRows(NamedTuple):
  """The global batch of a step by rows: query rows int64 [B], passage rows int64 [B, G], epochs int64 [B]."""

  queries: np.ndarray
  passages: np.ndarray
  epochs: np.ndarray


class GroupBatches(abc.ABC):
  """Batches of training groups; a subclass makes a batch of their rows.

  The stream of examples is one permutation of the training queries per epoch, drawn from (seed, stage, epoch), one
  epoch after the other. Batches are cut from it and always full, so that one may straddle two epochs. Every host
  computes the rows of the global batch (cheap) and gathers only the tokens of its own slice.

  Args:
    query_rows: int64 [n], the training queries: those with a positive.
    groups: `groups.at(step)` draws the passages of a step; its group size is G.
    batch_size: B, queries of the global batch.
    host, num_hosts: which slice.
    devices: of all hosts. If they cannot share the rows evenly, copies of the first row fill up the batch.
  """

  def __init__(
    self,
    query_rows: np.ndarray,
    groups: TrainGroups,
    *,
    batch_size: int,
    seed: int,
    stage: str,
    host: int = 0,
    num_hosts: int = 1,
    devices: int = 1,
  ):
    self._query_rows, self._groups, self._batch_size = np.asarray(query_rows, np.int64), groups, batch_size
    self._seed, self._stage = seed, stage
    self._host, self._num_hosts, self._multiple = host, num_hosts, math.lcm(devices, num_hosts)
    self._order = functools.lru_cache(maxsize=2)(self._permutation)

  @abc.abstractmethod
  def __getitem__(self, step: int) -> Batch:
    """Returns this host's slice of the global batch of a step."""

  @property
  def steps_per_epoch(self) -> float:
    """Steps until every training query is used once."""
    return len(self._query_rows) / self._batch_size

  def rows(self, step: int) -> BatchRows:
    """Returns the rows of the global batch of a step."""
    places = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
    epochs, within = np.divmod(places, len(self._query_rows))
    queries = np.empty(self._batch_size, np.int64)
    for epoch in np.unique(epochs):
      chosen = epochs == epoch
      queries[chosen] = self._query_rows[self._order(int(epoch))[within[chosen]]]
    drawn = self._groups.at(step)
    groups = [drawn.group(int(query), int(epoch)) for query, epoch in zip(queries, epochs, strict=True)]
    return BatchRows(queries, np.stack(groups), epochs)

  def load(self, start_step: int, stop_step: int, workers: int = 2, ahead: int = 4) -> Iterator[Batch]:
    """Yields the batches of start_step … stop_step − 1, prepared in threads; see `load_ahead`."""
    return load_ahead(self.__getitem__, start_step, stop_step, workers, ahead)

  def own(self, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns which of `count` rows of the global batch are this host's, int64, and which of those are real, bool.

    The others are copies of the first row, which only fill up the devices.
    """
    share = -(-count // self._multiple) * self._multiple // self._num_hosts
    places = np.arange(self._host * share, (self._host + 1) * share)
    real = places < count
    return np.where(real, places, 0), real

  def _permutation(self, epoch: int) -> np.ndarray:
    return generator(self._seed, self._stage, "order", epoch, 0).permutation(len(self._query_rows))


class TrainBatches(GroupBatches):
  """`batches[step]` → this host's slice of the global batch, queries and passages separate.

  The global batch has B examples of G passages each, M = B·G. Host p of n gets b = B / n queries and m = M / n
  passages, both after filling. T is the bucket that the global batch needs. A batch has:
    query_tokens int32 [b, Tq], query_lengths int32 [b].
    passage_tokens int32 [m, Tp], passage_lengths int32 [m].
    targets int32 [B]: column of each query's positive in the global batch.
    blocked bool [B, M]: the query's positives, which must not count as its negatives. Never the target.
    repeated bool [M]: columns whose passage is also further left. A passage counts once.
  The last three are of the global batch and the same on every host. The tokens of all hosts, one below the other, are
  the global batch. Rows that fill it up come last.

  Args:
    queries, passages: token stores.
    query_rows, groups, options: see GroupBatches.
    query_tokens, passage_tokens: length limits, special tokens included.
  """

  def __init__(
    self,
    queries: TokenStore,
    passages: TokenStore,
    query_rows: np.ndarray,
    groups: TrainGroups,
    *,
    query_tokens: int,
    passage_tokens: int,
    **options: Any,
  ):
    super().__init__(query_rows, groups, **options)
    self._queries, self._passages = queries, passages
    self._query_tokens, self._passage_tokens = query_tokens, passage_tokens

  def __getitem__(self, step: int) -> Batch:
    rows = self.rows(step)
    positives, size = self._groups.at(step).positives, self._groups.group_size
    targets, columns = np.arange(self._batch_size, dtype=np.int32) * size, rows.passages.ravel()
    width = self._queries.width(rows.queries, self._query_tokens)
    mine = rows.queries[self.own(self._batch_size)[0]]
    query_tokens, query_lengths = self._queries.batch(mine, self._query_tokens, width)
    width = self._passages.width(columns, self._passage_tokens)
    mine = columns[self.own(columns.size)[0]]
    passage_tokens, passage_lengths = self._passages.batch(mine, self._passage_tokens, width)
    return {
      "query_tokens": query_tokens,
      "query_lengths": query_lengths,
      "passage_tokens": passage_tokens,
      "passage_lengths": passage_lengths,
      "targets": targets,
      "blocked": blocked(columns, [positives(int(query)) for query in rows.queries], targets),
      "repeated": repeated(columns),
    }


def load_ahead(
  make: Callable[[int], Batch], start_step: int, stop_step: int, workers: int = 2, ahead: int = 4
) -> Iterator[Batch]:
  """Yields make(step) for start_step … stop_step − 1; threads prepare `ahead` of them in advance.

  Threads, not processes: at the paper's shape (64 × 30 passages of 128 tokens, 2 busy cores) they need 13–15 ms a
  batch, grain's worker processes 15–24 ms after 3–5 s of start, and a step takes far longer. After an error or `close`
  nobody waits for a thread, because it may itself wait for what happens after `close`.
  """
  pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="batches")
  waiting: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
  try:
    for step in range(start_step, stop_step):
      waiting.append(pool.submit(make, step))
      if len(waiting) > ahead:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def blocked(passages: np.ndarray, positives: list[np.ndarray], targets: np.ndarray) -> np.ndarray:
  """Marks passages that must not count as negatives of a query: its positives except its target, bool [b, M].

  Args:
    passages: int64 [M], passage rows of the global batch.
    positives: for each of b queries, the rows of its known positives.
    targets: int [b], column of each query's positive.
  """
  result = np.stack([np.isin(passages, rows) for rows in positives])
  result[np.arange(len(positives)), targets] = False
  return result


def repeated(passages: np.ndarray) -> np.ndarray:
  """Returns bool [M]: True at every occurrence of a row after its first; passages int64 [M] of the global batch."""
  result = np.ones(len(passages), bool)
  result[np.unique(passages, return_index=True)[1]] = False
  return result
