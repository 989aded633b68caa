"""The loop: whatever interrupts a training, it ends with the same state, metrics and kept candidate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.common import mesh_of

from dptdr_jax.core import preemption
from dptdr_jax.core.errors import DptdrError
from dptdr_jax.runtime.mesh import replicated
from dptdr_jax.runtime.metrics import read_metrics
from dptdr_jax.training.loop import Loop, Task
from dptdr_jax.training.state import TrainState

STEPS = 9


class Died(Exception):
  """Stands in for a sudden death."""


class Batches:
  finite = STEPS

  def load(self, start_step, stop_step, workers):
    for step in range(start_step, stop_step):
      yield {"value": np.float32(step + 1 if step < self.finite else np.nan)}


@jax.jit
def add(state, value):
  total = state.trainable["total"] + value
  metrics = {"loss": 1 / total, "gradient_norm": value, "accuracy": value / STEPS, "tokens": value}
  return TrainState(state.step + 1, {"total": total}, ()), metrics


class Training:
  """Sums up 1 … STEPS. Its dev measure is best at step 4; `strike` may raise wherever something happens."""

  def __init__(self, directory, strike=lambda what, step: None, keeps=True, attempts=True, **task):
    self.directory, self.strike, self.complete = directory, strike, []
    start = TrainState(jnp.zeros((), jnp.int32), {"total": jnp.zeros(())}, ())
    keep, attempt = self.keep if keeps else None, self.attempt if attempts else None
    self.loop = Loop(
      Task("train", self.step, lambda state: float(state.trainable["total"]), keep, attempt, **task),
      jax.device_put(start, replicated(mesh_of(1))), Batches(), directory,
      steps=STEPS, log_every=2, checkpoint_every=3, evaluate_every=2, on_checkpoint=self.on_checkpoint,
    )  # fmt: skip

  def step(self, state, batch):
    self.strike("step", int(state.step) + 1)
    return add(state, batch["value"])

  def attempt(self, candidate):
    self.strike("trial", round((2 * candidate) ** 0.5))
    return {"RR@10": 1 / (1 + abs(candidate - 10)), "R@100": 0.5}

  def keep(self, candidate):
    (self.directory / "kept").write_text(str(candidate))

  def on_checkpoint(self, step):
    assert (self.directory / "checkpoints" / str(step)).is_dir()
    self.complete.append(step)

  def end(self):
    """What a training ends with."""
    self.loop.run()
    records = [
      {name: value for name, value in record.items() if name != "tokens_per_second"}
      for record in read_metrics(self.directory / "metrics.jsonl")
    ]
    kept = self.directory / "kept"
    return float(self.loop.state.trainable["total"]), self.loop.progress.tokens, records, kept.read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  training = Training(tmp_path_factory.mktemp("undisturbed"))
  end = training.end()
  assert end[0] == end[1] == 45 and end[3] == "10.0", "1 + … + 9; the best trial is after 1 + 2 + 3 + 4"
  assert [record["step"] for record in end[2]] == [2, 2, 4, 4, 6, 6, 8, 8, 9, 9]
  assert training.complete == [3, 6, 9]
  return end


@pytest.mark.parametrize("what", ["step", "trial"])
@pytest.mark.parametrize("how", ["death", "SIGTERM"])
def test_interrupted_training_ends_as_an_undisturbed_one(what, how, undisturbed, tmp_path, monkeypatch):
  """Each of nine starts gets a step further than the one before."""
  struck = []

  def strike(kind, step):
    if kind == what and step >= len(starts) and not struck:
      struck.append(step)
      if how == "death":
        raise Died
      if what == "trial":
        raise preemption.Preempted("in the middle of encoding")

  starts = []
  for start in range(1, STEPS + 1):
    starts.append(start)
    with monkeypatch.context() as patched, pytest.raises((Died, preemption.Preempted)):
      patched.setattr(preemption, "asked", lambda: how == "SIGTERM" and what == "step" and bool(struck))
      Training(tmp_path, strike).end()
    struck.clear()
  assert Training(tmp_path).end() == undisturbed


def test_without_trials_the_last_state_is_kept(tmp_path):
  total, _, records, kept = Training(tmp_path, attempts=False).end()
  assert kept == "45.0" and not any("dev/RR@10" in record for record in records)


def test_trials_that_keep_nothing_and_begin_before_the_first_step(tmp_path):
  Training(tmp_path, keeps=False, tries_first=True).loop.run()
  records = list(read_metrics(tmp_path / "metrics.jsonl"))
  assert [record["step"] for record in records if "dev/RR@10" in record] == [0, 2, 4, 6, 8, 9]
  assert all("tokens_per_second" in record for record in records if "loss" in record and record["step"] < STEPS)
  assert not (tmp_path / "kept").exists()


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
  training = Training(tmp_path)
  training.loop.batches.finite = 2
  with pytest.raises(DptdrError, match=r"step 3: loss nan.*train\.learning_rate.*train\.warmup"):
    training.loop.run()
  assert training.complete == []
  assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [2, 2]


class Mining:
  """Generations that begin with every fourth state."""

  def __init__(self, stop_at=None):
    self.calls, self.stop_at = [], stop_at

  def begins_at(self, step, steps):
    return step % 4 == 0 and step + 4 < steps

  def begin(self, step, candidate):
    self.calls.append(("begin", step, candidate))

  def resume(self, step):
    self.calls.append(("resume", step))

  def wait_for(self, step):
    if step == self.stop_at:
      raise preemption.Preempted("waits for negatives", agreed=True)


def test_generations_begin_with_their_states_and_a_stop_while_waiting_is_saved(undisturbed, tmp_path):
  mining = Mining(stop_at=5)
  with pytest.raises(preemption.Preempted, match="waits for negatives"):
    Training(tmp_path, generations=mining).end()
  assert mining.calls == [("begin", 0, 0.0), ("begin", 4, 10.0)]
  mining = Mining()
  assert Training(tmp_path, generations=mining).end() == undisturbed
  assert mining.calls == [("resume", 5)]
