"""The state of a training."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

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


def apply_gradient(
  state: TrainState, optimizer: Optimizer, loss: jax.Array, gradient: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
  """The state one step later, and scalars: loss, gradient_norm (before clipping), learning_rate.

  If the loss or the norm is not finite, the state is returned unchanged, its step too.
  """
  norm = optax.global_norm(gradient)
  updates, opt_state = optimizer.transform.update(gradient, state.opt_state, state.trainable)
  new = TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  new = jax.tree.map(lambda ours, theirs: jnp.where(finite, ours, theirs), new, state)
  rate = jnp.asarray(optimizer.schedule(state.step), jnp.float32)
  return new, {"loss": loss, "gradient_norm": norm, "learning_rate": rate}


def init_state(trainable: dict[str, Any], optimizer: Optimizer) -> TrainState:
  """The state before the first step: float32 `trainable`, zero moments."""
  return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.transform.init(trainable))
