"""Weights between Hugging Face's layout and ours: every tensor used, every shape checked, listed leftovers only."""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.encoder import Encoder
from dptdr_jax.models.prompts import Params, unflatten

Tensors = dict[str, np.ndarray]

# What a checkpoint may carry and a retriever never reads: poolers, heads, buffers, the original's prompts.
_LEFTOVERS = re.compile(
  r"((bert|roberta|deberta)\.)?"
  r"(pooler\.|embeddings\.position_ids$|embeddings\.token_type_ids$|cls\.|lm_head\.|lm_predictions\.|classifier\.|prefix_encoder\.)"
)
# DeBERTa's embedding table of absolute positions, where the configuration says that they are not added.
_UNUSED_POSITIONS = "embeddings.position_embeddings.weight"

# Our modules' names in Hugging Face's layout (DeBERTa's after `_split_projections`).
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
  """The files of a directory's weights: model.safetensors, what its index names, or pytorch_model.bin.

  Raises:
    InputError: none of them is there.
  """
  directory = pathlib.Path(directory)
  index = directory / "model.safetensors.index.json"
  if (directory / "model.safetensors").is_file():
    return [directory / "model.safetensors"]
  if index.is_file():
    return [directory / shard for shard in sorted(set(files.read_json(index)["weight_map"].values()))]
  if (directory / "pytorch_model.bin").is_file():
    return [directory / "pytorch_model.bin"]
  raise InputError("neither model.safetensors nor pytorch_model.bin is here", path=directory)


def load_backbone_tensors(directory: files.Path) -> Tensors:
  """Reads the weights of a directory, see `weight_files`; of a .bin torch's weights only.

  Raises:
    InputError: no such file, one that is cut short or damaged, or a .bin where torch is not installed.
  """
  found = weight_files(directory)
  if found[0].name == "pytorch_model.bin":
    return _read_torch(found[0])
  return {name: tensor for path in found for name, tensor in read_safetensors(path).items()}


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes one file for all who can read the directory: safetensors makes it its owner's alone."""
  import safetensors.numpy

  safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
  path.chmod(0o600 | path.parent.stat().st_mode & 0o444)


def read_safetensors(path: pathlib.Path) -> Tensors:
  """Reads one file; one that is missing, cut short or damaged is an InputError."""
  # ml_dtypes (a dependency of jax) gives numpy its bfloat16, which safetensors' numpy reader needs.
  import safetensors
  import safetensors.numpy

  if not path.is_file():
    raise InputError("this file is missing", path=path, fix="Copy the whole directory again")
  try:
    return safetensors.numpy.load_file(path)
  except (safetensors.SafetensorError, json.JSONDecodeError, ValueError) as error:
    raise InputError(f"not a whole safetensors file ({error})", path=path, fix="Copy or download it again") from error


def _read_torch(path: pathlib.Path) -> Tensors:
  try:
    import torch
  except ImportError as error:
    fix = "Install torch (pip install 'dptdr_jax[torch]') or convert the file to model.safetensors"
    raise InputError("reading a .bin needs torch", path=path, fix=fix) from error
  try:
    tensors = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # torch raises its own, pickle's, zipfile's and the runtime's errors here
    raise InputError(f"not a whole weights-only torch file ({error})", path=path) from error
  if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
    raise InputError("not a flat dict of tensors", path=path, fix="Save model.state_dict() alone")
  # numpy knows no bfloat16 of torch's: float32 holds every value of the 16-bit kinds exactly.
  return {name: (t.float() if t.is_floating_point() else t).detach().numpy() for name, t in tensors.items()}


def init_params(key: jax.Array, config: EncoderConfig) -> Params:
  """A random float32 backbone: kernels and embeddings N(0, initializer_range), biases 0, as transformers starts one."""
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
  """Hugging Face tensors to our tree, as host arrays: put them on the devices once.

  Args:
    tensors: with or without the family's prefix ('roberta.…').
    dtype: what the tree is stored in (LayerNorm's weights stay float32).
    source: the file or directory that errors name.

  Raises:
    InputError: a tensor that is missing, of another shape, or not known.
  """
  tensors = _plain_names(tensors, config)
  if config.family == "deberta":
    tensors = _split_projections(tensors, config, source)
  left = set(tensors)
  flat = {}
  for path, shape in _shapes(config):
    parts = []
    for name, part_shape in _sources(path, shape, config):
      if name not in tensors:
        raise InputError(f"tensor {name} is missing", path=source, fix="Does config.json belong to these weights?")
      if tensors[name].shape != part_shape:
        raise InputError(f"tensor {name} has shape {tensors[name].shape}, expected {part_shape}", path=source)
      parts.append(tensors[name].T if path[-1] == "kernel" else tensors[name])
      left.discard(name)
    array = np.stack(parts) if path[0] == "layers" else parts[0]
    flat["/".join(path)] = np.asarray(array, _stored_as(path, dtype))
  unknown = sorted(name for name in left if not _is_leftover(name, config))
  if unknown:
    raise InputError(
      f"{len(unknown)} tensors are not part of a {config.family} encoder", path=source, value=unknown[:5]
    )
  return unflatten(flat)


