"""Batches as a function of the step, the same for any number of workers and hosts."""

import threading

import numpy as np
import pytest

from dptdr_jax.data.batches import TrainBatches, blocked, load_ahead, repeated
from dptdr_jax.data.groups import TrainGroups
from dptdr_jax.data.store import write_token_store
from dptdr_jax.data.tokenizer import Tokenizer
from dptdr_jax.runtime.mesh import WHOLE

POSITIVES = [[0, 5], [1], [2], [5, 3], [4], [6], [7]]


@pytest.fixture(scope="module")
def stores(roberta, tmp_path_factory):
  directory, tokenizer = tmp_path_factory.mktemp("stores"), Tokenizer(roberta)
  passages = ["the cat on the mat " * (1 + row % 7) for row in range(40)]
  queries = ["the dog " * (1 + row) for row in range(7)]

  def write(name, texts):
    path = directory / name
    return write_token_store(lambda start: iter(texts[start:]), len(texts), tokenizer, path, max_tokens=60)

  return write("queries", queries), write("passages", passages)


@pytest.fixture
def make(stores):
  def run(**options):
    def positives(row):
      return np.array(POSITIVES[row])

    seed, stage = options.pop("seed", 5), options.pop("stage", "train1")
    group_size = options.pop("group_size", 3)
    groups = TrainGroups(positives, None, num_passages=40, group_size=group_size, seed=seed, stage=stage)
    options = {"batch_size": 4, "query_tokens": 24, "passage_tokens": 48, "seed": seed, "stage": stage, **options}
    return TrainBatches(*stores, options.pop("query_rows", np.arange(7)), groups, **options)

  return run


def _same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name], strict=True)


def test_shapes_and_contents(make, stores):
  batches = make()
  rows, batch = batches.rows(2), batches[2]
  assert rows.passages.shape == (4, 3)
  assert {name: (value.shape[0], value.dtype) for name, value in batch.items()} == {
    "query_tokens": (4, np.int32), "query_lengths": (4, np.int32), "passage_tokens": (12, np.int32),
    "passage_lengths": (12, np.int32), "targets": (4, np.int32), "blocked": (4, np.bool_),
    "repeated": (12, np.bool_),
  }  # fmt: skip
  np.testing.assert_array_equal(batch["targets"], [0, 3, 6, 9])
  tokens, lengths = stores[1].batch(rows.passages.ravel(), 48)
  np.testing.assert_array_equal(batch["passage_tokens"], tokens)
  np.testing.assert_array_equal(batch["passage_lengths"], lengths)
  assert all(rows.passages[row, 0] in POSITIVES[query] for row, query in enumerate(rows.queries))
  assert batches.steps_per_epoch == 7 / 4


def test_every_epoch_has_every_query_once_and_batches_straddle(make):
  batches = make()
  rows = [batches.rows(step) for step in range(14)]
  stream = np.concatenate([row.queries for row in rows])
  assert all(sorted(stream[start : start + 7]) == list(range(7)) for start in range(0, 56, 7))
  assert len({tuple(stream[start : start + 7]) for start in range(0, 56, 7)}) > 5
  assert rows[1].epochs.tolist() == [0, 0, 0, 1]


def test_batch_is_a_function_of_seed_stage_and_step(make):
  first = make().rows(0)
  assert any((make(seed=seed).rows(0).queries != first.queries).any() for seed in (6, 7))
  assert any((make(stage=stage).rows(0).queries != first.queries).any() for stage in ("train2", "train3"))
  batches = make()
  backwards = {step: batches[step] for step in (9, 3, 0)}
  _same(backwards[3], make()[3])


def test_loader_gives_the_same_with_any_workers(make):
  loaded = list(make().load(5, 25, workers=3, ahead=8))
  assert len(loaded) == 20
  for step, batch in enumerate(loaded, start=5):
    _same(batch, make()[step])


def test_loader_ends_its_threads_and_passes_errors_on(make):
  loader = make().load(0, 1000)
  next(loader)
  assert any(thread.name.startswith("batches") for thread in threading.enumerate())
  loader.close()
  for thread in threading.enumerate():
    if thread.name.startswith("batches"):
      thread.join(60)
      assert not thread.is_alive()
  with pytest.raises(IndexError):
    list(make(query_rows=np.array([6, 7])).load(0, 3))


def test_blocked_by_hand():
  #                    q0's      q1's      q2's
  passages = np.array([0, 8, 9, 1, 8, 5, 5, 3, 0])
  positives = [np.array([0, 5]), np.array([1]), np.array([5, 3, 77])]
  expected = [
    # 0 8 9 1 8 5 5 3 0
    [0, 0, 0, 0, 0, 1, 1, 0, 1],  # 5 is a positive too; 0 is the target where it stands first
    [0, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 1, 0, 1, 0],  # the target is the later 5: its first occurrence is blocked instead
  ]
  found = blocked(passages, positives, np.array([0, 3, 6]))
  np.testing.assert_array_equal(found, np.array(expected, bool))
  np.testing.assert_array_equal(repeated(passages), np.array([0, 0, 0, 0, 1, 0, 1, 0, 1], bool))


@pytest.mark.parametrize(("num_hosts", "devices"), [(2, 2), (4, 4), (3, 3), (3, 9), (1, 8), (2, 16)])
def test_slices_of_all_hosts_are_the_batch_filled_up_for_their_devices(make, num_hosts, devices):
  whole, slices = make()[1], [make(host=host, num_hosts=num_hosts, devices=devices)[1] for host in range(num_hosts)]
  for name in ("query_tokens", "query_lengths", "passage_tokens", "passage_lengths"):
    assert len({part[name].shape for part in slices}) == 1
    filled = np.concatenate([part[name] for part in slices])
    count = len(whole[name])
    assert len(filled) % devices == 0 and len(filled) - count < devices
    np.testing.assert_array_equal(filled[:count], whole[name])
    np.testing.assert_array_equal(filled[count:], np.broadcast_to(whole[name][:1], filled[count:].shape))
  for name in WHOLE:
    np.testing.assert_array_equal(slices[-1][name], whole[name])


def test_an_error_waits_for_no_other_batch():
  waits, goes_on = threading.Event(), threading.Event()

  def make(step):
    if step == 0:
      waits.wait(60)  # for the other to be at its batch
      raise ValueError("no batch")
    waits.set()
    goes_on.wait(60)  # for what comes only when the first has failed

  try:
    with pytest.raises(ValueError, match="no batch"):
      next(load_ahead(make, 0, 9, workers=2, ahead=1))
    assert not goes_on.is_set()
  finally:
    goes_on.set()
