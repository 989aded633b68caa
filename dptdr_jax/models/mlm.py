"""Masked language modelling: the head of BERT and RoBERTa, from a checkpoint or fresh, and its loss.

The head's parameters: {'transform': {'kernel' [H, H], 'bias' [H]}, 'norm': {'scale', 'bias'} [H], 'bias' [V]}; the
decoder is the table of word embeddings, as in checkpoints of both families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.convert import Tensors, plain_names
from dptdr_jax.models.encoder import ACTIVATION, LayerNorm
from dptdr_jax.models.products import precision, product
from dptdr_jax.models.prompts import Params, flatten, unflatten

# Hugging Face's names of our parameters. The bias and the decoder are under the stem below.
_HEAD = {
  "bert": {"transform": "cls.predictions.transform.dense", "norm": "cls.predictions.transform.LayerNorm"},
  "roberta": {"transform": "lm_head.dense", "norm": "lm_head.layer_norm"},
}
_STEM = {"bert": "cls.predictions", "roberta": "lm_head"}
_CLASS = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}
_WORDS = "embeddings.word_embeddings.weight"


def check_family(config: EncoderConfig) -> None:
  """Raises InputError if the language-model head of this architecture is not supported."""
  if config.family not in _HEAD:
    raise InputError(
      "masked language modelling covers BERT and RoBERTa", value=config.family, fix="Set pretrain.mlm_weight to 0"
    )


def init_head(key: jax.Array, config: EncoderConfig) -> Params:
  """A fresh head, float32, initialised as in transformers: kernel N(0, initializer_range), scale 1, biases 0."""
  check_family(config)
  width = config.hidden_size
  kernel = config.initializer_range * jax.random.normal(key, (width, width), jnp.float32)
  return {
    "transform": {"kernel": kernel, "bias": jnp.zeros((width,))},
    "norm": {"scale": jnp.ones((width,)), "bias": jnp.zeros((width,))},
    "bias": jnp.zeros((config.vocab_size,)),
  }


def head_from_huggingface(
  tensors: Mapping[str, np.ndarray], config: EncoderConfig, source: files.Path | None = None
) -> Params | None:
  """The head of a checkpoint, float32, or None if it has none.

  Raises:
    InputError: an incomplete head, a tensor of another shape, or a decoder that is not the word embeddings.
  """
  check_family(config)
  stem, plain = _STEM[config.family], plain_names(tensors, config)
  named = {name: tensor for name, tensor in plain.items() if name.startswith(f"{stem}.")}
  if not named:
    return None
  if f"{stem}.decoder.bias" in named:
    named.setdefault(f"{stem}.bias", named.pop(f"{stem}.decoder.bias"))  # old and new checkpoints name it differently
  decoder = named.pop(f"{stem}.decoder.weight", None)
  if decoder is not None and not np.array_equal(decoder, plain.get(_WORDS, ())):
    raise InputError("the language-model head's decoder is not tied to the word embeddings", path=source)
  flat = {}
  for path, (name, shape) in _tensors(config).items():
    tensor = named.pop(name, None)
    if tensor is None or tensor.shape != shape:
      found = "missing" if tensor is None else f"of shape {tensor.shape}"
      raise InputError(f"tensor {name} is {found}, expected {shape}", path=source)
    flat[path] = np.asarray(tensor.T if path.endswith("kernel") else tensor, np.float32)
  if named:
    raise InputError("unknown tensors of a language-model head", path=source, value=sorted(named))
  return unflatten(flat)


def add_head(tensors: Tensors, head: Params, config: EncoderConfig) -> Tensors:
  """Joins a bare model's tensors (`convert.to_huggingface`) and a head under the names of …ForMaskedLM."""
  named = {f"{config.family}.{name}": tensor for name, tensor in tensors.items()}
  leaves = flatten(head)
  for path, (name, _) in _tensors(config).items():
    named[name] = np.ascontiguousarray(leaves[path].T) if path.endswith("kernel") else leaves[path]
  return named


def masked_lm_config(config: EncoderConfig) -> dict[str, Any]:
  """The fields of config.json for what `add_head` returns."""
  return config.to_dict() | {"architectures": [_CLASS[config.family]], "tie_word_embeddings": True}


def logits(head: Params, words: jax.Array, hidden: jax.Array, config: EncoderConfig, compute_dtype: Any) -> jax.Array:
  """Scores of all words.

  Args:
    words: [V, H], the encoder's table of word embeddings.
    hidden: […, H], last hidden states.
    compute_dtype: of the two matrix products.

  Returns:
    […, V] float32.
  """
  kernel = head["transform"]["kernel"].astype(compute_dtype)
  x = jnp.matmul(hidden.astype(compute_dtype), kernel, precision=precision(compute_dtype))
  x = x + head["transform"]["bias"].astype(compute_dtype)
  # RoBERTa's head uses gelu and ignores hidden_act.
  x = ACTIVATION[config.activation if config.family == "bert" else "gelu"](x)
  x = LayerNorm(config.layer_norm_eps).apply({"params": head["norm"]}, x)
  scores = product("rh,vh->rv", x.reshape(-1, x.shape[-1]), words.astype(compute_dtype))
  return scores.reshape(*x.shape[:-1], -1) + head["bias"]


def masked_loss(
  head: Params,
  words: jax.Array,
  hidden: jax.Array,
  positions: jax.Array,
  labels: jax.Array,
  config: EncoderConfig,
  compute_dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
  """Loss and hits of each example.

  Args:
    hidden: [B, T, H].
    positions: [B, K] int32, masked positions of each row. Only these K vectors are multiplied with the vocabulary.
    labels: [B, K] int32, the original tokens there; −1 for padding.

  Returns:
    Two sums over the masked tokens of each row, [B] float32 each: −log probability of the original token, and how often
    that token scores highest.
  """
  chosen = jnp.take_along_axis(hidden, positions[..., None], axis=1)
  scores = logits(head, words, chosen, config, compute_dtype)
  real = labels >= 0
  wanted = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
  loss = jax.nn.logsumexp(scores, axis=-1) - wanted
  hit = wanted >= jnp.max(scores, axis=-1)
  return jnp.sum(jnp.where(real, loss, 0.0), axis=1), jnp.sum(real & hit, axis=1, dtype=jnp.float32)


def _tensors(config: EncoderConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
  """Hugging Face's name and shape of each parameter of the head."""
  names, width = _HEAD[config.family], config.hidden_size
  return {
    "transform/kernel": (f"{names['transform']}.weight", (width, width)),
    "transform/bias": (f"{names['transform']}.bias", (width,)),
    "norm/scale": (f"{names['norm']}.weight", (width,)),
    "norm/bias": (f"{names['norm']}.bias", (width,)),
    "bias": (f"{_STEM[config.family]}.bias", (config.vocab_size,)),
  }
