"""Converts weights between Hugging Face's layout and ours, and refuses unknown tensors and other shapes."""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.encoder import Encoder
from dptdr_jax.models.prompts import Params, flatten, named_leaves, unflatten

Tensors = dict[str, np.ndarray]

# Tensors that a checkpoint may contain and an encoder does not need: poolers, heads, buffers, the original's prompts.
_UNUSED = re.compile(
  r"((bert|roberta|deberta)\.)?"
  r"(pooler\.|embeddings\.position_ids$|embeddings\.token_type_ids$|cls\.|lm_head\.|lm_predictions\.|classifier\.|prefix_encoder\.)"
)
# DeBERTa's table of absolute positions, unused if the configuration does not add them.
_UNUSED_POSITIONS = "embeddings.position_embeddings.weight"

# Hugging Face's names of our modules (for DeBERTa after `_split_projections`).
_EMBEDDINGS = {
  "word": "word_embeddings",
  "position": "position_embeddings",
  "token_type": "token_type_embeddings",
  "norm": "LayerNorm",
}
_LAYER = {
  "query": "attention.self.query",
  "key": "attention.self.key",
  "value": "attention.self.value",
  "position_key": "attention.self.pos_proj",
  "position_query": "attention.self.pos_q_proj",
  "attention_output": "attention.output.dense",
  "attention_norm": "attention.output.LayerNorm",
  "intermediate": "intermediate.dense",
  "output": "output.dense",
  "output_norm": "output.LayerNorm",
}


def weight_files(directory: files.Path) -> list[pathlib.Path]:
  """The weight files of a directory: model.safetensors, the shards named by its index, or pytorch_model.bin.

  Raises:
    InputError: there is none of them.
  """
  directory = pathlib.Path(directory)
  index = directory / "model.safetensors.index.json"
  if (directory / "model.safetensors").is_file():
    return [directory / "model.safetensors"]
  if index.is_file():
    with files.fields_of(index):
      shards = sorted({pathlib.PurePath(shard) for shard in {**files.read_json(index)["weight_map"]}.values()})
    if not shards:
      raise InputError("weight_map names no shard", path=index)
    if outside := [str(shard) for shard in shards if len(shard.parts) != 1 or shard.name == ".."]:
      raise InputError("a shard must be a file in this directory", path=index, value=outside[0])
    return [directory / shard for shard in shards]
  if (directory / "pytorch_model.bin").is_file():
    return [directory / "pytorch_model.bin"]
  raise InputError("neither model.safetensors nor pytorch_model.bin is here", path=directory)


