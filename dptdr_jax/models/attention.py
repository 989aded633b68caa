"""Self-attention over [prompt; tokens]: two ways to compute it behind one signature.

Legend: B examples, T tokens, P prompt length, S = P + T keys, N heads, D head size; R query rows (T, or 1 if only one
row is needed).
Tokens are padded on the right and prompts come first, so a length says what a row sees; no mask is passed.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dptdr_jax.core.errors import InputError
from dptdr_jax.models import dropout as drop
from dptdr_jax.models.products import product

Prompt = tuple[jax.Array, jax.Array]  # keys, values [P, N, D], the same for every example


class RowPrompts(NamedTuple):
  """A prompt of its own for every example; for serving, without dropout.

  The order of the axes is that in which batched products read them: another order would cost a transpose an example.
  """

  keys: jax.Array  # [B, N, P, D]
  values: jax.Array  # [B, N, P, D]
  lengths: jax.Array  # [B] int32, from 0 to P: how many of the P are visible


# Steps in a dropout mask's index from head to head and from query row to query row. They are constants so that a mask
# depends neither on T nor on the padding. 2**32 indices hold 256 heads × 4,096 rows × 4,096 keys.
_HEAD_STRIDE, _ROW_STRIDE = 1 << 24, 1 << 12
_PROBABILITIES = "attention probabilities"


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  lengths: jax.Array,
  *,
  scale: float,
  prompt: Prompt | RowPrompts | None = None,
  bias: jax.Array | None = None,
  noise: drop.Noise | None = None,
  layer: jax.Array | int = 0,
  first_row: int = 0,
  method: str = "auto",
  keep_probabilities: bool = True,
) -> jax.Array:
  """Softmax attention of each query row over the prompt and the visible tokens.

  Args:
    query: [B, R, N, D]; its row 0 is row `first_row` of the sequence.
    key, value: [B, T, N, D].
    lengths: [B] int32, visible tokens of each example.
    scale: factor on the scores.
    prompt: keys and values before the tokens: one prompt for all examples, one for each, or None.
    bias: [N, B, R, T] float32 added to the scaled scores of tokens (DeBERTa), or None.
    noise: dropout on probabilities and prompt; `layer` separates the masks of the layers. None: no dropout.
    method: 'split', 'concat' or 'auto'; see `choose_method`.
    keep_probabilities: store the probabilities for the backward pass instead of computing them again. They are N·S
      numbers a row; at P = T that is as much as everything else that a frozen layer stores.

  Returns:
    [B, R, N, D] in the dtype of `query`. Scores and softmax statistics are float32.
  """
  method = choose_method(method, query, key, prompt, bias, noise)
  # The backward pass recomputes everything but the stored probabilities from the arguments. So neither a copy of the
  # prompt for each example nor a mask is stored.
  policy = jax.checkpoint_policies.save_only_these_names(*([_PROBABILITIES] if keep_probabilities else []))
  core = jax.checkpoint(
    functools.partial(_concat if method == "concat" else _split, scale=scale, first_row=first_row),
    policy=policy,
  )
  return core(query, key, value, lengths, prompt, bias, noise, layer)


def choose_method(method, query, key, prompt, bias, noise) -> str:
  """Returns 'split' or 'concat' for these arguments on this device; the arguments are those of `attend`.

  'split' computes one product over the prompt and one over the tokens, with one softmax over both. It never copies the
  prompt and supports every option. XLA fuses the softmax, but the scores pass through memory.
  'concat' copies the prompt in front of every example's keys for a fused kernel that stores no scores. Only NVIDIA GPUs
  from Ampere on have one (cuDNN: 16-bit, even lengths, D ≤ 128 and a multiple of 8, no dropout here).
  'auto' is 'concat' if that kernel can run and 'split' otherwise.
  """
  dropped = noise is not None and noise.rates.attention > 0
  if method == "auto":
    return "concat" if not dropped and bias is None and _has_fused_kernel(query, key, prompt) else "split"
  if method not in ("split", "concat"):
    raise InputError("unknown attention method", value=method, fix="Known: auto, split, concat")
  if method == "concat" and (dropped or bias is not None):
    what = "dropout on attention probabilities" if dropped else "DeBERTa's relative biases"
    raise InputError(f"attention 'concat' cannot do {what}", fix="Use 'auto' or 'split'")
  return method


def _prompt_length(prompt: Prompt | RowPrompts | None) -> int:
  return 0 if prompt is None else prompt[0].shape[-2 if isinstance(prompt, RowPrompts) else 0]


def _has_fused_kernel(query, key, prompt) -> bool:
  return (
    _is_ampere_or_later()
    and query.dtype in (jnp.bfloat16, jnp.float16)
    and query.shape[-1] % 8 == 0
    and query.shape[-1] <= 128
    and query.shape[1] % 2 == 0
    and (key.shape[1] + _prompt_length(prompt)) % 2 == 0
  )


def _is_ampere_or_later() -> bool:
  """Whether this process computes on NVIDIA GPUs with cuDNN's fused attention. ROCm reports 'gpu', too."""
  if jax.default_backend() != "gpu":
    return False
  capability = getattr(jax.local_devices()[0], "compute_capability", "")
  return bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 8


