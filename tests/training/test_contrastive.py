"""The step: cached = direct gradients, 8 devices = 1, what moves between devices, what non-finite steps leave alone.

Compiling is what these tests spend their time on, so they share what they compile.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dptdr_jax.core.errors import InputError
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.convert import init_params
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.runtime import shardings
from dptdr_jax.runtime.mesh import WHOLE
from dptdr_jax.training.contrastive import ContrastiveConfig, loss_and_gradient, make_train_step
from dptdr_jax.training.losses import contrastive_loss
from dptdr_jax.training.optimizer import make_optimizer, make_schedule
from dptdr_jax.training.state import init_state
from dptdr_jax.training.towers import TowerModel

ENCODER = EncoderConfig(
  "bert", vocab_size=60, hidden_size=16, num_layers=3, num_heads=2, intermediate_size=32, max_positions=40
)
DEEP = TowerModel(ENCODER, PromptSpec("deep", length=4, position_shift=4))
MODELS = {
  "tied": (DEEP, True),
  "untied": (dataclasses.replace(DEEP, pooling="mean", normalize=True), False),
  "mlp, dropout per batch": (
    dataclasses.replace(DEEP, prompt=PromptSpec("deep", 4, "mlp", 8, dropout_per="batch")),
    True,
  ),
  "fine-tuning": (TowerModel(ENCODER, PromptSpec("none")), True),
}
QUERIES, GROUP = 16, 3
OPTIMIZER = make_optimizer(make_schedule(7e-3, 20))


def mesh_of(count, fsdp=1):
  devices = jax.devices()[:count]
  return jax.make_mesh((count // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


@functools.cache
def backbone():
  # A larger scale than a real start, so that vectors and gradients are far from 0.
  return init_params(jax.random.key(1), dataclasses.replace(ENCODER, initializer_range=0.2))


def make_batch(seed=0, queries=QUERIES):
  rng = np.random.default_rng(seed)
  passages = queries * GROUP
  targets = np.arange(queries, dtype=np.int32) * GROUP
  blocked = rng.random((queries, passages)) < 0.1
  blocked[np.arange(queries), targets] = False
  return {
    "query_tokens": rng.integers(1, 60, (queries, 6), dtype=np.int32),
    "query_lengths": rng.integers(2, 7, queries, dtype=np.int32),
    "passage_tokens": rng.integers(1, 60, (passages, 10), dtype=np.int32),
    "passage_lengths": rng.integers(2, 11, passages, dtype=np.int32),
    "targets": targets,
    "blocked": blocked,
    "repeated": np.arange(passages) % 7 == 6,
  }


def make_state(name, devices=1):
  model, tied = MODELS[name]
  return put(init_state(model.init_trainable(jax.random.key(2), backbone(), tied=tied), OPTIMIZER), devices)


def put(tree, devices):
  """Whole on every one of the first `devices`: jit counts a call with arrays placed otherwise as another one."""
  return jax.device_put(tree, NamedSharding(mesh_of(devices), PartitionSpec()))


@functools.cache
def gradient_of(name, devices=1, query_chunk=0, passage_chunk=0, both_directions=False, fsdp=1):
  config = ContrastiveConfig(5, 0.5, both_directions, query_chunk, passage_chunk)
  mesh = mesh_of(devices, fsdp)

  @jax.jit
  def run(state, backbone, batch):
    return loss_and_gradient(MODELS[name][0], config, mesh, state, backbone, batch)

  state, frozen = make_state(name), backbone()
  if fsdp == 1:
    state, frozen = put(state, devices), put(frozen, devices)
  else:
    state = jax.device_put(state, shardings.of_state(state, mesh))
    frozen = jax.device_put(frozen, shardings.by_rules(frozen, mesh))
  return jax.device_get(run(state, frozen, make_batch()))


def distance(left, right):
  """Relative L2 over all leaves."""
  left, right = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (left, right))
  return np.linalg.norm(left - right) / np.linalg.norm(right)


def test_direct_gradient_is_that_of_the_plain_loss():
  """One jax.grad through everything, with the keys as the step documents them."""
  model, state, batch = DEEP, make_state("tied"), make_batch()

  def loss(trainable):
    vectors = []
    for number, side in enumerate(("query", "passage")):
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 0), number)
      row_key, batch_key = jax.random.split(key)
      tokens = batch[f"{side}_tokens"]
      keys = jax.vmap(jax.random.fold_in, (None, 0))(row_key, jnp.arange(len(tokens)))
      options = {"keys": keys, "batch_key": batch_key}
      vectors.append(model.encode(side, trainable, backbone(), tokens, batch[f"{side}_lengths"], **options))
    options = {"temperature": 0.5, "both_directions": True}
    return contrastive_loss(*vectors, *(batch[name] for name in WHOLE), **options)[0]

  expected_loss, expected = jax.jit(jax.value_and_grad(loss))(state.trainable)
  actual_loss, _, actual = gradient_of("tied", both_directions=True)
  np.testing.assert_allclose(actual_loss, expected_loss, rtol=1e-6)
  assert distance(actual, expected) < 1e-6


@pytest.mark.parametrize("name", ["untied", "mlp, dropout per batch"])
def test_gradient_cache_equals_direct_with_dropout_on(name):
  direct, cached = gradient_of(name), gradient_of(name, query_chunk=4, passage_chunk=6)
  assert distance(cached[0], direct[0]) < 1e-6
  assert distance(cached[2], direct[2]) < 1e-6


@pytest.mark.parametrize(("name", "chunks"), [("tied", (0, 0)), ("fine-tuning", (1, 3))])
def test_eight_devices_equal_one(name, chunks):
  one, eight = gradient_of(name), gradient_of(name, 8, *chunks)
  assert distance(eight[0], one[0]) < 1e-6
  assert distance(eight[2], one[2]) < 1e-6


@pytest.mark.parametrize(("name", "fsdp", "chunks"), [("untied", 2, (1, 3)), ("fine-tuning", 8, (0, 3))])
def test_a_backbone_split_over_devices_gives_the_same(name, fsdp, chunks):
  one, split = gradient_of(name), gradient_of(name, 8, *chunks, fsdp=fsdp)
  assert distance(split[0], one[0]) < 1e-6
  assert distance(split[2], one[2]) < 1e-6


def test_rows_that_fill_the_devices_up_count_for_nothing():
  one, batch = gradient_of("tied"), make_batch()
  config, mesh = ContrastiveConfig(5, 0.5), mesh_of(5)
  for name, value in batch.items():
    if name not in WHOLE:
      batch[name] = np.concatenate([value, np.repeat(value[:1], -len(value) % 5, 0)])
  run = jax.jit(functools.partial(loss_and_gradient, DEEP, config, mesh))
  loss, _, gradient = jax.device_get(run(make_state("tied", 5), put(backbone(), 5), batch))
  assert distance(loss, one[0]) < 1e-6 and distance(gradient, one[2]) < 1e-6


@functools.cache
def make_step(name, devices, query_chunk=0, passage_chunk=0, optimizer=OPTIMIZER):
  return make_train_step(
    MODELS[name][0], optimizer, seed=5, query_chunk=query_chunk, passage_chunk=passage_chunk,
    temperature=0.5, both_directions=False, mesh=mesh_of(devices),
  )  # fmt: skip


def train(devices, *chunks):
  step, state, metrics = make_step("tied", devices, *chunks), make_state("tied", devices), []
  frozen, before = put(backbone(), devices), step.jitted._cache_size()
  for number in range(5):
    state, measured = step(state, frozen, make_batch(number))
    metrics.append(jax.device_get(measured))
  assert step.jitted._cache_size() == before + 1, "the same shapes compile once"
  return jax.device_get(state), metrics


def test_five_steps_on_eight_devices_in_chunks():
  one, metrics = train(1)
  eight, _ = train(8, 1, 2)
  assert distance(eight.trainable, one.trainable) < 1e-4
  assert one.step == eight.step == 5
  assert set(metrics[0]) == {"loss", "accuracy", "positive_score", "gradient_norm", "learning_rate"}
  np.testing.assert_allclose([m["learning_rate"] for m in metrics[:3]], [3.5e-3, 7e-3, 7e-3], rtol=1e-6)
  loss, _, gradient = gradient_of("tied")
  np.testing.assert_allclose(metrics[0]["loss"], loss, rtol=1e-5)
  norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
  np.testing.assert_allclose(metrics[0]["gradient_norm"], norm, rtol=1e-5)


def test_training_lowers_the_loss():
  # A rate high enough for the fall (from 10 to 5) to stand far above what dropout's noise and a machine's rounding do.
  optimizer = make_optimizer(make_schedule(5e-2, 40))
  step, state, losses = make_step("tied", 1, optimizer=optimizer), make_state("tied"), []
  for _ in range(40):
    state, metrics = step(state, backbone(), make_batch())
    losses.append(float(metrics["loss"]))
  assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:4])


def test_masks_change_with_the_step_and_the_seed_and_nothing_else():
  step, losses, programs = make_step("tied", 1), [], set()
  for seed, number in ((5, 0), (5, 1), (5, 0), (6, 0)):
    state = dataclasses.replace(make_state("tied"), step=jnp.int32(number))
    losses.append(float(step.with_seed(seed)(state, backbone(), make_batch())[1]["loss"]))
    programs.add(step.jitted._cache_size())
  assert losses[0] == losses[2] and len(set(losses)) == 3
  assert len(programs) == 1, "one program for all seeds"


def test_non_finite_step_leaves_the_state_as_it_was():
  step, before = make_step("tied", 8, 1, 2), jax.device_get(make_state("tied"))
  broken = jax.tree.map(lambda leaf: leaf * jnp.nan, backbone())
  after, metrics = step(make_state("tied", 8), put(broken, 8), make_batch())
  assert np.isnan(metrics["loss"])
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), before)
  after, metrics = step(after, put(backbone(), 8), make_batch())
  assert np.isfinite(metrics["loss"]) and after.step == 1


def test_backbone_is_not_donated_and_the_state_is():
  step, state = make_step("tied", 1), make_state("tied")
  frozen = put(backbone(), 1)
  table = state.trainable["prompt"]["table"]
  step(state, frozen, make_batch())
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
  assert table.is_deleted()


def collectives(text):
  """(kind, shapes) of every collective in an HLO text."""
  pattern = r"= (.+?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
  return [(kind, re.findall(r"\w+\[([\d,]*)\]", shapes)) for shapes, kind in re.findall(pattern, text)]


def test_only_vectors_and_the_prompt_gradient_move_between_devices():
  placed = make_state("tied", 8), put(backbone(), 8)
  moved = collectives(make_step("tied", 8, 1, 2).lower(*placed, make_batch()).compile().as_text())
  vectors = sorted(shape for kind, shapes in moved if kind == "all-gather" for shape in shapes)
  assert vectors == sorted(f"{rows},{ENCODER.hidden_size}" for rows in (QUERIES, QUERIES * GROUP))
  others = [(kind, shape) for kind, shapes in moved if kind != "all-gather" for shape in shapes]
  assert others == [("all-reduce", "4,96")] * 2, "once a side, in no loop"


def test_along_fsdp_weights_are_gathered_and_no_activations():
  # Long texts, so that a layer's rows are larger than its weights, which are 16 × 32 numbers at most.
  mesh, state, frozen = mesh_of(8, 4), make_state("tied"), backbone()
  placed = shardings.of_state(state, mesh), shardings.by_rules(frozen, mesh)
  step = make_train_step(
    DEEP, OPTIMIZER, seed=5, query_chunk=0, passage_chunk=0, temperature=0.5, both_directions=False, mesh=mesh,
    shardings=placed,
  )  # fmt: skip
  abstract, batch = jax.eval_shape(lambda: (state, frozen)), make_batch()
  for side, rows in ("query", QUERIES), ("passage", QUERIES * GROUP):
    batch[f"{side}_tokens"] = jax.ShapeDtypeStruct((rows, 32), jnp.int32)
  moved = collectives(step.lower(*abstract, batch).compile().as_text())
  sizes = [math.prod(map(int, shape.split(","))) for kind, shapes in moved if kind == "all-gather" for shape in shapes]
  table = ENCODER.vocab_size * ENCODER.hidden_size
  assert sizes and max(sizes) <= max(table, 48 * 16), "48 vectors, and the table of words; 6 × 32 rows of 16 are 3072"


@pytest.mark.parametrize(
  ("queries", "chunks", "words"),
  [
    (32, (3, 0), "query chunk of 3 .* 4 rows .*These do: 1, 2, 4"),
    (16, (0, 4), "passage chunk of 4 .* 6 rows .*These do: 1, 2, 3, 6"),
    (12, (0, 0), "12 query rows .* 8 devices"),
  ],
)
def test_batches_that_do_not_divide(queries, chunks, words):
  config = ContrastiveConfig(5, 0.5, False, *chunks)
  trace = functools.partial(loss_and_gradient, DEEP, config, mesh_of(8))
  with pytest.raises(InputError, match=words):
    jax.eval_shape(trace, make_state("tied", 8), backbone(), make_batch(queries=queries))
