"""A config's steps from shapes alone: traced and lowered for any mesh, with no weights, no data, no device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dptdr_jax import backbone as backbones
from dptdr_jax import retriever
from dptdr_jax.data.masking import most_masked
from dptdr_jax.models import convert, prompts
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.runtime import mesh as meshes
from dptdr_jax.runtime.shardings import by_rules
from dptdr_jax.stages import steps
from dptdr_jax.training.state import init_state

Lowered = tuple[Any, Any]  # what jit's trace and lower give

_MANY_STEPS = 1000  # of the schedule, whose length no shape depends on


def train(config: ConfigDict, encoder: EncoderConfig, mesh: Mesh) -> Lowered:
  """The step of training, at full lengths."""
  dtype = backbones.resolve_dtype(config.compute_dtype)
  model, updates = steps.tower_model(config, encoder, dtype), steps.optimizer(config.train, _MANY_STEPS)
  backbone = convert.abstract_params(encoder, dtype)

  def first_state(params):
    tied = config.prompt.tied or config.prompt.kind == "none"
    plain = dataclasses.replace(model, prompt=dataclasses.replace(model.prompt, init="normal"))  # of the same shapes
    return init_state(plain.init_trainable(jax.random.key(0), params, tied=tied), updates)

  state = jax.eval_shape(first_state, backbone)
  queries, passages, text = config.train.queries, config.train.queries * config.train.passages, config.text
  filled = [-(-rows // mesh.size) * mesh.size for rows in (queries, passages)]
  batch = {
    "query_tokens": _ids(filled[0], text.query_length), "query_lengths": _ids(filled[0]),
    "passage_tokens": _ids(filled[1], text.passage_length), "passage_lengths": _ids(filled[1]),
    "targets": _ids(queries), "blocked": jax.ShapeDtypeStruct((queries, passages), bool),
    "repeated": jax.ShapeDtypeStruct((passages,), bool),
  }  # fmt: skip
  frozen = {} if config.prompt.kind == "none" else backbone
  step, _, _ = steps.train_step(config, model, updates, state, frozen, mesh)
  return _lower(step, state, frozen, batch)


def pretrain(config: ConfigDict, encoder: EncoderConfig, mesh: Mesh) -> Lowered:
  """The step of pretraining, at full lengths."""
  model, updates = steps.pretrain_model(config, encoder), steps.optimizer(config.pretrain, _MANY_STEPS)

  def first_state(params):
    return init_state(model.init_trainable(jax.random.key(0), params, None), updates)

  state = jax.eval_shape(first_state, convert.abstract_params(encoder, jnp.float32))
  step, _ = steps.pretrain_step(config, model, updates, state, mesh)
  spans, tokens = config.pretrain.spans, config.pretrain.span_tokens
  batch = {"tokens": _ids(spans, tokens), "lengths": _ids(spans), "groups": _ids(spans)}
  if config.pretrain.mlm_weight:
    masked = most_masked(config.pretrain.mask_rate, tokens)
    batch |= {"positions": _ids(spans, masked), "labels": _ids(spans, masked)}
  return _lower(step, state, batch)


def encode(config: ConfigDict, encoder: EncoderConfig, mesh: Mesh) -> Lowered:
  """A full batch of passages of full length."""
  dtype, spec = backbones.resolve_dtype(config.compute_dtype), steps.prompt_spec(config)
  whole, rows = meshes.replicated(mesh), meshes.batch_sharding(mesh)
  width = config.text.passage_length
  batch = max(1, config.encode.batch_tokens // width) * mesh.size
  plain = dataclasses.replace(spec, init="normal")
  prompt = jax.eval_shape(lambda: prompts.init_prompt(jax.random.key(0), plain, encoder))

  def place(tree, sharding):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

  static = dict(
    config=encoder, spec=spec, pooling=config.vector.pooling, normalize=config.vector.normalize, compute_dtype=dtype
  )
  backbone = convert.abstract_params(encoder, dtype)
  backbone = jax.tree.map(place, backbone, by_rules(backbone, mesh))
  texts = place(_ids(batch, width), rows), place(_ids(batch), rows)
  return _lower(retriever.vectors_of, backbone, place(prompt, whole), *texts, **static)


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def _lower(step: Any, *arguments: Any, **static: Any) -> Lowered:
  traced = step.trace(*arguments, **static)
  return traced, traced.lower()
