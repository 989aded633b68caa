"""AdamW with warm-up, decay, clipping, and weight decay by parameter name."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dptdr_jax.core.errors import InputError

# Weight decay, as for BERT: everything but biases and norms. A parameter that neither matches is an error, so a renamed
# one cannot lose its rule unnoticed.
DECAYED = r"(kernel|table|/(word|position|token_type)|relative_positions)$"
UNDECAYED = r"(bias|scale)$"


class Optimizer(NamedTuple):
  """The update rule, and the learning rate it uses at a step (int, from 0 → float)."""

  transform: optax.GradientTransformation
  schedule: optax.Schedule


def make_schedule(peak: float, steps: int, *, warmup: float = 0.1, decay: str = "linear") -> optax.Schedule:
  """Learning rate by step, from 0.

  Args:
    peak: the highest rate.
    steps: of the training; the rate would reach 0 (unless constant) at the step after the last.
    warmup: steps of linear rise, as a number (≥ 1) or as a share of `steps` (< 1). The first step has peak / warm-up
      steps rather than 0, so that it is not wasted.
    decay: 'linear', 'cosine' or 'constant', from the end of the warm-up.

  Raises:
    InputError: an unknown decay, a warm-up that is negative or longer than the training.
  """
  if decay not in ("linear", "cosine", "constant"):
    raise InputError("unknown decay of the learning rate", value=decay, fix="Use linear, cosine or constant")
  rise = round(warmup * steps) if warmup < 1 else round(warmup)
  if not 0 <= rise <= steps:
    raise InputError(f"a warm-up of {rise} steps does not fit a training of {steps}", fix="Set a lower warmup")

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    done = jnp.clip((step - rise) / max(steps - rise, 1), 0.0, 1.0)
    falling = {"linear": 1 - done, "cosine": (1 + jnp.cos(jnp.pi * done)) / 2, "constant": jnp.ones_like(done)}[decay]
    return peak * jnp.where(step < rise, (step + 1) / max(rise, 1), falling)

  return schedule


def make_optimizer(schedule: optax.Schedule, *, clip: float = 1.0, weight_decay: float = 0.0) -> Optimizer:
  """AdamW on the gradient clipped to a global norm; b1, b2 and eps are those of Kingma and Ba (optax's defaults).

  Args:
    schedule: from `make_schedule`.
    clip: largest norm of the whole gradient; 0 never clips.
    weight_decay: times the learning rate, on what `DECAYED` matches; the paper has 0 for prompts.
  """
  parts = [optax.clip_by_global_norm(clip)] if clip else []
  parts.append(optax.scale_by_adam())
  if weight_decay:
    parts.append(optax.add_decayed_weights(weight_decay, mask=decay_mask))
  return Optimizer(optax.chain(*parts, optax.scale_by_learning_rate(schedule)), schedule)


def decay_mask(params: Any) -> Any:
  """True for the parameters that weight decay shrinks, in a tree like `params`.

  Raises:
    InputError: nothing would decay, or not exactly one of `DECAYED` and `UNDECAYED` matches a name.
  """

  def decays(path: tuple, _: Any) -> bool:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    decayed, kept = re.search(DECAYED, name), re.search(UNDECAYED, name)
    if bool(decayed) == bool(kept):
      raise InputError("no rule says whether weight decay applies to a parameter", value=name)
    return bool(decayed)

  mask = jax.tree_util.tree_map_with_path(decays, params)
  if not any(jax.tree.leaves(mask)):
    raise InputError("weight decay applies to no parameter", fix="Set weight_decay to 0")
  return mask
