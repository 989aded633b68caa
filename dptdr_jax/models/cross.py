"""A cross-encoder: the frozen backbone reads query and passage as one sequence; a prompt and a small head give a logit.

Trained parameters: {'prompt': raw prompt parameters, 'head': {'dense': …, 'output': …}}, float32, where a dense layer
is {'kernel': [in, out], 'bias': [out]}. The head 'first' is BERT's for sentence pairs: H → H, tanh, H → 1, of token 0.

The head 'match' adds how well the passage's tokens match the query's, from the last layer's vectors of the sequence.
This is ColBERT's MaxSim, but each text has already attended to the other. Its parameters are 'match', {'log_scale':
[1], 'bias': [1]}; it adds e^log_scale · (match + bias). Token 0 of a frozen sentence encoder carries nothing about
pairs, and prompts learn that slowly; the token vectors separate good from bad passages before any training.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dptdr_jax.models import prompts
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.prompts import Params, PromptSpec
from dptdr_jax.models.represent import hidden_states, represent

HEADS = ("match", "first")
_HEAD_SCALE = 0.02  # standard deviation of fresh kernels (BERT's)
# Initial values. The bias lies between MiniLM's mean match of positives (.74) and of near negatives (.48).
_LOG_SCALE, _BIAS = float(np.log(10)), -0.6
_QUERY, _PASSAGE = 1, 2  # in `segments`
_SMALLEST = 1e-12  # lower bound of norms and sums of norms that are divided by


def init_cross(
  key: jax.Array,
  spec: PromptSpec,
  config: EncoderConfig,
  backbone: Params | None = None,
  word_ids: np.ndarray | None = None,
  head: str = "match",
) -> Params:
  """A fresh prompt (see `prompts.init_prompt`) and head: kernels N(0, 0.02), biases 0, the bias of 'match' −0.6."""
  prompt_key, dense_key, output_key = jax.random.split(key, 3)
  size = config.hidden_size

  def dense(key: jax.Array, outputs: int) -> Params:
    kernel = _HEAD_SCALE * jax.random.normal(key, (size, outputs), jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros((outputs,), jnp.float32)}

  fresh = {"log_scale": _LOG_SCALE, "bias": _BIAS}
  match = {"match": {name: jnp.full((1,), value, jnp.float32) for name, value in fresh.items()}}
  return {
    "prompt": prompts.init_prompt(prompt_key, spec, config, backbone, word_ids),
    "head": {"dense": dense(dense_key, size), "output": dense(output_key, 1), **(match if head == "match" else {})},
  }


def check_cross(spec: PromptSpec, head: str, trainable: Params, config: EncoderConfig, source: Any = None) -> None:
  """Raises InputError (naming `source`) if prompt or head do not have the shapes for `spec` on this encoder."""
  prompts.check_shapes(lambda key: init_cross(key, prompts.as_read(spec), config, head=head), trainable, source)


def cross_logits(
  config: EncoderConfig,
  spec: PromptSpec,
  params: Params,
  trainable: Params,
  tokens: jax.Array,
  lengths: jax.Array,
  segments: jax.Array,
  **options: Any,
) -> jax.Array:
  """One logit for each pair; its sigmoid is the probability that the passage is relevant.

  Args:
    params: the backbone's tree.
    trainable: see the module's docstring; its keys say which head it is.
    tokens: [B, T] int32, pairs padded on the right. lengths: [B] int32.
    segments: [B, T] int8: 1 for tokens of the query, 2 for tokens of the passage, 0 elsewhere.
    options: keys, dropout, compute_dtype, attention, as in `represent`.

  Returns:
    [B] float32. The head is always float32. 'match' needs the last layer's vectors of all tokens; for 'first' that
    layer computes token 0 alone.
  """
  inputs, head = (config, spec, params, trainable["prompt"], tokens, lengths), trainable["head"]
  if "match" not in head:
    return _of_first(head, represent(*inputs, pooling="first", normalize=False, **options))
  hidden = hidden_states(*inputs, **options).astype(jnp.float32)
  matched = match(hidden, lengths, segments) + head["match"]["bias"]
  return _of_first(head, hidden[:, 0]) + jnp.exp(head["match"]["log_scale"]) * matched


def _of_first(head: Params, first: jax.Array) -> jax.Array:
  """Vectors of token 0 [B, H] → [B]."""
  exact = jax.lax.Precision.HIGHEST
  hidden = jnp.tanh(jnp.matmul(first, head["dense"]["kernel"], precision=exact) + head["dense"]["bias"])
  return (jnp.matmul(hidden, head["output"]["kernel"], precision=exact) + head["output"]["bias"])[:, 0]


def match(hidden: jax.Array, lengths: jax.Array, segments: jax.Array) -> jax.Array:
  """The largest cosine of each query token with a passage token, averaged over the query's tokens.

  Vectors are centred on the mean of their sequence first, because in many backbones they all point in a similar
  direction. A token's weight is the norm of its centred vector, which is small for stop words.

  Args:
    hidden: [B, T, H] float32. lengths: [B]. segments: [B, T], see `cross_logits`.

  Returns:
    [B] float32, from −1 to 1; −1 if the passage has no token, 0 if the query has none.
  """
  visible = (jnp.arange(hidden.shape[1]) < lengths[:, None])[..., None]
  mean = jnp.sum(jnp.where(visible, hidden, 0), axis=1, keepdims=True) / jnp.maximum(lengths, 1)[:, None, None]
  centred = hidden - mean
  norms = jnp.sqrt(jnp.maximum(jnp.sum(centred * centred, axis=-1), _SMALLEST**2))
  unit = centred / norms[..., None]
  cosines = jnp.einsum("bth,bsh->bts", unit, unit, precision=jax.lax.Precision.HIGHEST)
  best = jnp.max(jnp.where(segments[:, None, :] == _PASSAGE, cosines, -1.0), axis=2)
  weights = jnp.where(segments == _QUERY, norms, 0.0)
  return jnp.sum(weights * best, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), _SMALLEST)
