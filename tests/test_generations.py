"""Negatives mined anew while training goes on: which step draws from which, and what a stop or a wait costs."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import shutil
import threading
import time
import types
from unittest import mock

import numpy as np
import pytest
from test_rounds import make_config, prompts

from dptdr_jax import pipeline
from dptdr_jax.core import preemption
from dptdr_jax.core.errors import DptdrError, InputError, PassingError
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.retrieval.bm25 import Bm25
from dptdr_jax.retrieval.candidates import Pool, Reason
from dptdr_jax.retriever import Retriever
from dptdr_jax.runtime import hosts
from dptdr_jax.stages import common, generations, mine, report, search
from dptdr_jax.stages.generations import Generations
from dptdr_jax.stages.layout import Layout
from dptdr_jax.stages.sources import Sources
from dptdr_jax.stages.trial import DevTrial


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp("generations")


def test_negatives_are_mined_anew_while_training_goes_on(directory, tmp_path, monkeypatch):
  asked, ask = [], Bm25.search
  monkeypatch.setattr(Bm25, "search", lambda self, texts, depth: asked.append(len(texts)) or ask(self, texts, depth))
  config = make_config(directory, rounds=1, train__refresh_every=2, train__steps=7, train__passages=3)
  pipeline.run(config, tmp_path / "work", ["prepare", "train"])
  assert asked == [32], "BM25 finds the same for every generation"
  made = sorted(path.name for path in (tmp_path / "work/train1/generations").iterdir())
  assert made == ["0", "1", "2"], "that of step 6 would hold from step 8 on, and there is none"
  kept = {path.name for path in (tmp_path / "work/train1/generations/0").iterdir()}
  assert kept == {"retriever", "pool", "mining.json"}, "vectors and runs are as large as the corpus"
  pools = [Pool.open(tmp_path / f"work/train1/generations/{number}/pool") for number in ("0", "1", "2")]
  assert not np.array_equal(pools[0].rows, pools[2].rows)
  # Whoever is quicker, mining or training: the same negatives at the same steps.
  pipeline.run(config, tmp_path / "again", ["prepare", "train"])
  assert prompts(tmp_path / "again", 1) == prompts(tmp_path / "work", 1)

  # A step draws from the generation that holds there, and from no other.
  layout = Layout.of(tmp_path / "work")
  data = PreparedData(layout.prepared)
  mined = Generations(config, layout, data, 1, common.load_backbone(config, layout))
  for step in (2, 4, 6):
    mined.resume(step)
  batches, others = common.train_batches(config, layout, data, 1, mined), 0
  for step in range(2, 7):
    rows = batches.rows(step)
    drawn = []
    for pool in pools:
      groups = common.train_groups(config, layout, data, 1, common.pool_negatives(config, pool))
      drawn.append(np.stack([groups.group(*pair) for pair in zip(rows.queries, rows.epochs, strict=True)]))
    np.testing.assert_array_equal(rows.passages, drawn[step // 2 - 1])
    others += sum(not np.array_equal(rows.passages, one) for one in drawn)
  assert others >= 5
  mined.close()

  page = "\n".join(report.negatives(config, layout, 1))
  assert [f"Negatives of round 1 from step {step}" in page for step in (2, 4, 6)] == [True, False, True]
  assert "Negatives mined while round 1 trained" in page and "<tr><td>4</td>" in page

  # Its search is kept in parts, too.
  monkeypatch.setattr(search, "_PART", 20)
  retriever = Retriever.load(layout.generation(1, 0) / "retriever")
  asked = Sources(config, layout, data, tmp_path / "again", 1, retriever, shared=layout.train(1), together=False)
  with monkeypatch.context() as stopped, pytest.raises(preemption.Preempted, match="part 1 of 2"):
    stopped.setattr(preemption, "asked", lambda: (tmp_path / "again/runs/dense.0-of-2").exists())
    mine.mine(asked)
  assert (tmp_path / "again/runs/dense.0-of-2").exists()
  mine.mine(asked)
  np.testing.assert_array_equal(Pool.open(tmp_path / "again/pool").rows, pools[0].rows)
  assert [path.name for path in (tmp_path / "again/runs").iterdir()] == ["dense"]


def test_the_cross_encoder_denoises_what_is_mined_while_training(directory, tmp_path):
  config = make_config(directory, rounds=1, train__refresh_every=2, train__steps=6, train__passages=3)
  config.cross.update({"enabled": True, "steps": 2, "queries": 4, "passages": 2, "evaluate_every": 0, "length": 4})
  config.cross.update({"pair_length": 48, "depth": 5, "head": "first"})
  config.mine.update({"cross_encoder": True, "negative_below": 0.0, "positive_above": 1.0})  # whatever it says
  pipeline.run(config, tmp_path / "work", ["prepare", "mine", "cross", "train"])
  for number in (0, 1):
    pool = Pool.open(tmp_path / f"work/train1/generations/{number}/pool")
    asked = (np.isin(pool.reasons, (Reason.KEPT, Reason.CROSS_ENCODER, Reason.PSEUDO_POSITIVE)) & (pool.rows >= 0)).sum(
      1
    )
    assert asked.max() == 5 and {Reason.CROSS_ENCODER, Reason.NOT_SCORED} <= set(np.unique(pool.reasons))


def test_another_process_waits_for_negatives_and_finds_them(directory, tmp_path, monkeypatch, caplog):
  config, layout = make_config(directory, rounds=1, train__refresh_every=2), Layout.of(tmp_path)
  pipeline.run(config, tmp_path, ["prepare"])
  monkeypatch.setattr(hosts, "is_main", lambda: False)
  monkeypatch.setattr(generations, "_LOOK_S", 0.02)
  monkeypatch.setattr(generations, "_NOTICE_S", 0.0)
  caplog.set_level("INFO", "dptdr_jax")
  looks = []

  def look(name, yes):  # as if the first process wrote them between the third look and the fourth
    looks.append(yes)
    if len(looks) == 3:
      made = layout.generation(1, 0)
      (made / "pool").mkdir(parents=True)
      (made / "mining.json").write_text("{}")
    return yes

  monkeypatch.setattr(hosts, "all_say", look)
  monkeypatch.setattr(Generations, "_draws_from", lambda self, which: f"generation {which}")
  waiting = Generations(config, layout, PreparedData(layout.prepared), 1, None)
  with concurrent.futures.ThreadPoolExecutor(1) as pool, contextlib.closing(waiting):
    drawn = pool.submit(waiting.at, 3)  # by a thread that makes batches
    for step in range(4):
      waiting.wait_for(step)
    assert drawn.result() == "generation 0"
    assert looks == [False, False, False, True], "once a generation"
    assert list(waiting._groups) == [0], "those before it hold files open, and nobody asks for them"
    late = pool.submit(waiting.at, 4)
    while not waiting._ready._waiters:
      time.sleep(0.01)
    waiting.close()
    with pytest.raises(DptdrError, match="training has ended"):
      late.result()
  assert [record.getMessage() for record in caplog.records] == ["round 1 waits for negatives of generation 0"]


def test_what_mining_fails_of_keeps_its_kind_and_path(directory, tmp_path, monkeypatch):
  config, layout = make_config(directory, rounds=1, train__refresh_every=2), Layout.of(tmp_path)
  monkeypatch.setattr(common, "train_groups", lambda *arguments: types.SimpleNamespace(group_size=2))
  (layout.generation(1, 0) / "retriever").mkdir(parents=True)
  (layout.generation(1, 0) / "retriever/retriever.json").touch()
  for error, same in ((InputError("cut", path="a"), True), (PassingError("away"), True), (ValueError("7"), False)):
    monkeypatch.setattr(Generations, "_mine", mock.Mock(side_effect=error))
    with contextlib.closing(Generations(config, layout, None, 1, None)) as mining:
      mining.resume(2)
      with pytest.raises(DptdrError) as raised:
        mining.at(2)
      assert (raised.value is error) == same
  assert type(raised.value) is DptdrError and str(raised.value) == "mining while round 1 trains failed: 7"


def test_sigterm_in_a_trial_loses_no_generation(directory, tmp_path, monkeypatch):
  config = make_config(directory, rounds=1, train__refresh_every=2, train__steps=5)
  pipeline.run(config, tmp_path / "whole", ["prepare", "train"])
  shutil.copytree(tmp_path / "whole/prepare", tmp_path / "work/prepare")
  trials, evaluate = [], DevTrial.evaluate
  with monkeypatch.context() as stopped, pytest.raises(preemption.Preempted, match="train stands at step 2"):
    stopped.setattr(DevTrial, "evaluate", lambda *arguments: trials.append(1) or evaluate(*arguments))
    stopped.setattr(preemption, "asked", lambda: bool(trials))  # in the trial at the step where generation 1 begins
    pipeline.run(config, tmp_path / "work", ["train"])
  pipeline.run(config, tmp_path / "work", ["train"])
  assert prompts(tmp_path / "work", 1) == prompts(tmp_path / "whole", 1)


def test_a_stop_while_training_waits_for_negatives_is_saved(directory, tmp_path, monkeypatch):
  config = make_config(directory, rounds=1, train__refresh_every=2, train__steps=5, train__evaluate_every=0)
  config.train.checkpoint_every = 100
  pipeline.run(config, tmp_path / "whole", ["prepare", "train"])
  pipeline.run(config, tmp_path / "work", ["prepare"])
  stopped = threading.Event()

  def never(*arguments):  # ends
    stopped.wait()
    raise preemption.Preempted("mining")

  monkeypatch.setattr(mine, "mine", never)
  # Asked after each of two steps; the third time while the third one waits for generation 0.
  times = itertools.count(1)
  monkeypatch.setattr(preemption, "asked", lambda: next(times) == 3)
  with pytest.raises(preemption.Preempted, match="waits for negatives"):
    pipeline.run(config, tmp_path / "work", ["train"])
  stopped.set()
  monkeypatch.undo()
  saved = sorted(path.name for path in (tmp_path / "work/train1/checkpoints").iterdir() if path.name.isdigit())
  assert saved == ["2"]
  pipeline.run(config, tmp_path / "work", ["train"])
  assert prompts(tmp_path / "work", 1) == prompts(tmp_path / "whole", 1)
