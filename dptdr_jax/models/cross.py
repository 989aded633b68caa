"""From a query and a passage in one sequence to a logit: the frozen backbone, a prompt, and a small head.

What is trained is {'prompt': raw prompt parameters, 'head': {'dense': …, 'output': …}}, float32; a dense is
{'kernel': [in, out], 'bias': [out]}. The head is BERT's for sentence pairs: H → H, tanh, H → 1, of token 0.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dptdr_jax.models import prompts
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.prompts import Params, PromptSpec
from dptdr_jax.models.represent import represent

_HEAD_SCALE = 0.02  # standard deviation of fresh kernels (BERT's)


def init_cross(
  key: jax.Array,
  spec: PromptSpec,
  config: EncoderConfig,
  backbone: Params | None = None,
  word_ids: np.ndarray | None = None,
) -> Params:
  """A fresh prompt (see `prompts.init_prompt`) and a fresh head: kernels N(0, 0.02), biases 0."""
  prompt_key, dense_key, output_key = jax.random.split(key, 3)
  size = config.hidden_size

  def dense(key: jax.Array, outputs: int) -> Params:
    kernel = _HEAD_SCALE * jax.random.normal(key, (size, outputs), jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros((outputs,), jnp.float32)}

  return {
    "prompt": prompts.init_prompt(prompt_key, spec, config, backbone, word_ids),
    "head": {"dense": dense(dense_key, size), "output": dense(output_key, 1)},
  }


def check_cross(spec: PromptSpec, trainable: Params, config: EncoderConfig, source: Any = None) -> None:
  """Raises InputError (naming `source`) where prompt or head have not the shapes that belong to `spec` and encoder."""
  prompts.check_shapes(lambda key: init_cross(key, prompts.plain(spec), config), trainable, source)


def cross_logits(
  config: EncoderConfig,
  spec: PromptSpec,
  params: Params,
  trainable: Params,
  tokens: jax.Array,
  lengths: jax.Array,
  **options: Any,
) -> jax.Array:
  """A logit for each pair, whose sigmoid is the probability that the passage is relevant.

  Args:
    params: the backbone's tree.
    trainable: as in the module's docstring.
    tokens: [B, T] int32, pairs padded on the right. lengths: [B] int32.
    options: keys, batch_key, dropout, compute_dtype, attention, as in `represent`.

  Returns:
    [B] float32. The head is float32 whatever `compute_dtype` is: it costs nothing beside the encoder.
  """
  first = represent(
    config, spec, params, trainable["prompt"], tokens, lengths, pooling="first", normalize=False, **options
  )
  head, exact = trainable["head"], jax.lax.Precision.HIGHEST
  hidden = jnp.tanh(jnp.matmul(first, head["dense"]["kernel"], precision=exact) + head["dense"]["bias"])
  return (jnp.matmul(hidden, head["output"]["kernel"], precision=exact) + head["output"]["bias"])[:, 0]
