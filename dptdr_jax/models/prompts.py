"""Prompts, the trained parameters: deep (keys and values in every layer) or shallow (vectors before the embeddings).

Raw parameters are small trees of float32 arrays; `expand_prompt` turns them into what the encoder reads.
A dense layer is {'kernel': [in, out], 'bias': [out]}. The layout:
  deep, no projection     {'table': [P, 2·L·H]}. Order: layer 0 key, layer 0 value, layer 1 key, …
  deep, 'mlp'             {'table': [P, H], 'hidden': dense, 'output': dense}. tanh between, output 2·L·H.
  shallow, no projection  {'table': [P, H]}.
  shallow, 'mlp'          {'table': [P, H], 'hidden': dense, 'output': dense}. ReLU between, output H.
  shallow, 'lstm'         as 'mlp', with 'lstm' before it: two bidirectional layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dptdr_jax.core.errors import InputError
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.encoder import Encoder

Params = dict[str, Any]

_INIT_SCALE = 0.02  # standard deviation of fresh tables and kernels (the original's)
_LSTM_LAYERS, _DIRECTIONS = 2, ("forward", "backward")
_CHOICES = {
  "kind": ("deep", "shallow", "none"),
  "projection": ("none", "mlp", "lstm"),
  "init": ("normal", "words"),
}
# Fields that matter in training only.
_TRAINING_FIELDS = ("dropout", "init")
# Training options of earlier versions, in saved descriptions; they do not change vectors.
_FORMER_FIELDS = ("dropout_per", "init_scale")


@dataclasses.dataclass(frozen=True)
class PromptSpec:
  """The kind of prompt, and everything but its parameters that vectors depend on."""

  kind: str = "deep"  # 'deep', 'shallow' or 'none' (the bare backbone)
  length: int = 0  # P
  projection: str = "none"  # 'none', 'mlp' or (shallow only) 'lstm'
  projection_size: int = 0  # width of the projection's hidden layer
  position_shift: int = 0  # deep: added to the tokens' positions; P in the original
  dropout: float = 0.1  # on deep keys and values, a mask an example; shallow vectors get the embedding layer's dropout
  init: str = "normal"  # 'normal', or 'words': the frozen backbone's own keys and values of given words

  def __post_init__(self):
    for field, known in _CHOICES.items():
      if getattr(self, field) not in known:
        raise InputError(f"unknown prompt {field}", value=getattr(self, field), fix=f"Known: {', '.join(known)}")
    problem = None
    if (self.length < 1) != (self.kind == "none") or self.length < 0:
      problem = f"prompt length {self.length} is not possible for kind '{self.kind}'"
    elif self.projection == "lstm" and self.kind != "shallow":
      problem = "projection 'lstm' is for shallow prompts only"
    elif (self.projection == "none") != (self.projection_size == 0) or self.projection_size < 0:
      problem = f"projection_size {self.projection_size} is not possible for projection '{self.projection}'"
    elif self.position_shift < 0 or (self.position_shift and self.kind != "deep"):
      problem = f"position_shift {self.position_shift} is negative, or not 0 for a prompt that is not deep"
    elif not 0 <= self.dropout < 1:
      problem = f"prompt dropout {self.dropout} is not in [0, 1)"
    elif self.init == "words" and self.projection != "none":
      problem = "init 'words' is for projection 'none' only"
    if problem:
      raise InputError(problem, fix="Change the fields of `prompt`")

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> PromptSpec:
    """Reads the fields of a saved description, also of earlier versions."""
    return cls(**{name: value for name, value in fields.items() if name not in _FORMER_FIELDS})

  def read_fields(self) -> dict[str, Any]:
    """The fields that the vectors of a trained prompt depend on; the others matter in training only."""
    return {name: value for name, value in dataclasses.asdict(self).items() if name not in _TRAINING_FIELDS}


def as_read(spec: PromptSpec) -> PromptSpec:
  """The spec with training fields at their defaults, which change neither programs nor shapes."""
  return PromptSpec(**spec.read_fields())


def longest_input(config: EncoderConfig, spec: PromptSpec) -> int | None:
  """The most tokens, special ones included, that the position table allows with this prompt. None: no limit."""
  if not config.has_positions:
    return None
  taken = spec.length if spec.kind == "shallow" else spec.position_shift
  return config.max_positions - config.first_position - taken


def check_lengths(config: EncoderConfig, spec: PromptSpec, max_tokens: int) -> None:
  """Raises InputError if the prompt and `max_tokens` tokens (with special tokens) don't fit the position table."""
  longest = longest_input(config, spec)
  if longest is not None and max_tokens > longest:
    raise InputError(
      f"a prompt of {spec.length} and {max_tokens} tokens don't fit the backbone's {config.max_positions} positions",
      fix=f"The largest length that fits is {longest}" if longest > 0 else "Use a shorter prompt",
    )


