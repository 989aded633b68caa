"""The jitted steps that a config describes: `train` and `pretrain` run them, `plan` compiles them from shapes alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dptdr_jax import backbone as backbones
from dptdr_jax.core.errors import InputError
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.dropout import Dropout
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.runtime import shardings
from dptdr_jax.training.chunks import chunk_count
from dptdr_jax.training.contrastive import make_train_step
from dptdr_jax.training.optimizer import Optimizer, make_optimizer, make_schedule
from dptdr_jax.training.pretrain import PretrainModel, make_pretrain_step
from dptdr_jax.training.seeded import SeededStep
from dptdr_jax.training.state import TrainState
from dptdr_jax.training.towers import TowerModel

_MANY = 10**6  # steps, where their number is not known yet and only the settings are to be checked


def prompt_spec(config: ConfigDict) -> PromptSpec:
  """The prompt that the config describes; a position shift of −1 is the prompt's length."""
  prompt = config.prompt
  if prompt.kind == "none":
    return PromptSpec(kind="none")
  shift = prompt.length if prompt.position_shift < 0 else prompt.position_shift
  return PromptSpec(
    kind=prompt.kind, length=prompt.length, projection=prompt.projection,
    projection_size=prompt.projection_size if prompt.projection != "none" else 0,
    position_shift=shift if prompt.kind == "deep" else 0,
    dropout=prompt.dropout, dropout_per=prompt.dropout_per, init=prompt.init, init_scale=prompt.init_scale,
  )  # fmt: skip


def tower_model(config: ConfigDict, encoder: EncoderConfig, compute_dtype: str) -> TowerModel:
  """How training turns texts into vectors."""
  return TowerModel(
    encoder, prompt_spec(config), config.vector.pooling, config.vector.normalize, compute_dtype=compute_dtype,
    dropout=dropout(config.train.backbone_dropout), remat=config.train.remat,
  )  # fmt: skip


def pretrain_model(config: ConfigDict, encoder: EncoderConfig) -> PretrainModel:
  """How pretraining turns spans into losses."""
  pretrain = config.pretrain
  return PretrainModel(
    encoder, config.vector.pooling, pretrain.normalize, pretrain.temperature, pretrain.contrast_weight,
    pretrain.mlm_weight, compute_dtype=backbones.resolve_dtype(config.compute_dtype), remat=pretrain.remat,
    dropout=dropout(pretrain.dropout),
  )  # fmt: skip


def optimizer(section: ConfigDict, steps: int) -> Optimizer:
  """The optimiser of config.train or config.pretrain."""
  rates = section.learning_rate, steps, section.warmup, section.schedule
  return _optimizer(*rates, section.clip, section.weight_decay)


def check_optimizer(section: ConfigDict) -> None:
  """Raises InputError for settings of an optimiser that do not go together."""
  if section.warmup >= 1 and not section.steps:
    raise InputError("a warm-up of so many steps, and how many there are in all is not known yet", value=section.warmup,
                     fix="Set steps, or warmup to a share below 1")  # fmt: skip
  optimizer(section, section.steps or _MANY)


def check_chunk(config: ConfigDict, field: str, rows: int) -> None:
  """Raises InputError where the chunk in `field` does not divide a device's share of `rows`, filled up evenly."""
  devices, (section, name) = jax.device_count(), field.split(".")
  side = "pair" if section == "cross" else name.removesuffix("_chunk")
  try:
    chunk_count(-(-rows // devices) * devices, devices, config[section][name], side)
  except InputError as error:
    raise InputError(f"{field}: {error}; or 0: all at once") from None


@functools.lru_cache(maxsize=4)  # equal ones are one: a step is known by it
def _optimizer(peak: float, steps: int, warmup: float, decay: str, clip: float, weight_decay: float) -> Optimizer:
  schedule = make_schedule(peak, steps, warmup=warmup, decay=decay)
  return make_optimizer(schedule, clip=clip, weight_decay=weight_decay)


def train_step(
  config: ConfigDict, model: TowerModel, updates: Optimizer, state: TrainState, backbone: Any, mesh: Mesh
) -> tuple[Any, Any, Any]:
  """The step of training (see `training.contrastive.make_train_step`), and shardings of the state and the frozen
  backbone ({} where all weights are trained); both may be of shapes alone."""
  train = config.train
  placed = shardings.of_state(state, mesh), shardings.by_rules(backbone, mesh) if backbone else {}
  step = _made_once(
    make_train_step, config.seed, model, updates, placed, mesh=mesh,
    query_chunk=train.query_chunk, passage_chunk=train.passage_chunk,
    temperature=config.vector.temperature, both_directions=train.both_directions,
  )  # fmt: skip
  return step, *placed


def pretrain_step(config: ConfigDict, model: PretrainModel, updates: Optimizer, state: TrainState, mesh: Mesh) -> tuple:
  """The step of pretraining and the state's shardings; `state` may be of shapes alone."""
  placed = shardings.of_state(state, mesh)
  options = {"chunk": config.pretrain.chunk, "mesh": mesh}
  return _made_once(make_pretrain_step, config.seed, model, updates, placed, **options), placed


def _made_once(make: Callable, seed: int, model: Any, updates: Optimizer, placed: Any, **options: Any) -> SeededStep:
  """A step of `make`; rounds, arms and seeds of one process that have the same one trace and compile it once."""
  leaves, tree = jax.tree.flatten(placed)
  return _make(make, model, updates, tuple(leaves), tree, tuple(sorted(options.items()))).with_seed(seed)


@functools.lru_cache(maxsize=4)
def _make(make: Callable, model: Any, updates: Optimizer, leaves: tuple, tree: Any, options: tuple) -> SeededStep:
  return make(model, updates, seed=0, shardings=jax.tree.unflatten(tree, leaves), **dict(options))


def dropout(rate: float) -> Dropout | None:
  """The backbone's own dropout in training; None: as its config.json says."""
  return None if rate < 0 else Dropout(rate, rate)