def load_backbone_tensors(directory: files.Path) -> Tensors:
  """Reads the weights of a directory, see `weight_files`; a .bin with torch's weights_only.

  Raises:
    InputError: no such file, a truncated or damaged one, or a .bin and torch is not installed.
  """
  found = weight_files(directory)
  if found[0].name == "pytorch_model.bin":
    return _read_torch(found[0])
  return {name: tensor for path in found for name, tensor in read_safetensors(path).items()}


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes one file, readable by everyone who can read the directory; safetensors makes it private to its owner."""
  safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
  path.chmod(0o600 | path.parent.stat().st_mode & 0o444)


def read_safetensors(path: pathlib.Path) -> Tensors:
  """Reads one file; raises InputError if it is missing, truncated or damaged."""
  if not path.is_file():
    raise InputError("this file is missing", path=path, fix="Copy the whole directory again")
  try:
    return safetensors.numpy.load_file(path)
  except (safetensors.SafetensorError, json.JSONDecodeError, ValueError) as error:
    what = f"not a complete safetensors file ({error})"
    raise InputError(what, path=path, fix="Copy or download it again") from error


def _read_torch(path: pathlib.Path) -> Tensors:
  try:
    import torch
  except ImportError as error:
    fix = "Install torch (pip install 'dptdr_jax[torch]') or convert the file to model.safetensors"
    raise InputError("reading a .bin needs torch", path=path, fix=fix) from error
  try:
    tensors = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # torch, pickle, zipfile and the runtime raise different errors here
    raise InputError(f"not a complete weights-only torch file ({error})", path=path) from error
  if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
    raise InputError("not a flat dict of tensors", path=path, fix="Save only model.state_dict()")
  # torch cannot convert bfloat16 to numpy; float32 holds every value of the 16-bit types exactly.
  return {name: (t.float() if t.is_floating_point() else t).detach().numpy() for name, t in tensors.items()}


def init_params(key: jax.Array, config: EncoderConfig) -> Params:
  """A random float32 backbone as transformers initialises it: kernels, embeddings N(0, initializer_range), biases 0."""
  tokens, lengths = jnp.zeros((1, 2), jnp.int32), jnp.full((1,), 2, jnp.int32)
  params = dict(jax.jit(Encoder(config).init)(key, tokens, lengths)["params"])
  word = params["embeddings"]["word"].at[config.pad_id].set(0.0)
  return params | {"embeddings": params["embeddings"] | {"word": word}}


def from_huggingface(
  tensors: Mapping[str, np.ndarray],
  config: EncoderConfig,
  *,
  dtype: Any = jnp.float32,
  source: files.Path | None = None,
) -> Params:
  """Hugging Face tensors to our tree of host arrays; the caller puts them on the devices.

  Args:
    tensors: names with or without the family's prefix ('roberta.…').
    dtype: of the tree (LayerNorm's weights stay float32).
    source: the file or directory that errors name.

  Raises:
    InputError: a missing or unknown tensor, or one of another shape.
  """
  tensors = plain_names(tensors, config)
  if config.family == "deberta":
    tensors = _split_projections(tensors, config, source)
  left = set(tensors)
  flat = {}
  for path, shape in _shapes(config).items():
    parts = []
    for name, part_shape in _sources(path, shape, config):
      if name not in tensors:
        raise InputError(f"tensor {name} is missing", path=source, fix="Check that config.json is of these weights")
      if tensors[name].shape != part_shape:
        raise InputError(f"tensor {name} has shape {tensors[name].shape}, expected {part_shape}", path=source)
      parts.append(tensors[name].T if path.endswith("kernel") else tensors[name])
      left.discard(name)
    array = np.stack(parts) if path.startswith("layers/") else parts[0]
    flat[path] = np.asarray(array, _stored_as(path, dtype))
  unknown = sorted(name for name in left if not _is_unused(name, config))
  if unknown:
    raise InputError(
      f"{len(unknown)} tensors are not part of a {config.family} encoder", path=source, value=unknown[:5]
    )
  return unflatten(flat)


def abstract_params(config: EncoderConfig, dtype: Any) -> Params:
  """Shapes and dtypes of what `from_huggingface` returns."""
  shapes = _shapes(config).items()
  return unflatten({path: jax.ShapeDtypeStruct(shape, _stored_as(path, dtype)) for path, shape in shapes})


def _stored_as(path: str, dtype: Any) -> Any:
  """The dtype of one array: LayerNorm's weights stay float32."""
  return np.float32 if "norm/" in path else dtype


def to_huggingface(params: Params, config: EncoderConfig) -> Tensors:
  """The inverse of `from_huggingface`: float32 tensors with the names of transformers' bare model."""
  tensors: Tensors = {}
  for path, array in flatten(params).items():
    parts = array if path.startswith("layers/") else [array]
    for (name, _), part in zip(_sources(path, array.shape, config), parts, strict=True):
      tensors[name] = np.ascontiguousarray(part.T if path.endswith("kernel") else part)
  return _join_projections(tensors, config) if config.family == "deberta" else tensors


def plain_names(tensors: Mapping[str, np.ndarray], config: EncoderConfig) -> Tensors:
  """Removes the family's prefix from names, and renames gamma and beta of old files to weight and bias."""
  plain = {}
  for name, array in tensors.items():
    name = name.removeprefix(f"{config.family}.")
    plain[name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")] = array
  return plain


def _is_unused(name: str, config: EncoderConfig) -> bool:
  return bool(_UNUSED.match(name)) or (name == _UNUSED_POSITIONS and not config.has_positions)


@functools.lru_cache(maxsize=8)  # .25 s a call, and training converts the same backbone many times
def _shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
  """The shape of each array of our tree, by name."""
  abstract = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
  return {path: leaf.shape for path, leaf in named_leaves(abstract).items()}


def _sources(path: str, shape: tuple[int, ...], config: EncoderConfig) -> list[tuple[str, tuple[int, ...]]]:
  """Names and shapes of the Hugging Face tensors in one of our arrays: one tensor, or one for each stacked layer."""
  if path == "relative_positions":
    return [("encoder.rel_embeddings.weight", shape)]
  place, module, *_ = path.split("/")
  leaf = "bias" if path.endswith("/bias") else "weight"
  if place == "embeddings":
    return [(f"embeddings.{_EMBEDDINGS[module]}.{leaf}", shape)]
  layers = [config.num_layers - 1]
  if place == "layers":
    layers, shape = range(config.num_layers - 1), shape[1:]
  shape = shape[::-1] if path.endswith("/kernel") else shape
  return [(f"encoder.layer.{layer}.{_LAYER[module]}.{leaf}", shape) for layer in layers]


def _split_projections(tensors: Tensors, config: EncoderConfig, source) -> Tensors:
  """Splits DeBERTa's joint projection in_proj [N·3·D, H] into queries, keys and values; keys have no bias."""
  heads = (config.num_heads, 3, config.head_size)
  shape = (3 * config.hidden_size, config.hidden_size)
  split = {}
  for name, array in tensors.items():
    stem, _, leaf = name.rpartition("self.")
    if stem and leaf == "in_proj.weight":
      if array.shape != shape:
        raise InputError(f"tensor {name} has shape {array.shape}, expected {shape}", path=source)
      parts = array.reshape(*heads, config.hidden_size)
      for part, kind in enumerate(("query", "key", "value")):
        split[f"{stem}self.{kind}.weight"] = parts[:, part].reshape(config.hidden_size, config.hidden_size)
    elif stem and leaf in ("q_bias", "v_bias"):
      split[f"{stem}self.{'query' if leaf == 'q_bias' else 'value'}.bias"] = array
    else:
      split[name] = array
  return split


def _join_projections(tensors: Tensors, config: EncoderConfig) -> Tensors:
  joined = dict(tensors)
  for layer in range(config.num_layers):
    stem = f"encoder.layer.{layer}.attention.self."
    kinds = [joined.pop(f"{stem}{kind}.weight") for kind in ("query", "key", "value")]
    heads = [kind.reshape(config.num_heads, config.head_size, config.hidden_size) for kind in kinds]
    joined[f"{stem}in_proj.weight"] = np.stack(heads, axis=1).reshape(-1, config.hidden_size)
    joined[f"{stem}q_bias"] = joined.pop(f"{stem}query.bias")
    joined[f"{stem}v_bias"] = joined.pop(f"{stem}value.bias")
  return joined
