"""Operations, collectives and traffic of small programs whose counts are known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dptdr_jax.runtime.mesh import make_mesh
from dptdr_jax.runtime.programs import Program, operations

LAYERS, ROWS, WIDTH = 5, 16, 32
WEIGHTS = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
PRODUCT = 2 * ROWS * WIDTH * WIDTH


def deep(weights, x):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_loops_count_with_their_trips():
  assert operations(jax.jit(deep).trace(WEIGHTS, X)) == LAYERS * PRODUCT
  # Backward: one product for the gradient of each layer's input, one for its weights'.
  loss = jax.value_and_grad(lambda weights, x: jnp.sum(deep(weights, x)), argnums=(0, 1))
  assert operations(jax.jit(loss).trace(WEIGHTS, X)) == 3 * LAYERS * PRODUCT
  again = jax.value_and_grad(lambda weights, x: jnp.sum(jax.checkpoint(deep)(weights, x)), argnums=(0, 1))
  assert operations(jax.jit(again).trace(WEIGHTS, X)) == 4 * LAYERS * PRODUCT


def test_the_dearest_branch_counts():
  branches = [lambda w, x: x, lambda w, x: x @ w[0], deep]
  assert operations(jax.jit(lambda n, w, x: jax.lax.switch(n, branches, w, x)).trace(0, WEIGHTS, X)) == LAYERS * PRODUCT


def test_shards_are_counted_for_all_devices():
  mesh = make_mesh()
  rows = PartitionSpec("data")
  split = jax.shard_map(deep, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)
  assert operations(jax.jit(split).trace(WEIGHTS, X)) == LAYERS * PRODUCT


def test_collectives_within_a_loop_count_with_its_trips():
  mesh = make_mesh()

  def body(x, w):
    return jax.lax.psum(jnp.tanh(x @ w), "data"), None

  rows = PartitionSpec("data")
  summed = jax.shard_map(
    lambda w, x: jax.lax.all_gather(jax.lax.scan(body, x, w)[0], "data", tiled=True),
    mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=PartitionSpec(), check_vma=False,
  )  # fmt: skip
  found = Program(jax.jit(summed).lower(WEIGHTS, X).compile().as_text()).collectives()
  share = ROWS // 8 * WIDTH * 4
  assert {(made.kind, made.size, made.times) for made in found} == {
    ("all-reduce", share, LAYERS), ("all-gather", 8 * share, 1)
  }  # fmt: skip


def test_traffic_counts_a_slice_of_stacked_weights_once():
  text = jax.jit(deep).lower(WEIGHTS, X).compile().as_text()
  once = 4 * (LAYERS * WIDTH * WIDTH + LAYERS * 2 * ROWS * WIDTH)  # every layer's weights, what goes in and out of it
  assert once <= Program(text).traffic() < 4 * once


def test_a_loop_without_a_readable_end_is_an_error():
  program = Program(
    jax.jit(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x)).lower(X).compile().as_text()
  )
  with pytest.raises(ValueError, match="trip count"):
    program.collectives()


def test_shardings_left_to_the_compiler_are_found():
  mesh = make_mesh()
  rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
  step = jax.jit(lambda w, x: x @ w[0], in_shardings=(whole, rows), out_shardings=whole)
  (gather,) = Program(step.lower(WEIGHTS, X).compile().as_text()).collectives()
  assert (gather.kind, gather.size, gather.times) == ("all-gather", ROWS * WIDTH * 4, 1)
