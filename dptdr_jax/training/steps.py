"""From settings to models, optimisers and jitted steps, each step compiled once for all rounds, arms and seeds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dptdr_jax import settings
from dptdr_jax.core.errors import InputError
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.dropout import Dropout
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.runtime import shardings
from dptdr_jax.training.chunks import chunk_count
from dptdr_jax.training.contrastive import make_train_step
from dptdr_jax.training.cross_encoder import CrossModel, make_cross_step
from dptdr_jax.training.encoders import BiEncoder
from dptdr_jax.training.optimizer import Optimizer, make_optimizer, make_schedule
from dptdr_jax.training.pretrain import PretrainModel, make_pretrain_step
from dptdr_jax.training.state import TrainState

Step = functools.partial  # of a jitted step, which takes its seed first: (state, …) → (state, metrics)

_MANY = 10**6  # steps, to check an optimiser's settings before the number of steps is known


def prompt_spec(prompt: settings.Prompt) -> PromptSpec:
  """The prompt of a retriever; a position shift of −1 is the prompt's length."""
  if prompt.kind == "none":
    return PromptSpec(kind="none")
  shift = prompt.length if prompt.position_shift < 0 else prompt.position_shift
  return PromptSpec(
    kind=prompt.kind, length=prompt.length, projection=prompt.projection,
    projection_size=prompt.projection_size if prompt.projection != "none" else 0,
    position_shift=shift if prompt.kind == "deep" else 0, dropout=prompt.dropout, init=prompt.init,
  )  # fmt: skip


def cross_spec(cross: settings.Cross, prompt: settings.Prompt) -> PromptSpec:
  """The cross-encoder's prompt: always deep, and without a position shift, because pairs need the positions."""
  return PromptSpec("deep", length=cross.length, init=prompt.init)


def bi_encoder(
  encoder: EncoderConfig, prompt: settings.Prompt, vector: settings.Vector, train: settings.Train, *, dropout: float,
  compute_dtype: str,
) -> BiEncoder:  # fmt: skip
  """How training turns texts into vectors; `dropout` is backbone.dropout."""
  return BiEncoder(
    encoder, prompt_spec(prompt), vector.pooling, vector.normalize, compute_dtype=compute_dtype,
    dropout=backbone_dropout(dropout), remat=train.remat,
  )  # fmt: skip


def pretrain_model(
  encoder: EncoderConfig, vector: settings.Vector, pretrain: settings.Pretrain, *, dropout: float, compute_dtype: str
) -> PretrainModel:
  """How pretraining turns spans into losses; `dropout` is backbone.dropout."""
  return PretrainModel(
    encoder, vector.pooling, vector.normalize, vector.temperature, pretrain.contrast_weight, pretrain.mlm_weight,
    compute_dtype=compute_dtype, remat=pretrain.remat, dropout=backbone_dropout(dropout),
  )  # fmt: skip


def cross_model(
  encoder: EncoderConfig, cross: settings.Cross, prompt: settings.Prompt, *, dropout: float, compute_dtype: str
) -> CrossModel:
  """How the cross-encoder scores pairs; `dropout` is backbone.dropout."""
  spec, rates = cross_spec(cross, prompt), backbone_dropout(dropout)
  return CrossModel(encoder, spec, cross.head, compute_dtype=compute_dtype, dropout=rates)


def backbone_dropout(rate: float) -> Dropout | None:
  """The backbone's own dropout in training; −1 becomes None: the rates of its config.json."""
  return None if rate < 0 else Dropout(rate, rate)


def optimizer(section: settings.Optimization, steps: int) -> Optimizer:
  """The optimiser of a training of so many steps."""
  rates = section.learning_rate, steps, section.warmup, section.schedule
  return _optimizer(*rates, section.clip, section.weight_decay)


def check_optimizer(section: settings.Optimization) -> None:
  """Raises InputError for settings of an optimiser that do not go together."""
  if section.warmup >= 1 and not section.steps:
    raise InputError("a warmup in steps needs the number of steps, which epochs do not give", value=section.warmup,
                     fix="Set steps, or warmup to a share below 1")  # fmt: skip
  optimizer(section, section.steps or _MANY)


def check_chunk(field: str, chunk: int, rows: int) -> None:
  """Raises InputError if the chunk does not divide a device's share of `rows`, filled up evenly.

  Args:
    field: the setting, such as 'train.query_chunk'.
  """
  section, name = field.split(".")
  devices, side = jax.device_count(), {"cross": "pair", "pretrain": "span"}.get(section, name.removesuffix("_chunk"))
  try:
    chunk_count(-(-rows // devices) * devices, devices, chunk, side)
  except InputError as error:
    raise InputError(f"{field}: {error}; or 0: all at once") from None


def train_step(
  model: BiEncoder, updates: Optimizer, state: TrainState, backbone: Any, *, train: settings.Train, temperature: float,
  seed: int, mesh: Mesh,
) -> tuple[Step, Any, Any]:  # fmt: skip
  """The step of training (see `training.contrastive`), and the shardings of the state and of the frozen backbone.

  Args:
    state, backbone: arrays, or their shapes alone; the backbone is {} if all weights are trained.
  """
  placed = shardings.of_state(state, mesh), shardings.by_rules(backbone, mesh) if backbone else {}
  step = _cached(
    make_train_step, seed, model, updates, placed, mesh=mesh, query_chunk=train.query_chunk,
    passage_chunk=train.passage_chunk, temperature=temperature, both_directions=train.both_directions,
  )  # fmt: skip
  return step, *placed


def pretrain_step(
  model: PretrainModel, updates: Optimizer, state: TrainState, *, chunk: int, seed: int, mesh: Mesh
) -> tuple[Step, Any]:
  """The step of pretraining (see `training.pretrain`) and the state's shardings; `state` may be shapes alone."""
  placed = shardings.of_state(state, mesh)
  return _cached(make_pretrain_step, seed, model, updates, placed, chunk=chunk, mesh=mesh), placed


def cross_step(
  model: CrossModel, updates: Optimizer, state: TrainState, backbone: Any, *, chunk: int, seed: int, mesh: Mesh
) -> tuple[Step, Any, Any]:
  """The step of the cross-encoder (see `training.cross_encoder`), and shardings as in `train_step`."""
  placed = shardings.of_state(state, mesh), shardings.by_rules(backbone, mesh)
  return _cached(make_cross_step, seed, model, updates, placed, chunk=chunk, mesh=mesh), *placed


@functools.lru_cache(maxsize=4)  # equal settings give one object, because steps are cached by it
def _optimizer(peak: float, steps: int, warmup: float, decay: str, clip: float, weight_decay: float) -> Optimizer:
  schedule = make_schedule(peak, steps, warmup=warmup, decay=decay)
  return make_optimizer(schedule, clip=clip, weight_decay=weight_decay)


def _cached(make: Callable, seed: int, model: Any, updates: Optimizer, placed: Any, **options: Any) -> Step:
  """A step of `make` with its seed; those that differ in the seed alone are traced and compiled once per process."""
  leaves, tree = jax.tree.flatten(placed)
  step = _make(make, model, updates, tuple(leaves), tree, tuple(sorted(options.items())))
  return Step(step, np.uint32(seed % 2**32))  # what jax.random.key takes of an integer


@functools.lru_cache(maxsize=4)
def _make(make: Callable, model: Any, updates: Optimizer, leaves: tuple, tree: Any, options: tuple) -> Callable:
  return make(model, updates, shardings=jax.tree.unflatten(tree, leaves), **dict(options))
