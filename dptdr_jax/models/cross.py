"""From a query and a passage in one sequence to a logit: the frozen backbone, a prompt, and a small head.

What is trained is {'prompt': raw prompt parameters, 'head': {'dense': …, 'output': …}}, float32; a dense is
{'kernel': [in, out], 'bias': [out]}. The head 'first' is BERT's for sentence pairs: H → H, tanh, H → 1, of token 0.

The head 'match' adds to this how well the passage has the query's tokens, read off the last layer's vectors of the two
texts in their one sequence: ColBERT's MaxSim, but after each text has seen the other. It has 'match', {'log_scale':
[1], 'bias': [1]}: e^log_scale · (match + bias). A frozen sentence encoder's token 0 knows nothing of pairs, and prompts
take long to teach it; its token vectors tell a passage that answers from one that doesn't before any training.
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
_LOG_SCALE, _BIAS = float(np.log(10)), -0.6  # fresh: between .74 and .48, MiniLM's positives and near negatives
_QUERY, _PASSAGE = 1, 2  # in `segments`
_SMALLEST = 1e-12  # a norm, or a sum of norms, below which it stays what it is


def init_cross(
  key: jax.Array,
  spec: PromptSpec,
  config: EncoderConfig,
  backbone: Params | None = None,
  word_ids: np.ndarray | None = None,
  head: str = "match",
) -> Params:
  """A fresh prompt (see `prompts.init_prompt`) and a fresh head: kernels N(0, 0.02), biases 0, that of 'match' -0.6."""
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
  """Raises InputError (naming `source`) where prompt or head have not the shapes that belong to `spec` and encoder."""
  prompts.check_shapes(lambda key: init_cross(key, prompts.plain(spec), config, head=head), trainable, source)


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
  """A logit for each pair, whose sigmoid is the probability that the passage is relevant.

  Args:
    params: the backbone's tree.
    trainable: as in the module's docstring; what is in it says which head it is.
    tokens: [B, T] int32, pairs padded on the right. lengths: [B] int32.
    segments: [B, T] int8, 1 at tokens of the query, 2 at tokens of the passage, 0 elsewhere.
    options: keys, batch_key, dropout, compute_dtype, attention, as in `represent`.

  Returns:
    [B] float32. The head is float32 whatever `compute_dtype` is. 'match' needs the last layer's vectors of all tokens,
    where for 'first' that layer computes token 0 alone.
  """
  inputs, head = (config, spec, params, trainable["prompt"], tokens, lengths), trainable["head"]
  if "match" not in head:
    return _of_first(head, represent(*inputs, pooling="first", normalize=False, **options))
  hidden = hidden_states(*inputs, **options).astype(jnp.float32)
  met = match(hidden, lengths, segments) + head["match"]["bias"]
  return _of_first(head, hidden[:, 0]) + jnp.exp(head["match"]["log_scale"]) * met


def _of_first(head: Params, first: jax.Array) -> jax.Array:
  """Vectors of token 0 [B, H] → [B]."""
  exact = jax.lax.Precision.HIGHEST
  hidden = jnp.tanh(jnp.matmul(first, head["dense"]["kernel"], precision=exact) + head["dense"]["bias"])
  return (jnp.matmul(hidden, head["output"]["kernel"], precision=exact) + head["output"]["bias"])[:, 0]


def match(hidden: jax.Array, lengths: jax.Array, segments: jax.Array) -> jax.Array:
  """How well the passage has the query's tokens: of each its largest cosine with one of the passage's, averaged.

  Vectors are centred on the mean of their sequence first, since those of many backbones all point one way; and a token
  counts by the length of what is left, which is little for stop words.

  Args:
    hidden: [B, T, H] float32. lengths: [B]. segments: [B, T], see `cross_logits`.

  Returns:
    [B] float32, from -1 to 1; -1 where the passage has no token, 0 where the query has none.
  """
  visible = (jnp.arange(hidden.shape[1]) < lengths[:, None])[..., None]
  mean = jnp.sum(jnp.where(visible, hidden, 0), axis=1, keepdims=True) / jnp.maximum(lengths, 1)[:, None, None]
  apart = hidden - mean
  norms = jnp.sqrt(jnp.maximum(jnp.sum(apart * apart, axis=-1), _SMALLEST**2))
  unit = apart / norms[..., None]
  cosines = jnp.einsum("bth,bsh->bts", unit, unit, precision=jax.lax.Precision.HIGHEST)
  best = jnp.max(jnp.where(segments[:, None, :] == _PASSAGE, cosines, -1.0), axis=2)
  weights = jnp.where(segments == _QUERY, norms, 0.0)
  return jnp.sum(weights * best, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), _SMALLEST)
