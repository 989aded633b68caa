"""Every sequence once, in its place, in few shapes."""

import jax
import numpy as np
import pytest

from dptdr_jax.core import preemption
from dptdr_jax.runtime.buckets import map_sequences, plan
from dptdr_jax.runtime.mesh import make_mesh


class Numbered:
  """Sequence i is its own number, as often as its length says."""

  limit = 70

  def __init__(self, lengths):
    self._lengths = np.array(lengths)

  def lengths(self):
    return self._lengths

  def batch(self, places, width):
    tokens = np.where(np.arange(width) < self._lengths[places, None], places[:, None], 0)
    return {"tokens": tokens.astype(np.float32)}


@pytest.mark.parametrize("devices", [1, 8])
def test_results_stand_where_their_sequences_do(devices):
  lengths = np.random.default_rng(0).integers(1, 71, 500)
  shapes = set()

  def total(batch):
    shapes.add(batch["tokens"].shape)
    return batch["tokens"].sum(1)

  found = map_sequences(
    total, Numbered(lengths), make_mesh(devices=jax.devices()[:devices]), batch_tokens=320, description="sum"
  )
  np.testing.assert_array_equal(found, lengths * np.arange(500))
  assert all(rows % devices == 0 and rows * width <= 320 * devices for rows, width in shapes)
  assert len(shapes) <= 5 + 1, "a full one for 16, 32, 48, 64 and the limit, and the last"
  assert map_sequences(total, Numbered([]), make_mesh(devices=jax.devices()[:1])).shape == (0,)


def test_sigterm_ends_it_within_a_batch(monkeypatch):
  seen = []
  monkeypatch.setattr(preemption, "asked", lambda: len(seen) == 3)
  arguments = (lambda batch: seen.append(1) or batch["tokens"].sum(1), Numbered([16] * 100), make_mesh())
  with pytest.raises(preemption.Preempted, match="texts begins again"):
    map_sequences(*arguments, batch_tokens=16, description="texts")
  assert len(seen) == 3


@pytest.mark.parametrize(
  ("lengths", "batches"),
  [([9], [([0], 16, 1)]), ([3, 60, 20, 64, 5], [([1, 3, 2], 64, 3), ([0, 4], 16, 2)])],
)
def test_batches_are_longest_first_and_only_the_last_is_small(lengths, batches):
  planned = plan(np.array(lengths), 512, 192, 1)
  assert [(places.tolist(), width, size) for places, width, size in planned] == batches


def test_batches_fit_a_cpu_unless_they_are_given():
  shapes = set()

  def total(batch):
    shapes.add(batch["tokens"].shape)
    return batch["tokens"].sum(1)

  map_sequences(total, Numbered([64] * 100), make_mesh(devices=jax.devices()[:1]))
  assert max(shapes) == (2048 // 64, 64)
