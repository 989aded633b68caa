"""Training groups by hand: rotation, windows, fills."""

import numpy as np
import pytest

from dptdr_jax.data.groups import TrainGroups, generator

POSITIVES = {0: [10, 11, 12], 1: [20]}


class Pool:
  """Negatives 100 … 106 for every query, with a positive and −1 fills among them."""

  def rows(self, query_row):
    return np.array([100, 101, 10, 102, 103, 20, 104, 105, 106, -1, -1])


class Few:
  def rows(self, query_row):
    return np.array([7, 8, 20])


def _groups(negatives, group_size, positives=POSITIVES, **options):
  options = {"num_passages": 200, "seed": 3, "stage": "train1", **options}
  return TrainGroups(lambda row: np.array(positives[row]), negatives, group_size=group_size, **options)


def test_positive_rotates_with_the_epoch():
  groups = _groups(Pool(), 3)
  seen = [groups.group(0, epoch)[0] for epoch in range(6)]
  assert set(seen[:3]) == {10, 11, 12} and seen[3:] == seen[:3]
  start = POSITIVES[0].index(seen[0])
  assert seen[:3] == [POSITIVES[0][(start + epoch) % 3] for epoch in range(3)]
  starts = {int(_groups(Pool(), 3, seed=seed).group(0, 0)[0]) for seed in range(20)}
  assert starts == {10, 11, 12}
  assert [_groups(Pool(), 3, positive="first").group(0, epoch)[0] for epoch in range(3)] == [10, 10, 10]


def test_window_moves_over_one_shuffled_order_and_around_its_end():
  epochs = [_groups(Pool(), 4).group(1, epoch)[1:].tolist() for epoch in range(8)]
  order = generator(3, "train1", "negatives", 0, 1).permutation([100, 101, 10, 102, 103, 104, 105, 106]).tolist()
  assert sorted(order) == [10, *range(100, 107)]  # 10 is no positive of query 1, 20 is, fills are gone
  assert epochs == [[order[(3 * epoch + place) % 8] for place in range(3)] for epoch in range(8)]
  assert sorted(sum(epochs, [])) == sorted(order * 3)


def test_few_negatives_are_all_kept_and_filled_at_random():
  groups = _groups(Few(), 6)
  drawn = [groups.group(1, epoch) for epoch in range(30)]
  assert all({7, 8} <= set(group[1:].tolist()) for group in drawn)
  assert all(len(set(group.tolist())) == 6 for group in drawn)
  assert all(20 not in group[1:] for group in drawn)
  assert len({tuple(group) for group in drawn}) > 25
  np.testing.assert_array_equal(groups.group(1, 4), drawn[4])


def test_without_negatives_random_or_none():
  assert _groups(None, 1).group(1, 0).tolist() == [20]
  assert len(set(_groups(None, 8).group(0, 0).tolist())) == 8


def test_a_tiny_corpus_repeats_rows_but_never_a_positive():
  group = _groups(None, 6, positives={0: [0, 1]}, num_passages=4).group(0, 0)
  assert group[0] in (0, 1) and set(group[1:].tolist()) == {2, 3}
  with pytest.raises(ValueError, match="every passage of the corpus is a positive"):
    _groups(None, 2, positives={0: [0, 1]}, num_passages=2).group(0, 0)


def test_streams_depend_on_every_word_of_their_key():
  keys = [(1, "a", "order", 0, 0), (2, "a", "order", 0, 0), (1, "b", "order", 0, 0), (1, "a", "fill", 0, 0),
          (1, "a", "order", 1, 0), (1, "a", "order", 0, 1)]  # fmt: skip
  draws = [tuple(generator(*key).integers(2**62, size=4)) for key in keys]
  assert len({value for draw in draws for value in draw}) == 24
  assert draws == [tuple(generator(*key).integers(2**62, size=4)) for key in keys]
