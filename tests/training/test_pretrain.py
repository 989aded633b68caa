"""The pretraining step: the same loss and gradient whatever the cache, the devices and the recomputing, dropout on.

Compiling is what these tests spend their time on, so they share what they compile.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from training.common import ENCODER, backbone, distance, mesh_of

from dptdr_jax.core.errors import InputError
from dptdr_jax.runtime.checkpoints import Checkpoints
from dptdr_jax.runtime.mesh import put_batch
from dptdr_jax.runtime.shardings import RULES, by_rules
from dptdr_jax.training.optimizer import make_optimizer, make_schedule
from dptdr_jax.training.pretrain import PretrainModel, loss_and_gradient, make_pretrain_step, span_contrast
from dptdr_jax.training.state import init_state

MODELS = {
  "both": PretrainModel(ENCODER, temperature=0.5),
  "contrast": PretrainModel(ENCODER, temperature=0.5, mlm_weight=0.0),
  "words": PretrainModel(ENCODER, temperature=0.5, contrast_weight=0.0),
  "remat": PretrainModel(ENCODER, temperature=0.5, remat="layer"),
  "bfloat16": PretrainModel(ENCODER, temperature=0.5, compute_dtype=jnp.bfloat16),
}
OPTIMIZER = make_optimizer(make_schedule(1e-3, 20), weight_decay=0.01)
SPANS = 32


def make_batch(seed=0, masked=True):
  rng = np.random.default_rng(seed)
  batch = {
    "tokens": rng.integers(1, 60, (SPANS, 16), dtype=np.int32),
    "lengths": rng.integers(4, 17, SPANS, dtype=np.int32),
    "groups": np.repeat(np.arange(SPANS // 2, dtype=np.int32), 2),
  }
  if masked:
    batch["positions"] = rng.integers(0, 4, (SPANS, 8), dtype=np.int32)
    batch["labels"] = np.where(rng.random((SPANS, 8)) < 0.5, rng.integers(0, 60, (SPANS, 8)), -1).astype(np.int32)
  return batch


def make_state(name, mesh):
  state = init_state(MODELS[name].init_trainable(jax.random.key(2), backbone(), None), OPTIMIZER)
  return jax.device_put(state, by_rules(state, mesh))


@functools.cache
def gradient_of(name, devices=1, fsdp=1, chunk=0):
  mesh = mesh_of(devices, fsdp)
  batch = put_batch(make_batch(masked=MODELS[name].mlm_weight > 0), mesh, whole=("groups",))
  run = jax.jit(functools.partial(loss_and_gradient, MODELS[name], seed=3, chunk=chunk, mesh=mesh))
  return jax.device_get(run(make_state(name, mesh), batch))


@pytest.mark.parametrize(
  ("devices", "fsdp", "chunk", "name"),
  [(8, 2, 0, "both"), (1, 1, 8, "both"), (8, 2, 2, "both"), (1, 1, 0, "remat"), (1, 1, 8, "words")],
)
def test_cache_devices_and_recomputing_change_nothing(devices, fsdp, chunk, name):
  loss, metrics, gradient = gradient_of(name, devices, fsdp, chunk)
  wanted, wanted_metrics, wanted_gradient = gradient_of("words" if name == "words" else "both")
  assert loss == pytest.approx(wanted, rel=1e-6)
  assert distance(gradient, wanted_gradient) < 1e-6
  as_floats = [{k: float(v) for k, v in figures.items()} for figures in (metrics, wanted_metrics)]
  assert as_floats[0] == pytest.approx(as_floats[1], rel=1e-5)
  assert as_floats[0]["contrastive_loss"] == pytest.approx(as_floats[1]["contrastive_loss"], rel=1e-6)


def test_dropout_is_on_and_a_function_of_the_step_and_the_row():
  model, trainable = MODELS["both"], make_state("both", mesh_of(1)).trainable
  spans = {name: value for name, value in make_batch().items() if name != "groups"}
  run = jax.jit(lambda key, rows: model.outputs(trainable, key, spans | {"rows": rows}))
  key, rows = jax.random.key(0), jnp.arange(SPANS)
  usual, other = run(key, rows), run(jax.random.key(1), rows)
  moved = run(key, rows.at[0].set(SPANS))
  for name in ("vectors", "nll"):
    assert np.abs(usual[name] - other[name]).max() > 1e-2
    assert np.abs(usual[name] - moved[name])[0].max() > 1e-3
    np.testing.assert_array_equal(usual[name][1:], moved[name][1:])


def test_bfloat16_computes_and_float32_is_trained():
  loss, _, gradient = gradient_of("bfloat16", chunk=8)
  wanted, _, wanted_gradient = gradient_of("both")
  assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype(np.float32)}
  assert loss == pytest.approx(wanted, rel=1e-2) and loss != wanted
  assert distance(gradient, wanted_gradient) < 0.05


def test_the_losses_add_up_and_either_stands_alone():
  loss, metrics, gradient = gradient_of("both")
  contrast, words = gradient_of("contrast"), gradient_of("words")
  assert loss == pytest.approx(metrics["contrastive_loss"] + metrics["mlm_loss"])
  assert "mlm_loss" not in contrast[1] and set(contrast[2]) == {"backbone"}
  assert contrast[0] == pytest.approx(metrics["contrastive_loss"], rel=1e-6)
  assert words[0] == pytest.approx(metrics["mlm_loss"], rel=1e-6)
  total = jax.tree.map(jnp.add, contrast[2]["backbone"], words[2]["backbone"])
  assert distance(total, gradient["backbone"]) < 1e-5
  assert distance(words[2]["mlm_head"], gradient["mlm_head"]) < 1e-6


def test_contrast_by_hand():
  vectors = np.array([[1.0, 0], [1, 0], [0, 2], [0, 1], [1, 1], [3, 3]], np.float32)
  groups = np.array([0, 0, 1, 1, 0, 0], np.int32)  # the first passage came twice
  loss, metrics = span_contrast(jnp.array(vectors), jnp.array(groups), 0.5)
  scores, losses = vectors @ vectors.T / 0.5, []
  for row, partner in enumerate([1, 0, 3, 2, 5, 4]):
    seen = [c for c in range(6) if c == partner or groups[c] != groups[row]]
    losses.append(np.log(np.exp(scores[row, seen]).sum()) - scores[row, partner])
  assert loss == pytest.approx(np.mean(losses), rel=1e-6)
  assert metrics["accuracy"] == pytest.approx(3 / 6)  # rows 2 and 3 score higher with row 5, which has a tie
  assert metrics["alignment"] == pytest.approx(0, abs=1e-6)
  unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  pairs = [np.exp(-2 * ((unit[i] - unit[j]) ** 2).sum()) for i in range(6) for j in range(6) if groups[i] != groups[j]]
  assert metrics["uniformity"] == pytest.approx(np.log(np.mean(pairs)), rel=1e-5)


def test_training_moves_from_8_devices_to_4(tmp_path):
  def steps(mesh, state, first, last):
    step = make_pretrain_step(MODELS["both"], OPTIMIZER, chunk=0, mesh=mesh, shardings=by_rules(state, mesh))
    for number in range(first, last):
      state, metrics = step(np.uint32(3), state, put_batch(make_batch(number), mesh, whole=("groups",)))
    return state, metrics

  eight, four = mesh_of(8, 2), mesh_of(4, 4)
  begun, _ = steps(eight, make_state("both", eight), 0, 1)
  assert begun.trainable["backbone"]["layers"]["query"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", None)
  moment = begun.opt_state[1].mu["backbone"]["embeddings"]["word"]
  assert moment.addressable_shards[0].data.shape == (60, 8)  # half of the width
  host = jax.device_get(begun)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, begun)
  checkpoints.wait()
  _, moved, _ = checkpoints.restore(make_state("both", four))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(moved), host)
  stayed, metrics = steps(eight, begun, 1, 4)
  resumed, others = steps(four, moved, 1, 4)
  assert distance(jax.device_get(resumed.trainable), jax.device_get(stayed.trainable)) < 1e-4
  assert float(others["gradient_norm"]) == pytest.approx(float(metrics["gradient_norm"]), rel=1e-3)
  assert int(resumed.step) == 4


def test_every_parameter_has_one_rule_and_every_rule_a_parameter():
  mesh = mesh_of(8, 2)
  state = make_state("both", mesh)
  with pytest.raises(InputError, match="matches no parameter.*adapter"):
    by_rules(state, mesh, (*RULES, ("/adapter$", ())))
  with pytest.raises(InputError, match="0 sharding rules cover a parameter.*bias"):
    by_rules(state, mesh, RULES[:2])
  odd = {"layer": {"kernel": jax.ShapeDtypeStruct((15, 4), np.float32)}}
  with pytest.raises(InputError, match="does not divide over 2 devices along 'fsdp'"):
    by_rules(odd, mesh)
  assert by_rules(np.zeros(()), mesh, ()) == NamedSharding(mesh, PartitionSpec())


def test_impossible_weights():
  with pytest.raises(InputError, match="nor both 0"):
    PretrainModel(ENCODER, contrast_weight=0.0, mlm_weight=0.0)
  with pytest.raises(InputError, match="covers BERT and RoBERTa"):
    PretrainModel(dataclasses.replace(ENCODER, family="deberta"))