def init_prompt(
  key: jax.Array,
  spec: PromptSpec,
  config: EncoderConfig,
  backbone_params: Params | None = None,
  word_ids: np.ndarray | None = None,
) -> Params:
  """Fresh raw parameters: tables and dense kernels N(0, 0.02), biases 0, LSTMs initialised as in torch.

  Args:
    key: typed PRNG key.
    backbone_params, word_ids: for spec.init 'words' only. The backbone reads these P token ids as one sequence; its
      keys and values of them (shallow: their embeddings) are the initial values.

  Raises:
    InputError: a prompt that this encoder does not support, or word_ids that are not P valid ids.
  """
  if spec.kind == "none":
    return {}
  if spec.kind == "shallow" and config.family == "deberta":
    raise InputError("DeBERTa supports deep prompts only", fix="Set prompt.kind to 'deep'")
  if spec.init == "words":
    return _from_words(spec, config, backbone_params, word_ids)
  keys = iter(jax.random.split(key, 32))
  width = 2 * config.num_layers * config.hidden_size if spec.kind == "deep" else config.hidden_size

  def dense(inputs: int, outputs: int) -> Params:
    return {"kernel": normal(inputs, outputs), "bias": jnp.zeros((outputs,), jnp.float32)}

  def normal(*shape: int) -> jax.Array:
    return _INIT_SCALE * jax.random.normal(next(keys), shape, jnp.float32)

  if spec.projection == "none":
    return {"table": normal(spec.length, width)}
  params: Params = {"table": normal(spec.length, config.hidden_size)}
  inputs, hidden = config.hidden_size, spec.projection_size
  if spec.projection == "lstm":
    params["lstm"] = _init_lstm(keys, inputs, hidden)
    inputs, hidden = 2 * hidden, config.hidden_size
  return params | {"hidden": dense(inputs, hidden), "output": dense(hidden, width)}


def _init_lstm(keys, inputs: int, hidden: int) -> Params:
  """Initialises as torch.nn.LSTM does: everything U(−1/√m, 1/√m) for a hidden size of m."""
  params: Params = {}
  for layer in range(_LSTM_LAYERS):
    shapes = {
      "input_kernel": (inputs if layer == 0 else 2 * hidden, 4 * hidden),
      "hidden_kernel": (hidden, 4 * hidden),
      "input_bias": (4 * hidden,),
      "hidden_bias": (4 * hidden,),
    }
    for direction in _DIRECTIONS:
      params[f"{direction}_{layer}"] = {
        name: jax.random.uniform(next(keys), shape, jnp.float32, -(hidden**-0.5), hidden**-0.5)
        for name, shape in shapes.items()
      }
  return params


def _from_words(spec, config, backbone_params, word_ids) -> Params:
  ids = np.asarray(() if word_ids is None else word_ids)
  if backbone_params is None or ids.shape != (spec.length,) or ids.min() < 0 or ids.max() >= config.vocab_size:
    raise InputError(f"prompt init 'words' needs the backbone and {spec.length} token ids below {config.vocab_size}")
  if spec.kind == "shallow":
    return {"table": jnp.asarray(backbone_params["embeddings"]["word"])[ids].astype(jnp.float32)}
  check_words(spec, config)
  keys, values = _keys_and_values(config, backbone_params, ids)  # [L, P, N, D]
  table = jnp.stack([keys, values], axis=1)  # [L, 2, P, N, D]
  return {"table": jnp.moveaxis(table, 2, 0).reshape(spec.length, -1).astype(jnp.float32)}


