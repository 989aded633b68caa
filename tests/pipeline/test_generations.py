"""Negatives mined again while training continues: which step draws from which, and what a wait or a failure does."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import time
import types
from unittest import mock

import numpy as np
import pytest

from dptdr_jax.core.errors import DptdrError, InputError, RetryableError
from dptdr_jax.data.batches import TrainBatches
from dptdr_jax.data.prepare import Split
from dptdr_jax.pipeline import generations, pools, train, trials
from dptdr_jax.pipeline.generations import Generations
from dptdr_jax.retrieval.candidates import Pool, Reason
from dptdr_jax.runtime.hosts import TEAM


def places(made) -> list:
  return [made.workdir / f"train1/generations/{number}" for number in (0, 1)]


def test_each_generation_keeps_its_retriever_and_pool_alone(whole):
  names = sorted(path.name for path in (whole.workdir / "train1/generations").iterdir())
  assert names == ["0", "1", "2"], "that of step 6 would be used from step 8 on, and there is none"
  for place, step in zip(places(whole), (2, 4), strict=True):
    kept = {path.name for path in place.iterdir()}
    assert kept == {"retriever", "pool", "mining.json"}, "vectors and runs are as large as the corpus"
    assert json.loads((place / "mining.json").read_text())["from_step"] == step
  first, last = (Pool.open(whole.workdir / f"train1/generations/{number}/pool") for number in (0, 2))
  assert first.names == last.names == ("bm25", "dense", "other.trec")
  assert not np.array_equal(first.rows, last.rows)


def test_cross_encoder_denoises_every_generation(whole):
  for place in places(whole):
    pool = Pool.open(place / "pool")
    asked = np.isin(pool.reasons, (Reason.KEPT, Reason.CROSS_ENCODER, Reason.PSEUDO_POSITIVE)) & (pool.rows >= 0)
    assert asked.sum(1).max() == 5 and Reason.NOT_SCORED in pool.reasons


def test_each_step_draws_from_its_generation(whole, tmp_path):
  made = whole.copy(tmp_path / "work")
  node = made.node("train1")
  inputs, making = node.inputs, made.making(node, made.path(node))
  split, corpus = Split(made.workdir / "prepare/splits/train", "train"), trials.tokens_of(node.inputs.corpus, making)
  first = train._groups(inputs, making, split, len(corpus))
  mined = Generations(inputs, making, split, first)
  with contextlib.closing(mined):
    for step in (2, 4, 6):
      mined.resume(step)
    batches = TrainBatches(trials.tokens_of(inputs.queries, making), corpus, split.trainable, mined, batch_size=8,
                           query_tokens=32, passage_tokens=32, seed=0, stage="train1")  # fmt: skip
    others = 0
    for step in range(7):
      rows, drawn = batches.rows(step), []
      for place in (None, *(made.workdir / f"train1/generations/{number}/pool" for number in range(3))):
        groups = pools.train_groups(inputs, split, Pool.open(place), 64) if place else first
        drawn.append(np.stack([groups.group(*pair) for pair in zip(rows.queries, rows.epochs, strict=True)]))
      np.testing.assert_array_equal(rows.passages, drawn[step // 2])
      others += sum(not np.array_equal(rows.passages, one) for one in drawn)
    assert others >= 10


@pytest.fixture
def waiting(whole, tmp_path):
  """A function that begins generations in an empty directory, nothing mined; with its inputs."""
  node = whole.node("train1")
  first = types.SimpleNamespace(group_size=3, num_passages=64)
  return lambda: Generations(node.inputs, whole.making(node, tmp_path), None, first)


def test_another_process_waits_for_negatives_and_finds_them(waiting, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(type(TEAM), "is_main", property(lambda self: False))
  monkeypatch.setattr(generations, "_LOOK_S", 0.02)
  monkeypatch.setattr(generations, "_NOTICE_S", 0.0)
  caplog.set_level("INFO", "dptdr_jax")
  looks = []

  def look(self, name, yes):  # as if the first process wrote them between the third look and the fourth
    looks.append(yes)
    if len(looks) == 3:
      (tmp_path / "generations/0/pool").mkdir(parents=True)
      (tmp_path / "generations/0/mining.json").write_text("{}")
    return yes

  monkeypatch.setattr(type(TEAM), "all_say", look)
  monkeypatch.setattr(Generations, "_draws_from", lambda self, which: f"generation {which}")
  with concurrent.futures.ThreadPoolExecutor(1) as pool, contextlib.closing(waiting()) as mined:
    drawn = pool.submit(mined.at, 3)  # by a thread that makes batches
    for step in range(4):
      mined.wait_for(step)
    assert drawn.result() == "generation 0"
    assert looks == [False, False, False, True], "once a generation"
    assert list(mined._groups) == [0], "those before it hold files open, and nobody asks for them"
    late = pool.submit(mined.at, 4)
    while not mined._ready._waiters:
      time.sleep(0.01)
    mined.close()
    with pytest.raises(DptdrError, match="training has ended"):
      late.result()
  said = [record.getMessage() for record in caplog.records if record.name.endswith("generations")]
  assert said == ["round 1 waits for negatives of generation 0"]


@pytest.mark.parametrize(
  ("error", "same"), [(InputError("cut", path="a"), True), (RetryableError("away"), True), (ValueError("7"), False)]
)
def test_what_mining_fails_of_keeps_its_kind_and_path(waiting, tmp_path, monkeypatch, error, same):
  (tmp_path / "generations/0/retriever").mkdir(parents=True)
  (tmp_path / "generations/0/retriever/retriever.json").touch()
  monkeypatch.setattr(Generations, "_mine", mock.Mock(side_effect=error))
  with contextlib.closing(waiting()) as mined:
    mined.resume(2)
    with pytest.raises(DptdrError) as raised:
      mined.at(2)
  assert (raised.value is error) == same
  assert same or str(raised.value) == "mining during round 1 failed: 7"
