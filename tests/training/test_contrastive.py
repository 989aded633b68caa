"""The contrastive step: the gradient of the plain loss whatever the chunks and devices, and what crosses devices.

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
from training.common import ENCODER, backbone, distance, mesh_of, put

from dptdr_jax.core.errors import InputError
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.runtime import shardings
from dptdr_jax.runtime.mesh import WHOLE
from dptdr_jax.training.contrastive import loss_and_gradient, make_train_step
from dptdr_jax.training.encoders import BiEncoder
from dptdr_jax.training.losses import contrastive_loss
from dptdr_jax.training.optimizer import make_optimizer, make_schedule
from dptdr_jax.training.state import init_state, row_keys

DEEP = BiEncoder(ENCODER, PromptSpec("deep", length=4, position_shift=4))
MODELS = {
  "tied": (DEEP, True),
  "untied": (dataclasses.replace(DEEP, pooling="mean", normalize=True), False),
  "mlp": (dataclasses.replace(DEEP, prompt=PromptSpec("deep", 4, "mlp", 8)), True),
  "fine-tuning": (BiEncoder(ENCODER, PromptSpec("none")), True),
}
QUERIES, GROUP = 16, 3
SEED = np.uint32(5)
OPTIMIZER = make_optimizer(make_schedule(7e-3, 20))


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


def run_of(name, mesh, chunks=(0, 0), **options):
  options |= {"query_chunk": chunks[0], "passage_chunk": chunks[1], "mesh": mesh, "temperature": 0.5, "seed": 5}
  return functools.partial(loss_and_gradient, MODELS[name][0], **options)


@functools.cache
def gradient_of(name, devices=1, fsdp=1, chunks=(0, 0), both_directions=False):
  mesh, state = mesh_of(devices, fsdp), make_state(name)
  state = jax.device_put(state, shardings.of_state(state, mesh))
  frozen = jax.device_put(backbone(), shardings.by_rules(backbone(), mesh))
  run = jax.jit(run_of(name, mesh, chunks, both_directions=both_directions))
  return jax.device_get(run(state, frozen, make_batch()))


def test_gradient_is_that_of_the_plain_loss():
  """One jax.grad through everything, with the keys as the step documents them."""
  state, batch = make_state("tied"), make_batch()

  def loss(trainable):
    vectors = []
    for number, side in enumerate(("query", "passage")):
      row_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 0), number))[0]
      tokens, lengths = batch[f"{side}_tokens"], batch[f"{side}_lengths"]
      keys = row_keys(row_key, jnp.arange(len(tokens)))
      vectors.append(DEEP.encode(side, trainable, backbone(), tokens, lengths, keys=keys))
    options = {"temperature": 0.5, "both_directions": True}
    return contrastive_loss(*vectors, *(batch[name] for name in WHOLE), **options)[0]

  expected_loss, expected = jax.jit(jax.value_and_grad(loss))(state.trainable)
  actual_loss, _, actual = gradient_of("tied", both_directions=True)
  np.testing.assert_allclose(actual_loss, expected_loss, rtol=1e-6)
  assert distance(actual, expected) < 1e-6


@pytest.mark.parametrize(
  ("name", "devices", "fsdp", "chunks"),
  [
    ("untied", 1, 1, (4, 6)),
    ("mlp", 1, 1, (4, 6)),
    ("tied", 8, 1, (0, 0)),
    ("fine-tuning", 8, 1, (1, 3)),
    ("untied", 8, 2, (1, 3)),
    ("fine-tuning", 8, 8, (0, 3)),
  ],
)
def test_chunks_and_devices_do_not_change_the_gradient(name, devices, fsdp, chunks):
  plain, other = gradient_of(name), gradient_of(name, devices, fsdp, chunks)
  assert distance(other[0], plain[0]) < 1e-6
  assert distance(other[2], plain[2]) < 1e-6


def test_rows_that_fill_up_the_devices_count_for_nothing():
  plain, batch = gradient_of("tied"), make_batch()
  for name, value in batch.items():
    if name not in WHOLE:
      batch[name] = np.concatenate([value, np.repeat(value[:1], -len(value) % 5, 0)])
  run = jax.jit(run_of("tied", mesh_of(5)))
  loss, _, gradient = jax.device_get(run(make_state("tied", 5), put(backbone(), 5), batch))
  assert distance(loss, plain[0]) < 1e-6 and distance(gradient, plain[2]) < 1e-6


@functools.cache
def make_step(devices, chunks=(0, 0)):
  return make_train_step(
    DEEP, OPTIMIZER, query_chunk=chunks[0], passage_chunk=chunks[1], temperature=0.5, both_directions=False,
    mesh=mesh_of(devices),
  )  # fmt: skip


def test_five_steps_on_eight_devices_in_chunks_equal_one_device():
  states, metrics = {}, {}
  for devices, chunks in ((1, (0, 0)), (8, (1, 2))):
    step, state, frozen = make_step(devices, chunks), make_state("tied", devices), put(backbone(), devices)
    before, table, metrics[devices] = step._cache_size(), state.trainable["prompt"]["table"], []
    for number in range(5):
      state, measured = step(SEED, state, frozen, make_batch(number))
      metrics[devices].append(jax.device_get(measured))
    assert step._cache_size() == before + 1, "the same shapes compile once"
    assert table.is_deleted(), "the state is donated"
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    states[devices] = jax.device_get(state)
  assert distance(states[8].trainable, states[1].trainable) < 1e-4
  assert states[1].step == states[8].step == 5
  first, (loss, _, gradient) = metrics[1][0], gradient_of("tied")
  assert set(first) == {"loss", "accuracy", "positive_score", "gradient_norm", "learning_rate"}
  np.testing.assert_allclose([m["learning_rate"] for m in metrics[1][:3]], [3.5e-3, 7e-3, 7e-3], rtol=1e-6)
  np.testing.assert_allclose(first["loss"], loss, rtol=1e-5)
  norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
  np.testing.assert_allclose(first["gradient_norm"], norm, rtol=1e-5)


def test_masks_change_with_the_step_and_the_seed_and_nothing_else():
  step, losses, programs = make_step(1), [], set()
  for seed, number in ((5, 0), (5, 1), (5, 0), (6, 0)):
    state = dataclasses.replace(make_state("tied"), step=jnp.int32(number))
    losses.append(float(step(np.uint32(seed), state, backbone(), make_batch())[1]["loss"]))
    programs.add(step._cache_size())
  assert losses[0] == losses[2] and len(set(losses)) == 3
  assert len(programs) == 1, "one program for all seeds"


def test_non_finite_step_leaves_the_state_unchanged():
  step, before = make_step(8, (1, 2)), jax.device_get(make_state("tied"))
  broken = jax.tree.map(lambda leaf: leaf * jnp.nan, backbone())
  after, metrics = step(SEED, make_state("tied", 8), put(broken, 8), make_batch())
  assert np.isnan(metrics["loss"])
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), before)
  after, metrics = step(SEED, after, put(backbone(), 8), make_batch())
  assert np.isfinite(metrics["loss"]) and after.step == 1


def collectives(text):
  """(kind, shapes) of every collective in an HLO text."""
  pattern = r"= (.+?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
  return [(kind, re.findall(r"\w+\[([\d,]*)\]", shapes)) for shapes, kind in re.findall(pattern, text)]


def test_only_vectors_and_the_prompt_gradient_cross_devices():
  placed = make_state("tied", 8), put(backbone(), 8)
  moved = collectives(make_step(8, (1, 2)).trace(SEED, *placed, make_batch()).lower().compile().as_text())
  vectors = sorted(shape for kind, shapes in moved if kind == "all-gather" for shape in shapes)
  assert vectors == sorted(f"{rows},{ENCODER.hidden_size}" for rows in (QUERIES, QUERIES * GROUP))
  others = [(kind, shape) for kind, shapes in moved if kind != "all-gather" for shape in shapes]
  assert others == [("all-reduce", "4,64")] * 2, "once a side, in no loop"


def test_along_fsdp_weights_are_gathered_and_no_activations():
  # Long texts, so that a layer's rows are larger than its weights, which are 16 × 32 numbers at most.
  mesh, state, frozen = mesh_of(8, 4), make_state("tied"), backbone()
  placed = shardings.of_state(state, mesh), shardings.by_rules(frozen, mesh)
  step = make_train_step(DEEP, OPTIMIZER, mesh=mesh, shardings=placed)
  abstract, batch = jax.eval_shape(lambda: (state, frozen)), make_batch()
  for side, rows in ("query", QUERIES), ("passage", QUERIES * GROUP):
    batch[f"{side}_tokens"] = jax.ShapeDtypeStruct((rows, 32), jnp.int32)
  moved = collectives(step.trace(SEED, *abstract, batch).lower().compile().as_text())
  sizes = [math.prod(map(int, shape.split(","))) for kind, shapes in moved if kind == "all-gather" for shape in shapes]
  table = ENCODER.vocab_size * ENCODER.hidden_size
  assert sizes and max(sizes) <= max(table, 48 * 16), "48 vectors, and the word table; 6 × 32 rows of 16 are 3072"


@pytest.mark.parametrize(
  ("queries", "chunks", "words"),
  [
    (32, (3, 0), "query chunk of 3 .* 4 rows .*These do: 1, 2, 4"),
    (16, (0, 4), "passage chunk of 4 .* 6 rows .*These do: 1, 2, 3, 6"),
    (12, (0, 0), "12 query rows .* 8 devices"),
  ],
)
def test_batches_that_do_not_divide(queries, chunks, words):
  with pytest.raises(InputError, match=words):
    jax.eval_shape(run_of("tied", mesh_of(8), chunks), make_state("tied", 8), backbone(), make_batch(queries=queries))
