"""What training carries from step to step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dptdr_jax.training.optimizer import Optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Steps done, the parameters that are trained, the optimiser's state of them.

  `trainable` is {'prompt': …} for one prompt on both sides, {'query': …, 'passage': …} for one each, {'backbone': …}
  where all weights are tuned.
  """

  step: jax.Array
  trainable: dict[str, Any]
  opt_state: Any


def init_state(trainable: dict[str, Any], optimizer: Optimizer) -> TrainState:
  """A state before the first step: float32 `trainable` as it is, zero moments."""
  return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.transform.init(trainable))
