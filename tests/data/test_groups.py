"""Training groups by hand: rotation, windows, fills, and the other ways to sample negatives."""

import itertools

import numpy as np
import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.groups import Sampling, TrainGroups, generator

POSITIVES = {0: [10, 11, 12], 1: [20]}


class Pool:
  """Negatives 100 … 106 for every query, with a positive and −1 fills among them."""

  def rows(self, query_row):
    return np.array([100, 101, 10, 102, 103, 20, 104, 105, 106, -1, -1])


class Scored(Pool):
  """The same with a score for each; 106 has none, and the positive of query 0 scores 4, that of query 1 is unknown."""

  SCORES = np.array([9, 6, 5, 4.5, 4, 5, 3, 2, -np.inf, -np.inf, -np.inf])

  def scores(self, query_row):
    return self.SCORES, 4.0 if query_row == 0 else np.nan


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


class Twice:
  def rows(self, query_row):
    return np.array([5, 5, 6, 6, 7, 8])


@pytest.mark.parametrize("strategy", ["window", "random", "top"])
def test_repeated_negative_counts_once(strategy):
  groups = _groups(Twice(), 4, sampling=Sampling(strategy, last=3))
  assert sorted(groups.group(1, 0)[1:].tolist()) == [5, 6, 7]


def test_few_negatives_are_all_kept_and_filled_at_random():
  groups = _groups(Few(), 6)
  drawn = [groups.group(1, epoch) for epoch in range(30)]
  assert all({7, 8} <= set(group[1:].tolist()) for group in drawn)
  assert all(len(set(group.tolist())) == 6 for group in drawn)
  assert all(20 not in group[1:] for group in drawn)
  assert len({tuple(group) for group in drawn}) > 25
  np.testing.assert_array_equal(groups.group(1, 4), drawn[4])


def test_without_negatives_random_passages_or_none():
  assert _groups(None, 1).group(1, 0).tolist() == [20]
  assert len(set(_groups(None, 8).group(0, 0).tolist())) == 8


def test_tiny_corpus_repeats_rows_but_never_a_positive():
  group = _groups(None, 6, positives={0: [0, 1]}, num_passages=4).group(0, 0)
  assert group[0] in (0, 1) and set(group[1:].tolist()) == {2, 3}
  with pytest.raises(InputError, match="every passage of the corpus is a positive"):
    _groups(None, 2, positives={0: [0, 1]}, num_passages=2).group(0, 0)


def _draws(epochs, group_size, **sampling):
  groups = _groups(Scored(), group_size, sampling=Sampling(**sampling))
  return np.array([groups.group(0, epoch)[1:] for epoch in range(epochs)])


def test_top_and_random_keep_to_their_range():
  assert _draws(3, 4, strategy="top").tolist() == [[100, 101, 102]] * 3  # 10 is a positive of query 0
  drawn = _draws(300, 3, strategy="random", last=4)  # of 100, 101, 102, 103
  assert all(len(set(group)) == 2 for group in drawn.tolist())
  counts = {row: int((drawn == row).sum()) for row in np.unique(drawn)}
  assert set(counts) == {100, 101, 102, 103} and all(110 < count < 190 for count in counts.values())
  window = _draws(2, 3, strategy="window", last=4)
  assert sorted(window.ravel().tolist()) == [100, 101, 102, 103]


def test_simans_draws_by_the_formula():
  rows, scores = np.array([100, 101, 102, 103, 20, 104, 105]), np.array([9, 6, 4.5, 4, 5, 3, 2])
  weights = np.exp(-0.3 * (scores - 4 - 0.5) ** 2)
  epochs = 4000
  drawn = _draws(epochs, 3, strategy="simans", a=0.3, b=0.5)
  statistic, cells = 0.0, 0
  for first, second in itertools.permutations(range(7), 2):  # one after the other, without replacement
    expected = epochs * weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
    observed = int(((drawn[:, 0] == rows[first]) & (drawn[:, 1] == rows[second])).sum())
    if expected >= 5:
      statistic, cells = statistic + (observed - expected) ** 2 / expected, cells + 1
    else:
      assert observed < 20
  assert cells > 20 and statistic < cells + 4 * np.sqrt(2 * cells)  # chi-square: mean cells − 1, variance twice it
  assert 106 not in drawn


def test_simans_draws_candidates_without_a_score_last():
  rows = {100, 101, 102, 103, 20, 104, 105}
  assert all(set(group[:7]) == rows and group[7] == 106 for group in _draws(5, 9, strategy="simans").tolist())
  unknown = _groups(Scored(), 2, sampling=Sampling("simans", a=50.0))  # query 1: no score of a positive
  counts = np.unique([unknown.group(1, epoch)[1] for epoch in range(800)], return_counts=True)
  assert counts[0].tolist() == [10, *range(100, 107)] and (counts[1] > 60).all()
  assert _groups(None, 3, sampling=Sampling("simans")).group(0, 0).shape == (3,)  # random passages need no scores


def test_simans_without_scores_is_random_in_the_same_range(caplog):
  caplog.set_level("INFO", "dptdr_jax")
  groups, random = (_groups(Pool(), 3, sampling=Sampling(name, last=5)) for name in ("simans", "random"))
  assert [groups.group(0, epoch).tolist() for epoch in range(9)] == [
    random.group(0, epoch).tolist() for epoch in range(9)
  ]
  assert [record.getMessage() for record in caplog.records] == [
    "train1: these negatives have no scores, which SimANS needs; they are drawn at random"
  ]


@pytest.mark.parametrize("strategy", ["window", "random", "top", "simans"])
def test_every_strategy_is_a_function_of_its_key(strategy):
  def make(**options):
    return _groups(Scored(), 4, sampling=Sampling(strategy), **options)

  keys = list(itertools.product((0, 1), range(6)))
  groups = make()
  expected = {key: groups.group(*key).tolist() for key in keys}
  again = make()
  assert all(again.group(*key).tolist() == expected[key] for key in reversed(keys))
  others = [make(seed=4), make(stage="train2")]
  differ = [any(other.group(*key)[1:].tolist() != expected[key][1:] for key in keys) for other in others]
  assert differ == [strategy != "top"] * 2
  epochs = {tuple(expected[0, epoch][1:]) for epoch in range(6)}
  assert len(epochs) == 1 if strategy == "top" else len(epochs) > 3