def check_words(spec: PromptSpec, config: EncoderConfig) -> None:
  """Raises InputError if init 'words' needs more words than the backbone can read as one sequence."""
  longest = longest_input(config, PromptSpec(kind="none"))
  if spec.init == "words" and spec.kind == "deep" and longest and spec.length > longest:
    raise InputError(
      f"prompt init 'words' reads as many words as the prompt is long, and the backbone can read {longest}",
      value=spec.length, fix="Lower prompt.length, or set prompt.init to normal",
    )  # fmt: skip


def _keys_and_values(config: EncoderConfig, params: Params, token_ids: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """Keys and values [L, P, N, D] of all layers for one sequence of P token ids, without a prompt."""
  tokens = jnp.asarray(token_ids, jnp.int32)[None]
  lengths = jnp.asarray([tokens.shape[1]], jnp.int32)
  run = jax.jit(functools.partial(Encoder(config).apply, mutable=["intermediates"]))
  _, state = run({"params": params}, tokens, lengths)
  parts = []
  for name in ("keys", "values"):
    part = state["intermediates"]["last_layer"][name][0]  # [1, P, N, D]
    if config.num_layers > 1:
      part = jnp.concatenate([state["intermediates"]["layers"][name][0][:, 0], part])
    parts.append(part)
  return parts[0], parts[1]


def expand_prompt(spec: PromptSpec, params: Params | None, config: EncoderConfig):
  """What the encoder reads, float32: for deep (keys, values) [L, P, N, D] each, for shallow [P, H], for 'none' None."""
  if spec.kind == "none":
    return None
  x = jnp.asarray(params["table"], jnp.float32)
  if spec.projection == "lstm":
    x = _bidirectional_lstm(params["lstm"], x)
  if spec.projection != "none":
    activation = jnp.tanh if spec.kind == "deep" else jax.nn.relu
    x = _dense(params["output"], activation(_dense(params["hidden"], x)))
  if spec.kind == "shallow":
    return x
  x = x.reshape(spec.length, config.num_layers, 2, config.num_heads, config.head_size)
  return jnp.moveaxis(x[:, :, 0], 1, 0), jnp.moveaxis(x[:, :, 1], 1, 0)


def _dense(params: Params, x: jax.Array) -> jax.Array:
  return _matmul(x, params["kernel"]) + params["bias"]


# Always in float32: prompts are, and this is little work.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _bidirectional_lstm(params: Params, x: jax.Array) -> jax.Array:
  """torch.nn.LSTM (bidirectional, two layers) over one sequence [P, in] → [P, 2m]; gates in order i, f, g, o."""
  for layer in range(_LSTM_LAYERS):
    outputs = []
    for direction in _DIRECTIONS:
      weights = params[f"{direction}_{layer}"]
      gates = _matmul(x, weights["input_kernel"]) + weights["input_bias"] + weights["hidden_bias"]

      def step(carry, gate, weights=weights):
        hidden, cell = carry
        i, f, g, o = jnp.split(gate + _matmul(hidden, weights["hidden_kernel"]), 4)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (hidden, cell), hidden

      zeros = jnp.zeros(weights["hidden_kernel"].shape[:1], x.dtype)
      outputs.append(jax.lax.scan(step, (zeros, zeros), gates, reverse=direction == "backward")[1])
    x = jnp.concatenate(outputs, axis=-1)
  return x


def flatten(params: Params) -> dict[str, np.ndarray]:
  """A tree of arrays as one dict of float32 arrays, names joined by '/', for prompts.safetensors."""
  # Contiguous, because safetensors writes the bytes of a transposed view in the wrong order.
  return {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in named_leaves(params).items()}


def named_leaves(tree: Params) -> dict[str, Any]:
  """The leaves of nested dicts by name, joined by '/'."""
  return {"/".join(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: Mapping[str, np.ndarray]) -> Params:
  """The inverse of `named_leaves`."""
  params: Params = {}
  for name, array in flat.items():
    *parents, leaf = name.split("/")
    branch = params
    for parent in parents:
      branch = branch.setdefault(parent, {})
    branch[leaf] = array
  return params


def check_prompt(spec: PromptSpec, params: Params, config: EncoderConfig, source: Any = None) -> None:
  """Raises InputError (naming `source`) if `params` do not have the shapes for `spec` on this encoder."""
  check_shapes(lambda key: init_prompt(key, as_read(spec), config), params, source)


def check_shapes(init: Callable[[jax.Array], Params], params: Params, source: Any = None) -> None:
  """Raises InputError (naming `source`) if `params` do not have the names and shapes of what init(key) returns."""
  trees = jax.eval_shape(lambda: init(jax.random.key(0))), params
  expected, given = ({name: leaf.shape for name, leaf in named_leaves(tree).items()} for tree in trees)
  for name in sorted(expected.keys() | given.keys()):
    if expected.get(name) != given.get(name):
      raise InputError(
        f"prompt tensor {name} has shape {given.get(name)}, expected {expected.get(name)}",
        path=source, fix="The prompt belongs to another backbone or to other prompt settings",
      )  # fmt: skip


def check_original(config: Mapping[str, Any], source: Any = None) -> str:
  """The kind of prompt in a checkpoint of the original, according to its config.json.

  Raises:
    InputError: there is none; names `source`.
  """
  kind = "deep" if config.get("prefix") else "shallow" if config.get("prompt") else None
  if kind is None:
    fix = "A checkpoint of the original has 'prefix' or 'prompt' in config.json"
    raise InputError("this checkpoint carries no prompt", path=source, fix=fix)
  return kind


def from_original(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> tuple[PromptSpec, Params]:
  """The prompt of a checkpoint that the original DPTDR saved.

  Args:
    tensors: by name; those that start with 'prefix_encoder.' are read.
    config: the fields of its config.json: prefix, prompt, pre_seq_len, prefix_projection, prompt_encoder_type.

  Raises:
    InputError: it has no prompt, or prompt tensors that config.json does not describe.
  """
  prefix = "prefix_encoder."
  named = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
  left = {name: np.asarray(array, np.float32) for name, array in named.items()}
  kind = check_original(config)
  if not left:
    raise InputError("this checkpoint carries no prompt: none of its tensors is a prompt's")
  try:
    if kind == "deep":
      projection = "mlp" if config.get("prefix_projection") else "none"
      params = {"table": left.pop("embedding.weight")}
      if projection == "mlp":
        params |= {"hidden": _pop_dense(left, "trans.0"), "output": _pop_dense(left, "trans.2")}
    else:
      projection = config.get("prompt_encoder_type") or "none"
      params = {"table": left.pop("0.weight")}
      stem = {"none": "", "mlp": "1.", "lstm": "1.mlp_head."}[projection]
      if projection == "lstm":
        params["lstm"] = _pop_lstm(left)
      if projection != "none":
        params |= {"hidden": _pop_dense(left, f"{stem}0"), "output": _pop_dense(left, f"{stem}2")}
  except KeyError as error:
    raise InputError(f"the prompt's tensor or kind {error} is missing or unknown") from error
  if left:
    raise InputError("prompt tensors that config.json does not describe", value=sorted(left))
  if projection == "lstm":
    size = params["lstm"]["forward_0"]["hidden_kernel"].shape[0]
  else:
    size = 0 if projection == "none" else params["hidden"]["bias"].shape[0]
  length = len(params["table"])
  shift = length if kind == "deep" else 0
  rate = config.get("hidden_dropout_prob", 0.1)
  return PromptSpec(kind, length, projection, size, shift, dropout=rate), params


def _pop_dense(tensors: dict[str, np.ndarray], name: str) -> Params:
  return {"kernel": tensors.pop(f"{name}.weight").T, "bias": tensors.pop(f"{name}.bias")}


def _pop_lstm(tensors: dict[str, np.ndarray]) -> Params:
  params: Params = {}
  for layer in range(_LSTM_LAYERS):
    for direction, suffix in zip(_DIRECTIONS, ("", "_reverse"), strict=True):
      stem = "1.lstm_head."
      params[f"{direction}_{layer}"] = {
        "input_kernel": tensors.pop(f"{stem}weight_ih_l{layer}{suffix}").T,
        "hidden_kernel": tensors.pop(f"{stem}weight_hh_l{layer}{suffix}").T,
        "input_bias": tensors.pop(f"{stem}bias_ih_l{layer}{suffix}"),
        "hidden_bias": tensors.pop(f"{stem}bias_hh_l{layer}{suffix}"),
      }
  return params
