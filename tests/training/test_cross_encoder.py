"""The cross-encoder's step: the loss by numpy, and the same gradient whatever the micro-batches and devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.common import ENCODER, backbone, distance, mesh_of, put

from dptdr_jax.core.errors import InputError
from dptdr_jax.models import cross
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.models.represent import hidden_states
from dptdr_jax.training.cross_encoder import CrossModel, balanced, loss_and_gradient, make_cross_step, weighted_loss
from dptdr_jax.training.optimizer import decay_mask, make_optimizer, make_schedule
from dptdr_jax.training.state import init_state, row_keys

MODEL = CrossModel(ENCODER, PromptSpec("deep", length=4))
OPTIMIZER = make_optimizer(make_schedule(1e-2, 60), weight_decay=0.01)
GROUP = 4


def make_state(devices=1):
  trainable = MODEL.init_trainable(jax.random.key(2))
  for name in ("dense", "output"):  # so that logits are far from 0
    trainable["head"][name] = jax.tree.map(lambda leaf: 20 * leaf, trainable["head"][name])
  return put(init_state(trainable, OPTIMIZER), devices)


def make_batch(seed=0, queries=8):
  """A toy task: a pair is relevant if its third token is one of five."""
  rng = np.random.default_rng(seed)
  count = queries * GROUP
  relevant = np.arange(count) % GROUP == 0
  tokens = rng.integers(5, 60, (count, 8), dtype=np.int32)
  tokens[:, 2] = rng.integers(5, 10, count) + 5 * ~relevant
  return {
    "tokens": tokens,
    "lengths": rng.integers(5, 9, count, dtype=np.int32),
    "segments": np.tile(np.array([0, 1, 1, 0, 2, 2, 2, 2], np.int8), (count, 1)),
    "relevant": relevant,
    "real": np.ones_like(relevant),
  }


@functools.cache
def gradient_of(devices=1, chunk=0):
  run = jax.jit(functools.partial(loss_and_gradient, MODEL, seed=5, chunk=chunk, mesh=mesh_of(devices)))
  return jax.device_get(run(make_state(devices), put(backbone(), devices), make_batch()))


def test_loss_by_numpy():
  logits = np.array([2.0, -1.0, 0.5, -3.0, 0.1, -40.0])
  relevant = np.array([True, False, False, True, False, False])
  probabilities = 1 / (1 + np.exp(-logits))
  positives, negatives = -np.log(probabilities[relevant]), -np.log1p(-probabilities[~relevant])
  loss, right = weighted_loss(jnp.array(logits), relevant, balanced(relevant, np.ones_like(relevant)))
  np.testing.assert_allclose(loss, positives.mean() / 2 + negatives.mean() / 2, rtol=1e-6)
  np.testing.assert_allclose(right, 1 / 2 / 2 + 2 / 4 / 2, rtol=1e-6)
  loss, _ = weighted_loss(jnp.array([-200.0, 200.0]), jnp.array([True, False]), jnp.array([0.5, 0.5]))
  assert loss == 200, "no overflow where a probability rounds to 0"


def test_a_constant_learns_probability_one_half_with_any_number_of_negatives():
  for negatives in (1, 3, 9):
    relevant = jnp.arange(1 + negatives) == 0
    slope = jax.grad(
      lambda x, known=relevant: weighted_loss(jnp.full(known.shape, x), known, balanced(known, jnp.ones_like(known)))[0]
    )
    assert abs(slope(0.0)) < 1e-7


@pytest.mark.parametrize("head", cross.HEADS)
def test_logits_by_numpy(head):
  batch, trainable = make_batch(), jax.device_get(make_state().trainable)
  batch["segments"] *= np.arange(8) < batch["lengths"][:, None]
  batch["segments"][3] = [0, 1, 1, 0, 0, 0, 0, 0]  # a passage without a token
  match = trainable["head"]["match"]
  if head == "first":
    del trainable["head"]["match"]
  arguments = (batch["tokens"], batch["lengths"])
  logits = MODEL.logits(trainable, backbone(), *arguments, batch["segments"])
  hidden = hidden_states(ENCODER, MODEL.prompt, backbone(), trainable["prompt"], *arguments)
  dense, output = trainable["head"]["dense"], trainable["head"]["output"]
  expected = []
  for vectors, length, segments in zip(np.asarray(hidden), batch["lengths"], batch["segments"], strict=True):
    wide = np.tanh(vectors[0] @ dense["kernel"] + dense["bias"])
    logit = (wide @ output["kernel"] + output["bias"])[0]
    if head == "match":
      apart = vectors - vectors[:length].mean(0)
      norms = np.linalg.norm(apart, axis=1)
      cosines = (apart / norms[:, None]) @ (apart / norms[:, None]).T
      best = [cosines[at, segments == 2].max(initial=-1) for at in np.flatnonzero(segments == 1)]
      met = np.average(best, weights=norms[segments == 1])
      logit += np.exp(match["log_scale"][0]) * (met + match["bias"][0])
    expected.append(logit)
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
  assert logits.dtype == np.float32 and np.ptp(logits) > 0.1


def test_match_of_empty_and_longer_padded_texts():
  generator = np.random.default_rng(0)
  hidden, lengths = generator.normal(size=(3, 8, 16)).astype(np.float32), np.array([6, 6, 4])
  hidden[2, :4] = 1  # no token is apart from the others
  segments = np.array([[0, 1, 1, 0, 2, 0, 0, 0], [0, 0, 2, 2, 2, 0, 0, 0], [0, 1, 0, 2, 0, 0, 0, 0]], np.int8)
  met = cross.match(jnp.asarray(hidden), lengths, segments)
  assert met[1] == 0 and abs(met[0]) < 1
  wider = [np.concatenate([part, np.full_like(part, 3)[:, :5]], axis=1) for part in (hidden, 0 * segments)]
  wider[1][:, :8] = segments
  wider[1][:, 8:] = 0
  np.testing.assert_allclose(cross.match(jnp.asarray(wider[0]), lengths, wider[1]), met, atol=1e-6)
  slope = jax.grad(lambda hidden: jnp.sum(cross.match(hidden, lengths, segments)))(jnp.asarray(hidden))
  assert np.isfinite(slope).all() and not slope[0, 6:].any()


def test_gradient_is_that_of_the_plain_loss():
  state, batch = make_state(), make_batch()

  def loss(trainable):
    row_key = jax.random.split(jax.random.fold_in(jax.random.key(5), 0))[0]
    keys = row_keys(row_key, jnp.arange(len(batch["tokens"])))
    arguments = (trainable, backbone(), batch["tokens"], batch["lengths"], batch["segments"])
    logits = MODEL.logits(*arguments, keys=keys)
    return weighted_loss(logits, batch["relevant"], balanced(batch["relevant"], batch["real"]))[0]

  expected_loss, expected = jax.jit(jax.value_and_grad(loss))(state.trainable)
  actual_loss, _, actual = gradient_of()
  np.testing.assert_allclose(actual_loss, expected_loss, rtol=1e-6)
  assert distance(actual, expected) < 1e-6


@pytest.mark.parametrize(("devices", "chunk"), [(1, 4), (8, 0), (8, 2)])
def test_devices_and_micro_batches_do_not_change_the_gradient(devices, chunk):
  whole, other = gradient_of(), gradient_of(devices, chunk)
  for mine, theirs in zip(other, whole, strict=True):
    assert distance(mine, theirs) < 1e-6


def test_the_step_trains_and_measures():
  step = make_cross_step(MODEL, OPTIMIZER, chunk=2, mesh=mesh_of(8))
  state, metrics = step(np.uint32(5), make_state(8), put(backbone(), 8), make_batch())
  np.testing.assert_allclose(metrics["loss"], gradient_of()[0], rtol=1e-5)
  assert set(metrics) == {"loss", "accuracy", "gradient_norm", "learning_rate"}
  assert state.step == 1 and distance(jax.device_get(state.trainable), jax.device_get(make_state().trainable)) > 1e-3


def test_weight_decay_of_the_head():
  mask = decay_mask(MODEL.init_trainable(jax.random.key(0)))
  assert mask["prompt"]["table"] and mask["head"]["dense"] == mask["head"]["output"] == {"kernel": True, "bias": False}
  assert mask["head"]["match"] == {"log_scale": False, "bias": False}


def test_parameters_that_do_not_fit():
  trainable = MODEL.init_trainable(jax.random.key(0))
  cross.check_cross(MODEL.prompt, MODEL.head, trainable, ENCODER)
  with pytest.raises(InputError, match="head/match"):
    cross.check_cross(MODEL.prompt, "first", trainable, ENCODER)
  trainable["head"]["output"]["bias"] = np.zeros(2, np.float32)
  with pytest.raises(InputError, match="head/output/bias has shape"):
    cross.check_cross(MODEL.prompt, MODEL.head, trainable, ENCODER, "prompts.safetensors")