def _hide(scores: jax.Array, lengths: jax.Array) -> jax.Array:
  """Adds the smallest float32 to scores [N, B, R, K] of keys beyond each example's length."""
  hidden = jnp.arange(scores.shape[-1]) >= lengths[:, None]
  return scores + jnp.where(hidden, jnp.finfo(jnp.float32).min, 0.0)[None, :, None, :]


def _split(query, key, value, lengths, prompt, bias, noise, layer, *, scale, first_row):
  scores = product("brnd,btnd->nbrt", query, key) * scale
  if bias is not None:
    scores += bias
  scores = _hide(scores, lengths)
  if prompt is None:
    (over_tokens,) = _joint_softmax((scores,), value.dtype)
    return _weighted_sum("nbrk,bknd->brnd", over_tokens, value, noise, layer, first_row, 0).astype(query.dtype)

  if isinstance(prompt, RowPrompts):
    prompt_keys, prompt_values = prompt.keys.astype(query.dtype), prompt.values.astype(query.dtype)
    prompt_scores = _hide(product("brnd,bnpd->nbrp", query, prompt_keys) * scale, prompt.lengths)
    equation = "nbrk,bnkd->brnd"
  else:
    prompt_keys = _prompt_for(prompt[0], query, noise, layer, drop.PROMPT_KEY)
    prompt_values = _prompt_for(prompt[1], query, noise, layer, drop.PROMPT_VALUE)
    equation = "brnd,npd->nbrp" if prompt_keys.ndim == 3 else "brnd,nbpd->nbrp"
    prompt_scores = product(equation, query, prompt_keys) * scale
    equation = "nbrk,nkd->brnd" if prompt_values.ndim == 3 else "nbrk,nbkd->brnd"
  over_prompt, over_tokens = _joint_softmax((prompt_scores, scores), value.dtype)
  mixed = _weighted_sum(equation, over_prompt, prompt_values, noise, layer, first_row, 0)
  first_key = _prompt_length(prompt)
  mixed += _weighted_sum("nbrk,bknd->brnd", over_tokens, value, noise, layer, first_row, first_key)
  return mixed.astype(query.dtype)


def _concat(query, key, value, lengths, prompt, bias, noise, layer, *, scale, first_row):
  del bias, first_row  # `choose_method` allows neither a bias nor a mask over rows here
  if isinstance(prompt, RowPrompts):
    key, value, lengths = _pack(key, value, lengths, prompt)
  elif prompt is not None:
    sites = (drop.PROMPT_KEY, drop.PROMPT_VALUE)
    parts = [_prompt_for(part, query, noise, layer, site) for part, site in zip(prompt, sites, strict=True)]
    parts = [part if part.ndim == 4 else part[:, None] for part in parts]
    copies = [jnp.broadcast_to(part.transpose(1, 2, 0, 3), (len(key), *prompt[0].shape)) for part in parts]
    key, value = (jnp.concatenate(pair, axis=1) for pair in zip(copies, (key, value), strict=True))
    lengths = lengths + prompt[0].shape[0]
  fused = _has_fused_kernel(query, key, None)
  return jax.nn.dot_product_attention(
    query, key, value, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn" if fused else "xla"
  )


