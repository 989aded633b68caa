"""Texts that wait, and which of them form the next batch. Not thread-safe: the engine holds a lock."""

from __future__ import annotations

import collections
import dataclasses
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from dptdr_jax.models.bank import Entry
from dptdr_jax.serving.shapes import Shapes

KINDS = ("query", "passage")


@dataclasses.dataclass(eq=False)
class Request:
  """Texts of one task and kind.

  Attributes:
    ids: token ids of each text, with special tokens.
    cut: tokens of each text that were cut off.
    arrived, deadline: seconds of time.monotonic().
    future: of the answer.
    lengths: tokens of each text.
    vectors: float32 [n, H], filled batch by batch; `left` texts have none yet.
    started: when its first text was sent to the device.
  """

  entry: Entry
  kind: str
  ids: list[np.ndarray]
  cut: np.ndarray
  arrived: float
  deadline: float | None = None
  future: Future = dataclasses.field(default_factory=Future)

  def __post_init__(self):
    self.lengths = np.array([len(ids) for ids in self.ids], np.int32)
    self.left = len(self.ids)
    self.vectors: np.ndarray | None = None
    self.started: float | None = None


class Row(NamedTuple):
  """One text of a request."""

  request: Request
  place: int


class Batch(NamedTuple):
  """Rows for one program, which has `size` rows of `width` tokens."""

  rows: list[Row]
  width: int
  size: int


class Waiting:
  """Rows that wait, by kind and width, the oldest first.

  Queries go before passages. While both wait, passages lead every `turns`-th batch, so neither can starve: under any
  load queries get (turns − 1) / turns of the batches and passages 1 / turns.

  Attributes:
    tokens: of all rows that wait.
  """

  def __init__(self, shapes: Shapes, slots: int, turns: int = 4):
    self.tokens = 0
    self._shapes, self._slots, self._turns = shapes, slots, turns
    self._lines = {kind: {width: collections.deque() for width in shapes.widths} for kind in KINDS}
    self._rows: dict[Request, int] = {}  # that wait
    self._query_batches = 0  # since passages last led one, while passages wait

  def __len__(self) -> int:
    return sum(self._rows.values())

  def put(self, request: Request) -> None:
    """Adds all texts of a request."""
    for place, length in enumerate(request.lengths):
      self._lines[request.kind][self._shapes.width(length)].append(Row(request, place))
    if request.ids:
      self._rows[request] = len(request.ids)
      self.tokens += int(request.lengths.sum())

  def remove(self, request: Request) -> None:
    """Removes the texts of a request that still wait."""
    if self._rows.pop(request, 0):
      for width, line in self._lines[request.kind].items():
        kept = collections.deque(row for row in line if row.request is not request)
        self.tokens -= sum(int(row.request.lengths[row.place]) for row in line if row.request is request)
        self._lines[request.kind][width] = kept

  def expired(self, now: float) -> list[Request]:
    """Requests whose deadline has passed."""
    return [request for request in self._rows if request.deadline is not None and request.deadline <= now]

  def all(self) -> list[Request]:
    """Every request with a text that waits."""
    return list(self._rows)

  def delay(self, now: float, longest: float) -> float | None:
    """Seconds until a batch should start: none if one is full or a text has waited `longest`. None: nothing waits."""
    if not self._rows:
      return None
    for width in self._shapes.widths:
      if sum(len(self._lines[kind][width]) for kind in KINDS) >= self._shapes.full(width):
        return 0.0
    oldest = min(line[0].request.arrived for lines in self._lines.values() for line in lines.values() if line)
    return max(0.0, oldest + longest - now)

  def take(self) -> Batch:
    """Removes the rows of the next batch; some row must wait.

    The oldest row of the leading kind sets the width. Rows of that width fill the batch; shorter ones only fill up
    places that would be padding. A batch has at most as many prompts as the bank has slots.
    """
    lead = self._leading_kind()
    kinds = (lead, KINDS[1 - KINDS.index(lead)])
    width = min((line[0].request.arrived, width) for width, line in self._lines[lead].items() if line)[1]
    rows: list[Row] = []
    entries: set[Entry] = set()
    most = self._shapes.rows(width, sum(len(self._lines[kind][width]) for kind in KINDS))
    for kind in kinds:
      self._fill(rows, entries, self._lines[kind][width], most)
    size = self._shapes.size(width, len(rows))
    for shorter in reversed([other for other in self._shapes.widths if other < width]):
      for kind in kinds:
        self._fill(rows, entries, self._lines[kind][shorter], size)
    return Batch(rows, width, size)

  def _leading_kind(self) -> str:
    queries, passages = (any(self._lines[kind].values()) for kind in KINDS)
    if not passages:
      self._query_batches = 0
      return "query"
    if queries and self._query_batches + 1 < self._turns:
      self._query_batches += 1
      return "query"
    self._query_batches = 0
    return "passage"

  def _fill(self, rows: list[Row], entries: set[Entry], line: collections.deque, most: int) -> None:
    """Moves rows from a line to a batch of at most `most` rows."""
    skipped = []  # their prompts have no slot in this batch
    while line and len(rows) < most:
      row = line.popleft()
      request = row.request
      if request.entry not in entries and len(entries) == self._slots:
        skipped.append(row)
        continue
      entries.add(request.entry)
      rows.append(row)
      self.tokens -= int(request.lengths[row.place])
      self._rows[request] -= 1
      if not self._rows[request]:
        del self._rows[request]
    line.extendleft(reversed(skipped))