def abstract_params(config: EncoderConfig, dtype: Any) -> Params:
  """Shapes and dtypes of what `from_huggingface` gives, without weights."""
  shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
  flat = {path: jax.ShapeDtypeStruct(leaf.shape, _stored_as(path, dtype)) for path, leaf in _leaves(shapes)}
  return unflatten({"/".join(path): leaf for path, leaf in flat.items()})


def _stored_as(path: tuple[str, ...], dtype: Any) -> Any:
  """LayerNorm's weights stay float32."""
  return np.float32 if len(path) > 1 and path[-2].endswith("norm") else dtype


def to_huggingface(params: Params, config: EncoderConfig) -> Tensors:
  """The inverse of `from_huggingface`: float32 tensors under the names of transformers' bare model."""
  leaves = {path: np.asarray(array, np.float32) for path, array in _leaves(params)}
  tensors: Tensors = {}
  for path, shape in _shapes(config):
    array = leaves[path]
    parts = array if path[0] == "layers" else [array]
    for (name, _), part in zip(_sources(path, shape, config), parts, strict=True):
      tensors[name] = np.ascontiguousarray(part.T if path[-1] == "kernel" else part)
  return _join_projections(tensors, config) if config.family == "deberta" else tensors


def bert_to_roberta(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> tuple[Tensors, dict[str, Any]]:
  """Rewrites a BERT checkpoint into RoBERTa's layout, which then gives the same vectors for `roberta_token_ids(ids)`.

  RoBERTa's padding id is 1, BERT's 0: rows 0 and 1 of the word table change places. RoBERTa's positions start behind
  the padding id: two rows go in front of the position table. RoBERTa knows one token type: the first one stays.

  Args:
    tensors: with or without 'bert.' in front; leftovers such as the pooler are dropped.
    config: the fields of config.json, with a pad_token_id of 0.
  """
  shape = EncoderConfig.from_dict(config)
  if shape.family != "bert" or shape.pad_id != 0:
    raise InputError("only a BERT checkpoint with padding id 0 can be rewritten", value=config.get("model_type"))
  plain = {name: array for name, array in _plain_names(tensors, shape).items() if not _is_leftover(name, shape)}
  word, position, kind = (f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type"))
  table = plain[word].copy()
  table[[0, 1]] = table[[1, 0]]
  plain[word] = table
  plain[position] = np.concatenate([np.zeros_like(plain[position][:2]), plain[position]])
  plain[kind] = plain[kind][:1]
  changes = {
    "model_type": "roberta",
    "architectures": ["RobertaModel"],
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "max_position_embeddings": shape.max_positions + 2,
  }
  return plain, {**config, **changes}


def roberta_token_ids(ids: np.ndarray) -> np.ndarray:
  """Token ids of a BERT checkpoint as its rewrite by `bert_to_roberta` counts them: 0 and 1 change places."""
  return np.where(ids < 2, 1 - ids, ids)


def _plain_names(tensors: Mapping[str, np.ndarray], config: EncoderConfig) -> Tensors:
  """Names without the family's prefix, and with LayerNorm's weight and bias for the gamma and beta of old files."""
  plain = {}
  for name, array in tensors.items():
    name = name.removeprefix(f"{config.family}.")
    plain[name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")] = array
  return plain


def _is_leftover(name: str, config: EncoderConfig) -> bool:
  return bool(_LEFTOVERS.match(name)) or (name == _UNUSED_POSITIONS and not config.has_positions)


@functools.lru_cache(maxsize=8)  # a quarter of a second each, and a backbone that trains is measured again and again
def _shapes(config: EncoderConfig) -> tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]:
  """Path and shape of every array of our tree."""
  abstract = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
  return tuple((path, leaf.shape) for path, leaf in _leaves(abstract))


def _leaves(params: Params) -> Iterator[tuple[tuple[str, ...], Any]]:
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    yield tuple(entry.key for entry in path), leaf


def _sources(path: tuple[str, ...], shape: tuple[int, ...], config: EncoderConfig) -> list[tuple[str, tuple[int, ...]]]:
  """Names and shapes of the Hugging Face tensors that one of our arrays holds: one, or one for each stacked layer."""
  leaf = "bias" if path[-1] == "bias" else "weight"
  if path[0] == "relative_positions":
    return [("encoder.rel_embeddings.weight", shape)]
  if path[0] == "embeddings":
    return [(f"embeddings.{_EMBEDDINGS[path[1]]}.{leaf}", shape)]
  stacked = path[0] == "layers"
  layers = range(config.num_layers - 1) if stacked else [config.num_layers - 1]
  shape = shape[1:] if stacked else shape
  shape = shape[::-1] if path[-1] == "kernel" else shape
  return [(f"encoder.layer.{layer}.{_LAYER[path[1]]}.{leaf}", shape) for layer in layers]


def _split_projections(tensors: Tensors, config: EncoderConfig, source) -> Tensors:
  """DeBERTa stores queries, keys and values as one product, head by head: in_proj [N·3·D, H]; keys have no bias."""
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