def _pack(key, value, lengths, prompt: RowPrompts):
  """Joins prompts and tokens so that the visible keys of each example are contiguous from 0, as the kernel needs."""
  size, place = _prompt_length(prompt), jnp.arange(_prompt_length(prompt) + key.shape[1])
  visible = prompt.lengths[:, None]
  source = jnp.where(place < visible, place, jnp.minimum(place + size - visible, place[-1]))[..., None, None]
  joined = (
    jnp.concatenate([part.transpose(0, 2, 1, 3).astype(tokens.dtype), tokens], axis=1)
    for part, tokens in ((prompt.keys, key), (prompt.values, value))
  )
  key, value = (jnp.take_along_axis(part, source, axis=1) for part in joined)
  return key, value, lengths + prompt.lengths


def _prompt_for(part, query, noise, layer, site):
  """The prompt's keys or values in the dtype of the products: [N, P, D], or [N, B, P, D] with a mask for each example.

  Batched products read this order as it is; a transpose would be one more copy of the prompt an example. The dtype
  changes last, so that the gradient is summed over the examples in float32.
  """
  part = part.transpose(1, 0, 2)
  if noise is None or noise.prompt_rate <= 0:
    return part.astype(query.dtype)
  heads, length, size = part.shape
  part = jnp.broadcast_to(part[:, None], (heads, query.shape[0], length, size))
  strides = (size, 0, heads * size, 1)
  part = drop.dropout(part, noise.at(layer, site), noise.prompt_rate, batch_axis=1, strides=strides)
  return part.astype(query.dtype)


def _weighted_sum(equation, probabilities, values, noise, layer, first_row, first_key):
  """Applies dropout to probabilities [N, B, R, K] and sums the values by them: [B, R, N, D] float32."""
  if noise is not None and noise.rates.attention > 0:
    probabilities = drop.dropout(
      probabilities, noise.at(layer, drop.ATTENTION), noise.rates.attention,
      batch_axis=1, strides=(_HEAD_STRIDE, 0, _ROW_STRIDE, 1), offset=first_row * _ROW_STRIDE + first_key,
    )  # fmt: skip
  return product(equation, probabilities, values)


# A custom rule, so that only what the next product reads is stored: the probabilities in the compute dtype.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _joint_softmax(scores: tuple[jax.Array, ...], dtype) -> tuple[jax.Array, ...]:
  """One softmax over the last axes of several float32 arrays, as if they were concatenated."""
  top = functools.reduce(jnp.maximum, [jnp.max(part, axis=-1, keepdims=True) for part in scores])
  powers = [jnp.exp(part - top) for part in scores]
  total = sum(jnp.sum(part, axis=-1, keepdims=True) for part in powers)
  return tuple((part / total).astype(dtype) for part in powers)


def _joint_softmax_forward(scores, dtype):
  probabilities = tuple(checkpoint_name(part, _PROBABILITIES) for part in _joint_softmax(scores, dtype))
  return probabilities, probabilities


def _joint_softmax_backward(dtype, probabilities, gradients):
  del dtype
  pairs = [(p.astype(jnp.float32), g.astype(jnp.float32)) for p, g in zip(probabilities, gradients, strict=True)]
  expected = sum(jnp.sum(p * g, axis=-1, keepdims=True) for p, g in pairs)
  return (tuple(p * (g - expected) for p, g in pairs),)


_joint_softmax.defvjp(_joint_softmax_forward, _joint_softmax_backward)
