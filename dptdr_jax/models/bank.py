"""A bank of prompts on the device: the rows of one batch use the prompts of different tasks.

A row names a slot. In the loop over the layers it gathers that slot's keys and values of one layer. So queries and
passages of many tasks share one forward pass. Never more than one layer's prompts [B, 2, N, P, D] are copied.
Prompt length, position shift, pooling and normalisation are data of the slot: a new task needs no new program.
Only deep prompts can be stored, with any projection already applied; a prompt of length 0 is the bare backbone.

Legend: K slots, L layers, B rows, T tokens, P the longest prompt, N heads, D head size, H = N·D.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dptdr_jax.core.errors import InputError
from dptdr_jax.models.attention import RowPrompts
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.encoder import Embeddings, Layer
from dptdr_jax.models.prompts import Params, PromptSpec
from dptdr_jax.models.represent import POOLINGS, pool, unit_length


class Bank(NamedTuple):
  """K slots on the device.

  The axes of `prompts` are in the order in which batched products read a row's keys and values: a gather copies them
  as they are.
  """

  prompts: jax.Array  # [K, L, 2, N, P, D] in the compute dtype; zeros beyond a prompt's length
  lengths: jax.Array  # [K] int32
  shifts: jax.Array  # [K] int32, added to the positions of tokens
  mean: jax.Array  # [K] bool: mean pooling, else token 0
  normalize: jax.Array  # [K] bool


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
  """The contents of one slot, on the host: a prompt and how its vectors are made. Compared by identity."""

  prompt: np.ndarray  # [P, L, 2, N, D] in the compute dtype; a view of the given parameters where possible
  shift: int
  mean: bool
  normalize: bool


def check_backbone(config: EncoderConfig) -> None:
  """Raises InputError if a bank does not support this architecture."""
  if config.family == "deberta":
    what = "DeBERTa cannot serve several tasks in one batch: its attention has relative positions"
    raise InputError(what, fix="Use a BERT or RoBERTa backbone")


def make_entry(
  config: EncoderConfig, spec: PromptSpec, params: Params, *, pooling: str, normalize: bool, dtype: Any
) -> Entry:
  """Makes an entry of raw prompt parameters, on the host: nothing is compiled.

  Args:
    params: see `prompts`; not read if spec.kind is 'none'.
    pooling, normalize: see `represent`.
    dtype: of the bank.

  Raises:
    InputError: a shallow prompt, DeBERTa, an unknown pooling, or values that are not finite.
  """
  check_backbone(config)
  if spec.kind == "shallow":
    what = "shallow prompts cannot share a batch with other tasks: they change the input sequence"
    raise InputError(what, fix="Serve a retriever with a deep prompt")
  if pooling not in POOLINGS:
    raise InputError("unknown pooling", value=pooling, fix=f"Known: {', '.join(POOLINGS)}")
  shape = (spec.length, config.num_layers, 2, config.num_heads, config.head_size)
  table = np.zeros(shape, np.float32) if spec.kind == "none" else _expand(spec, params).reshape(shape)
  if not np.isfinite(table).all():
    raise InputError("the prompt has values that are not finite", fix="Train it again, or copy its files again")
  return Entry(table.astype(dtype, copy=False), spec.position_shift, pooling == "mean", normalize)


def _expand(spec: PromptSpec, params: Params) -> np.ndarray:
  """`prompts.expand_prompt` of a deep prompt in numpy: [P, 2·L·H] float32."""
  table = np.asarray(params["table"], np.float32)
  if spec.projection == "none":
    return table
  hidden, output = (
    {name: np.asarray(array, np.float32) for name, array in params[layer].items()} for layer in ("hidden", "output")
  )
  return np.tanh(table @ hidden["kernel"] + hidden["bias"]) @ output["kernel"] + output["bias"]


def empty_bank(config: EncoderConfig, slots: int, length: int, dtype: Any) -> Bank:
  """A bank of bare backbones for prompts of at most `length`."""
  return Bank(
    jnp.zeros((slots, config.num_layers, 2, config.num_heads, length, config.head_size), dtype),
    jnp.zeros(slots, jnp.int32),
    jnp.zeros(slots, jnp.int32),
    jnp.zeros(slots, bool),
    jnp.zeros(slots, bool),
  )


def slot_values(entry: Entry, length: int) -> dict[str, np.ndarray]:
  """The arguments of `write` for an entry, its prompt padded to the bank's `length`.

  Raises:
    InputError: the prompt is longer.
  """
  size = len(entry.prompt)
  if size > length:
    raise InputError(f"the bank holds prompts of at most {length}", value=size, fix="Raise the bank's prompt length")
  padded = np.zeros((length, *entry.prompt.shape[1:]), entry.prompt.dtype)
  padded[:size] = entry.prompt
  return {
    "prompt": padded,
    "length": np.int32(size),
    "shift": np.int32(entry.shift),
    "mean": np.bool_(entry.mean),
    "normalize": np.bool_(entry.normalize),
  }


def write(bank: Bank, slot: jax.Array, prompt, length, shift, mean, normalize) -> Bank:
  """The bank with other contents in one slot. Donate the bank to jit, then the slot is overwritten in place.

  Args:
    slot: int32 scalar.
    prompt: [P, L, 2, N, D]; the others are scalars, see `slot_values`.
  """
  return Bank(
    bank.prompts.at[slot].set(prompt.transpose(1, 2, 3, 0, 4)),
    bank.lengths.at[slot].set(length),
    bank.shifts.at[slot].set(shift),
    bank.mean.at[slot].set(mean),
    bank.normalize.at[slot].set(normalize),
  )


def represent_rows(
  config: EncoderConfig,
  params: Params,
  bank: Bank,
  tokens: jax.Array,
  lengths: jax.Array,
  slots: jax.Array,
  *,
  compute_dtype: Any = jnp.float32,
  attention: str = "auto",
) -> jax.Array:
  """One vector for each row, each with the prompt, pooling and normalisation of its slot; see `represent`.

  Args:
    params: the backbone's tree.
    tokens: [B, T] int32, padded on the right. lengths: [B] int32. slots: [B] int32.

  Returns:
    [B, H] float32: what `represent` returns for the row's task alone, up to rounding.
  """
  prompt_lengths, mean = bank.lengths[slots], bank.mean[slots]

  def apply(weights, x, layer, row=None):
    own = bank.prompts[slots, layer]  # [B, 2, N, P, D]
    prompt = RowPrompts(own[:, 0], own[:, 1], prompt_lengths)
    module = Layer(config, compute_dtype, attention, row)
    return module.apply({"params": weights}, x, layer, prompt, lengths, None, None)[0]

  first_positions = config.first_position + bank.shifts[slots]
  embeddings = Embeddings(config, compute_dtype)
  x = embeddings.apply({"params": params["embeddings"]}, tokens, first_positions, None)
  last = config.num_layers - 1
  if last:
    layers = params["layers"], jnp.arange(last)
    x, _ = jax.lax.scan(lambda x, layer: (apply(layer[0], x, layer[1]), None), x, layers)

  def both_poolings(x):
    hidden = apply(params["last_layer"], x, last)
    vectors = [pool(hidden, lengths, pooling=pooling, normalize=False) for pooling in ("mean", "first")]
    return jnp.where(mean[:, None], *vectors)

  def first_token(x):
    return pool(apply(params["last_layer"], x, last, row=0), lengths, pooling="first", normalize=False)

  # Where no row needs the mean, the last layer computes one row a text, as `represent` does.
  vectors = jax.lax.cond(jnp.any(mean), both_poolings, first_token, x)
  return jnp.where(bank.normalize[slots][:, None], unit_length(vectors), vectors)
