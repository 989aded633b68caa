"""The state of a training, and its step: jitted, with the seed as an argument, so that every seed runs one program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dptdr_jax.runtime.mesh import replicated
from dptdr_jax.training.optimizer import Optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Steps done, trained parameters, and their optimiser state.

  `trainable` is {'prompt': …} for one prompt on both sides, {'query': …, 'passage': …} for one each, or
  {'backbone': …} if all weights are trained.
  """

  step: jax.Array
  trainable: dict[str, Any]
  opt_state: Any


def init_state(trainable: dict[str, Any], optimizer: Optimizer) -> TrainState:
  """The state before the first step: float32 `trainable`, zero moments."""
  return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.transform.init(trainable))


def make_step(
  loss_and_gradient: Callable[..., tuple[jax.Array, dict[str, jax.Array], Any]],
  optimizer: Optimizer,
  *,
  mesh: Mesh,
  state: Any,
  inputs: tuple,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Builds the jitted step (seed, state, *inputs) → (state, metrics); the state is donated, inputs never.

  It compiles once for each set of shapes; the seed is uint32. Metrics are float32 scalars: those of `loss_and_gradient`
  and loss, gradient_norm (before clipping), learning_rate. If the loss or the norm is not finite, the state is returned
  unchanged, its step too.

  Args:
    loss_and_gradient: (state, *inputs, seed=) → loss, metrics, gradient with respect to state.trainable.
    state, inputs: their shardings, leaf by leaf.
  """

  def step(seed: jax.Array, state: TrainState, *inputs: Any):
    loss, metrics, gradient = loss_and_gradient(state, *inputs, seed=seed)
    norm = optax.global_norm(gradient)
    updates, opt_state = optimizer.transform.update(gradient, state.opt_state, state.trainable)
    new = TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new = jax.tree.map(lambda ours, theirs: jnp.where(finite, ours, theirs), new, state)
    rate = jnp.asarray(optimizer.schedule(state.step), jnp.float32)
    return new, {"loss": loss, "gradient_norm": norm, "learning_rate": rate} | metrics

  whole = replicated(mesh)
  return jax.jit(step, in_shardings=(whole, state, *inputs), out_shardings=(state, whole), donate_argnums=1)


def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
  """A key for each row of the global batch, [n]: the same whatever the chunks and devices."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
