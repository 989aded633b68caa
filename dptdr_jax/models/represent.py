"""From token ids to vectors: the frozen backbone, a prompt, and pooling."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dptdr_jax.core.errors import InputError
from dptdr_jax.models import dropout as drop
from dptdr_jax.models import prompts
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.dropout import Dropout
from dptdr_jax.models.encoder import Encoder
from dptdr_jax.models.prompts import Params, PromptSpec

POOLINGS = ("first", "mean")
# Lower bound of the norm that a vector is divided by, as in torch.nn.functional.normalize: 0 stays 0.
_SMALLEST_NORM = 1e-12


def represent(
  config: EncoderConfig,
  spec: PromptSpec,
  params: Params,
  prompt: Params | None,
  tokens: jax.Array,
  lengths: jax.Array,
  *,
  pooling: str,
  normalize: bool,
  **options: Any,
) -> jax.Array:
  """One vector for each sequence, [B, H] float32; arguments as in `hidden_states`.

  Args:
    pooling: 'first' (token 0; the last layer then computes only that row) or 'mean' (over the visible tokens).
    normalize: divide by the L2 norm.
    options: keys, dropout, compute_dtype, attention, remat.

  Raises:
    InputError: prompt and T exceed the position table, or an unknown pooling or attention.
  """
  row = None
  if pooling == "first":
    row = spec.length if spec.kind == "shallow" else 0
  hidden = hidden_states(config, spec, params, prompt, tokens, lengths, row=row, **options)
  return pool(hidden, lengths, pooling=pooling, normalize=normalize)


def pool(hidden: jax.Array, lengths: jax.Array, *, pooling: str, normalize: bool) -> jax.Array:
  """Last hidden states [B, T, H], or [B, 1, H] of token 0 alone, to vectors [B, H] float32; see `represent`."""
  if pooling not in POOLINGS:
    raise InputError("unknown pooling", value=pooling, fix=f"Known: {', '.join(POOLINGS)}")
  hidden = hidden.astype(jnp.float32)
  if pooling == "first":
    vectors = hidden[:, 0]
  else:
    visible = (jnp.arange(hidden.shape[1]) < lengths[:, None])[..., None]
    total = jnp.sum(jnp.where(visible, hidden, 0), axis=1)
    vectors = total / jnp.maximum(lengths, 1)[:, None]
  return unit_length(vectors) if normalize else vectors


def unit_length(vectors: jax.Array) -> jax.Array:
  """Divides vectors [B, H] by their L2 norms."""
  square = jnp.sum(vectors * vectors, axis=-1, keepdims=True)
  return vectors * jax.lax.rsqrt(jnp.maximum(square, _SMALLEST_NORM**2))


def hidden_states(
  config: EncoderConfig,
  spec: PromptSpec,
  params: Params,
  prompt: Params | None,
  tokens: jax.Array,
  lengths: jax.Array,
  *,
  row: int | None = None,
  keys: jax.Array | None = None,
  dropout: Dropout | None = None,
  compute_dtype: Any = jnp.float32,
  attention: str = "auto",
  remat: str = "none",
) -> jax.Array:
  """The last layer's vectors of the tokens, [B, T, H] in `compute_dtype`.

  Args:
    params: the backbone's tree of any float dtype; `compute_dtype` is fastest.
    prompt: raw prompt parameters, float32, before any projection. None if spec.kind is 'none'.
    tokens: [B, T] int32, padded on the right. lengths: [B] int32, visible tokens.
    row: compute this row of the last layer alone, a shallow prompt's rows counted: [B, 1, H].
    keys: typed PRNG keys [B]; dropout is on, and the masks of an example depend on its key alone. None: no dropout.
    dropout: rates that replace those of `config`.
    compute_dtype: of matrix products. Prompts, softmax statistics and norms are always float32.
    attention: 'auto', 'split' or 'concat', see `attention.choose_method`.
    remat: see `Encoder`.
  """
  prompts.check_lengths(config, spec, tokens.shape[1])
  expanded = prompts.expand_prompt(spec, prompt, config)
  noise = None
  if keys is not None:
    rates = dropout or Dropout(config.hidden_dropout, config.attention_dropout)
    noise = drop.Noise.from_keys(keys, rates, spec.dropout if spec.kind == "deep" else 0.0)
  encoder = Encoder(config, compute_dtype, attention, row, spec.position_shift, remat)
  deep = expanded if spec.kind == "deep" else None
  shallow = expanded if spec.kind == "shallow" else None
  return encoder.apply({"params": params}, tokens, lengths, deep, shallow, noise)[:, -tokens.shape[1] :]
