"""From token ids to vectors: the frozen backbone, a prompt, and how a sequence becomes one vector."""

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

# Below this, a vector counts as 0 and stays so instead of being divided by its norm (torch.nn.functional.normalize).
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
  keys: jax.Array | None = None,
  batch_key: jax.Array | None = None,
  dropout: Dropout | None = None,
  compute_dtype: Any = jnp.float32,
  attention: str = "auto",
  remat: str = "none",
) -> jax.Array:
  """One vector for each sequence.

  Args:
    params: the backbone's tree (any float dtype; best stored in `compute_dtype`).
    prompt: raw prompt parameters, float32 (any projection is applied here); None where spec.kind is 'none'.
    tokens: [B, T] int32, padded on the right. lengths: [B] int32, of which the tokens are read.
    pooling: 'first' (token 0; the last layer then computes that row alone) or 'mean' (over the visible tokens).
    normalize: divide by the L2 norm.
    keys: typed PRNG keys [B], one for each example: dropout is on, and every mask is a function of the example's key.
      None: no dropout.
    batch_key: one typed key, the same for all examples of a step, all chunks and devices; needed with dropout where
      spec.dropout_per is 'batch'.
    dropout: rates in place of the configuration's.
    compute_dtype: of matrix products. Prompts, softmax statistics, norms and the result are float32 regardless.
    attention: 'auto', 'split' or 'concat', see attention.choose_method.
    remat: see `Encoder`.

  Returns:
    [B, H] float32.

  Raises:
    InputError: prompt and T don't fit the position table; an unknown pooling or attention.
  """
  row = None
  if pooling == "first":
    row = spec.length if spec.kind == "shallow" else 0
  hidden = _encode(
    config, spec, params, prompt, tokens, lengths, row=row, keys=keys, batch_key=batch_key,
    dropout=dropout, compute_dtype=compute_dtype, attention=attention, remat=remat,
  )  # fmt: skip
  if pooling == "mean":
    hidden = hidden[:, -tokens.shape[1] :]
  return pool(hidden, lengths, pooling=pooling, normalize=normalize)


def pool(hidden: jax.Array, lengths: jax.Array, *, pooling: str, normalize: bool) -> jax.Array:
  """Last hidden states [B, T, H] of tokens, or [B, 1, H] of token 0 alone, to [B, H] float32; see `represent`."""
  if pooling not in ("first", "mean"):
    raise InputError("unknown pooling", value=pooling, fix="Known: first, mean")
  hidden = hidden.astype(jnp.float32)
  if pooling == "first":
    vectors = hidden[:, 0]
  else:
    visible = (jnp.arange(hidden.shape[1]) < lengths[:, None])[..., None]
    total = jnp.sum(jnp.where(visible, hidden, 0), axis=1)
    vectors = total / jnp.maximum(lengths, 1)[:, None]
  if normalize:
    square = jnp.sum(vectors * vectors, axis=-1, keepdims=True)
    vectors *= jax.lax.rsqrt(jnp.maximum(square, _SMALLEST_NORM**2))
  return vectors


def hidden_states(
  config: EncoderConfig,
  spec: PromptSpec,
  params: Params,
  prompt: Params | None,
  tokens: jax.Array,
  lengths: jax.Array,
  *,
  keys: jax.Array | None = None,
  batch_key: jax.Array | None = None,
  dropout: Dropout | None = None,
  compute_dtype: Any = jnp.float32,
  attention: str = "auto",
  remat: str = "none",
) -> jax.Array:
  """The last layer's vectors of the tokens, [B, T, H] in `compute_dtype`; arguments as in `represent`."""
  hidden = _encode(
    config, spec, params, prompt, tokens, lengths, row=None, keys=keys, batch_key=batch_key,
    dropout=dropout, compute_dtype=compute_dtype, attention=attention, remat=remat,
  )  # fmt: skip
  return hidden[:, -tokens.shape[1] :]


def _encode(
  config, spec, params, prompt, tokens, lengths, *, row, keys, batch_key, dropout, compute_dtype, attention, remat
) -> jax.Array:
  prompts.check_lengths(config, spec, tokens.shape[1])
  if spec.kind == "shallow" and config.family == "deberta":
    raise InputError("DeBERTa takes deep prompts only", fix="Set prompt.kind to 'deep'")
  expanded = prompts.expand_prompt(spec, prompt, config)
  noise = None
  if keys is not None:
    rates = dropout or Dropout(config.hidden_dropout, config.attention_dropout)
    by_example = spec.kind == "deep" and spec.dropout_per == "example"
    noise = drop.Noise.from_keys(keys, rates, spec.dropout if by_example else 0.0)
    if spec.kind == "deep" and not by_example:
      expanded = _drop_for_batch(expanded, batch_key, spec.dropout)
  encoder = Encoder(config, compute_dtype, attention, row, spec.position_shift, remat)
  deep = expanded if spec.kind == "deep" else None
  shallow = expanded if spec.kind == "shallow" else None
  return encoder.apply({"params": params}, tokens, lengths, deep, shallow, noise)


def _drop_for_batch(expanded, batch_key, rate):
  if batch_key is None:
    raise InputError("prompt.dropout_per 'batch' needs a key for the batch", fix="Pass represent(batch_key=…)")
  noise = drop.Noise.from_keys(batch_key[None], Dropout(0.0, 0.0))
  sites = (drop.PROMPT_KEY, drop.PROMPT_VALUE)
  return tuple(drop.dropout(part[None], noise.at(0, site), rate)[0] for part, site in zip(expanded, sites, strict=True))
