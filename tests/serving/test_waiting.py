"""Which texts form a batch, in which shapes, and which prompts are in the bank."""

import collections

import numpy as np
import pytest

from dptdr_jax.models.bank import Entry
from dptdr_jax.serving.shapes import Shapes
from dptdr_jax.serving.slots import Slots
from dptdr_jax.serving.waiting import Request, Waiting

SHAPES = Shapes(longest=64, batch_tokens=64)  # 1 or 4 rows of 16 tokens, 1 or 2 of 32, 1 of 64


def entry():
  return Entry(np.zeros((0, 1, 2, 1, 1), np.float32), 0, False, False)


ONE = entry()


def request(kind, lengths, arrived=0.0, prompt=ONE, deadline=None):
  ids = [np.ones(length, np.int32) for length in lengths]
  return Request(prompt, kind, ids, np.zeros(len(ids), np.int32), arrived, deadline)


def waiting(*requests, slots=8):
  line = Waiting(SHAPES, slots)
  for one in requests:
    line.put(one)
  return line


def test_widths_and_sizes_cover_every_batch():
  shapes = Shapes(longest=350, batch_tokens=2048, devices=2)
  assert shapes.widths == (16, 32, 64, 96, 128, 192, 256, 352)
  assert [shapes.width(tokens) for tokens in (1, 16, 17, 129, 350)] == [16, 16, 32, 192, 352]
  assert shapes.sizes(16) == [4, 16, 64, 256] and shapes.sizes(352) == [2, 10]
  assert [shapes.size(16, rows) for rows in (1, 4, 5, 64, 65, 256)] == [4, 4, 16, 64, 256, 256]
  assert [shapes.rows(16, waiting) for waiting in (1, 7, 8, 31, 32, 127, 128, 999)] == [1, 4, 8, 16, 32, 64, 128, 256]
  assert Shapes(longest=64, batch_tokens=8).all() == [(16, 1), (32, 1), (64, 1)]


def test_width_is_that_of_the_oldest_text_and_shorter_texts_replace_padding_only():
  long, short = request("query", [20] * 3, 0.0), request("query", [5] * 9, 1.0)
  line = waiting(short, long)
  batch = line.take()
  assert (batch.width, batch.size) == (32, 2) and {row.request for row in batch.rows} == {long}
  batch = line.take()  # one text of 32 tokens is left, and one row is its size: nothing to fill up
  assert (batch.width, batch.size, len(batch.rows)) == (32, 1, 1)
  assert [len(line.take().rows) for _ in range(3)] == [4, 4, 1]
  assert line.tokens == 0 and len(line) == 0


def test_shorter_texts_fill_places_that_would_be_padding():
  line = Waiting(Shapes(longest=32, batch_tokens=512), 8)  # 1, 4 or 16 rows of 32 tokens
  line.put(request("query", [5] * 9, 1.0))
  line.put(request("query", [30, 30], 0.0))
  line.put(request("passage", [5] * 9, 2.0))
  batch = line.take()
  assert (batch.width, batch.size, len(batch.rows)) == (32, 4, 4)
  batch = line.take()
  assert (batch.width, batch.size) == (16, 32)
  assert collections.Counter(row.request.kind for row in batch.rows) == {"query": 7, "passage": 9}
  assert line.delay(9, 0) is None


def test_queries_lead_and_passages_lead_every_fourth_batch():
  line = waiting(request("passage", [16] * 40, 0.0), *(request("query", [16] * 4, 1.0) for _ in range(12)))
  order = [line.take().rows[0].request.kind for _ in range(12)]
  assert order == (["query"] * 3 + ["passage"]) * 3
  only_passages = waiting(request("passage", [16] * 8))
  assert only_passages.take().rows[0].request.kind == "passage"


def test_batch_has_at_most_as_many_prompts_as_slots():
  prompts = [entry() for _ in range(4)]
  line = waiting(*(request("query", [5], place, prompt) for place, prompt in enumerate(prompts)), slots=3)
  assert [row.request.entry for row in line.take().rows] == prompts[:3]
  assert [row.request.entry for row in line.take().rows] == prompts[3:]


def test_batch_starts_when_full_or_when_a_text_has_waited_long_enough():
  line = waiting(request("query", [5] * 3, 1.0))
  assert line.delay(now=1.5, longest=2.0) == pytest.approx(1.5)
  assert line.delay(now=4.0, longest=2.0) == 0
  line.put(request("passage", [5], 1.4))
  assert line.delay(now=1.5, longest=2.0) == 0
  assert waiting().delay(0, 1) is None


def test_removed_and_expired_requests_free_their_place():
  gone, late, kept = request("query", [5, 40]), request("query", [6], deadline=3.0), request("passage", [7])
  line = waiting(gone, late, kept)
  line.remove(gone)
  line.remove(gone)
  assert line.tokens == 13 and line.expired(2.9) == [] and line.expired(3.0) == [late]
  line.remove(late)
  assert line.all() == [kept] and [row.request for row in line.take().rows] == [kept]


def test_least_recently_used_prompt_leaves_the_bank():
  slots, (a, b, c, d) = Slots(3), [entry() for _ in range(4)]
  assert slots.place([a, b]) == [a, b] and slots.place([a, c]) == [c] and slots.evictions == 0
  taken = slots[b]
  assert slots.place([d]) == [d] and slots[d] == taken and slots.evictions == 1
  assert sorted(slots[one] for one in (a, c, d)) == [0, 1, 2]
  slots.forget(c)
  slots.forget(b)
  assert len(slots) == 2 and slots.place([b]) == [b] and slots.evictions == 1
