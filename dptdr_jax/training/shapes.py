"""The steps of a run from shapes alone: traced and lowered for any mesh, without weights, data or devices."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dptdr_jax.data.masking import most_masked
from dptdr_jax.models import convert, prompts
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.represent import represent
from dptdr_jax.runtime import mesh as meshes
from dptdr_jax.runtime.buckets import ON_ACCELERATOR
from dptdr_jax.runtime.shardings import by_rules
from dptdr_jax.settings import Settings
from dptdr_jax.training import steps
from dptdr_jax.training.state import init_state

Lowered = tuple[Any, Any]  # what jit's trace and lower return

_MANY_STEPS = 1000  # of the schedule; no shape depends on it


def train(settings: Settings, encoder: EncoderConfig, compute_dtype: str, mesh: Mesh) -> Lowered:
  """The step of training, at full lengths."""
  prompt, text, wanted = settings.prompt, settings.text, settings.train
  model = steps.bi_encoder(encoder, prompt, settings.vector, wanted, dropout=settings.backbone.dropout,
                           compute_dtype=compute_dtype)  # fmt: skip
  updates = steps.optimizer(wanted, _MANY_STEPS)
  backbone = convert.abstract_params(encoder, compute_dtype)

  def first_state(params):
    plain = dataclasses.replace(model, prompt=prompts.as_read(model.prompt))  # of the same shapes
    tied = prompt.tied or prompt.kind == "none"
    return init_state(plain.init_trainable(jax.random.key(0), params, tied=tied), updates)

  state = jax.eval_shape(first_state, backbone)
  queries, passages = wanted.queries, wanted.queries * wanted.passages
  filled = [-(-rows // mesh.size) * mesh.size for rows in (queries, passages)]
  batch = {
    "query_tokens": _ids(filled[0], text.query_length), "query_lengths": _ids(filled[0]),
    "passage_tokens": _ids(filled[1], text.passage_length), "passage_lengths": _ids(filled[1]),
    "targets": _ids(queries), "blocked": jax.ShapeDtypeStruct((queries, passages), bool),
    "repeated": jax.ShapeDtypeStruct((passages,), bool),
  }  # fmt: skip
  frozen = {} if prompt.kind == "none" else backbone
  step, _, _ = steps.train_step(model, updates, state, frozen, train=wanted, temperature=settings.vector.temperature,
                                seed=settings.seed, mesh=mesh)  # fmt: skip
  return _lower(step.func, *step.args, state, frozen, batch)


def pretrain(settings: Settings, encoder: EncoderConfig, compute_dtype: str, mesh: Mesh) -> Lowered:
  """The step of pretraining, at full lengths."""
  wanted = settings.pretrain
  model = steps.pretrain_model(encoder, settings.vector, wanted, dropout=settings.backbone.dropout,
                               compute_dtype=compute_dtype)  # fmt: skip
  updates = steps.optimizer(wanted, _MANY_STEPS)

  def first_state(params):
    return init_state(model.init_trainable(jax.random.key(0), params, None), updates)

  state = jax.eval_shape(first_state, convert.abstract_params(encoder, jnp.float32))
  step, _ = steps.pretrain_step(model, updates, state, chunk=wanted.chunk, seed=settings.seed, mesh=mesh)
  batch = {
    "tokens": _ids(wanted.spans, wanted.span_tokens),
    "lengths": _ids(wanted.spans),
    "groups": _ids(wanted.spans),
  }
  if wanted.mlm_weight:
    masked = _ids(wanted.spans, most_masked(wanted.span_tokens))
    batch |= {"positions": masked, "labels": masked}
  return _lower(step.func, *step.args, state, batch)


def encode(settings: Settings, encoder: EncoderConfig, compute_dtype: str, mesh: Mesh) -> Lowered:
  """A full batch of passages of full length, as a retriever encodes it."""
  spec, vector, width = steps.prompt_spec(settings.prompt), settings.vector, settings.text.passage_length
  batch = max(1, (settings.encode.batch_tokens or ON_ACCELERATOR) // width) * mesh.size
  prompt = jax.eval_shape(lambda: prompts.init_prompt(jax.random.key(0), prompts.as_read(spec), encoder))
  backbone = convert.abstract_params(encoder, compute_dtype)

  def place(tree, sharding):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

  texts = place((_ids(batch, width), _ids(batch)), meshes.batch_sharding(mesh))
  run = functools.partial(represent, encoder, spec, pooling=vector.pooling, normalize=vector.normalize,
                          compute_dtype=jnp.dtype(compute_dtype))  # fmt: skip
  arguments = jax.tree.map(place, backbone, by_rules(backbone, mesh)), place(prompt, meshes.replicated(mesh)), *texts
  return _lower(jax.jit(run), *arguments)


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def _lower(step: Any, *arguments: Any) -> Lowered:
  traced = step.trace(*arguments)
  return traced, traced.lower()
