"""Jitted steps that take their seed as an argument, so that every seed runs the same compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dptdr_jax.runtime.mesh import replicated
from dptdr_jax.training.optimizer import Optimizer
from dptdr_jax.training.state import apply_gradient


class SeededStep:
  """A step (…) → (state, metrics), of a jitted one that takes the seed (uint32) before everything else.

  A compiled step is called with the seed, too: `compiled(step.seed, …)`.
  """

  def __init__(self, jitted: Callable, seed: int):
    self.jitted, self.seed = jitted, np.uint32(seed % 2**32)  # what jax.random.key takes of an integer

  def __call__(self, *arguments: Any) -> Any:
    return self.jitted(self.seed, *arguments)

  def with_seed(self, seed: int) -> SeededStep:
    """The same program with another seed."""
    return SeededStep(self.jitted, seed)

  def trace(self, *arguments: Any) -> Any:
    """As a jitted function's, of arguments or their shapes."""
    return self.jitted.trace(self.seed, *arguments)

  def lower(self, *arguments: Any) -> Any:
    """As a jitted function's, of arguments or their shapes."""
    return self.jitted.lower(self.seed, *arguments)


def make_step(
  loss_and_gradient: Callable[..., tuple[jax.Array, dict[str, jax.Array], Any]],
  optimizer: Optimizer,
  *,
  seed: int,
  mesh: Mesh,
  state: Any,
  inputs: tuple,
) -> SeededStep:
  """Builds the jitted step (state, *inputs) → (state, metrics); the state is donated.

  Args:
    loss_and_gradient: (state, *inputs, seed=) → loss, metrics, gradient with respect to state.trainable.
    state, inputs: their shardings, leaf by leaf.
  """

  def step(seed: jax.Array, state: Any, *inputs: Any):
    loss, metrics, gradient = loss_and_gradient(state, *inputs, seed=seed)
    state, applied = apply_gradient(state, optimizer, loss, gradient)
    return state, applied | metrics

  whole = replicated(mesh)
  jitted = jax.jit(step, in_shardings=(whole, state, *inputs), out_shardings=(state, whole), donate_argnums=1)
  return SeededStep(jitted, seed)


def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
  """A key for each row of the global batch, [n]: the same whatever the chunks and devices."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
