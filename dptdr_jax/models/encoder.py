"""The encoder in Linen: embeddings, L − 1 scanned layers, and a last layer that can compute a single row.

Parameters: {'embeddings': {...}, 'layers': each array with a leading axis L − 1, 'last_layer': the same without that
axis, and for DeBERTa 'relative_positions'}.
Legend: B examples, T tokens, P prompt length, L layers, N heads, D head size, H = N·D.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dptdr_jax.models import attention, deberta
from dptdr_jax.models import dropout as drop
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.products import precision

Array = jax.Array
REMAT = ("none", "attention", "layer")


def _gelu(x: Array) -> Array:
  # jax.nn.gelu's exact form uses erfc, which is slower than erf on CPU and no closer to BERT's.
  return 0.5 * x * (1 + jax.lax.erf(x * 2**-0.5))


ACTIVATION = {"gelu": _gelu, "gelu_new": lambda x: jax.nn.gelu(x, approximate=True), "relu": jax.nn.relu}


def _pin_rows(x: Array) -> Array:
  """Shards rows [B, …] and their gradient along the mesh's axis 'fsdp', if there is one.

  If weights are split along it, the compiler would otherwise split the width in the backward pass and gather the rows,
  which are far larger than a layer's weights.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.shape.get("fsdp", 1) == 1:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("fsdp")))


class LayerNorm(nn.Module):
  """Layer normalisation, computed in float32 for every input dtype. The backward pass stores only its input."""

  epsilon: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],), jnp.float32)

    def normalise(x, scale, bias):
      wide = x.astype(jnp.float32)
      centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
      spread = jnp.mean(centred * centred, axis=-1, keepdims=True)
      out = centred * jax.lax.rsqrt(spread + self.epsilon) * scale.astype(jnp.float32) + bias.astype(jnp.float32)
      return out.astype(x.dtype)

    return jax.checkpoint(normalise, prevent_cse=False)(x, scale, bias)


class Embeddings(nn.Module):
  """Word, position and token-type vectors, LayerNorm, dropout."""

  config: EncoderConfig
  dtype: Any

  def setup(self):
    config = self.config
    init = nn.initializers.normal(config.initializer_range)
    self.word = self.param("word", init, (config.vocab_size, config.hidden_size))
    if config.has_positions:
      self.position = self.param("position", init, (config.max_positions, config.hidden_size))
    if config.type_vocab_size:
      self.token_type = self.param("token_type", init, (config.type_vocab_size, config.hidden_size))
    self.norm = LayerNorm(config.layer_norm_eps)

  def __call__(self, tokens: Array, first_position: Array | int, noise: drop.Noise | None) -> Array:
    """Token ids [B, T] → [B, T, H]. Positions count from `first_position`: one for all rows, or [B] one for each."""
    return self.from_vectors(jnp.asarray(self.word)[tokens], first_position, noise, drop.EMBEDDING)

  def from_vectors(self, x: Array, first_position: Array | int, noise: drop.Noise | None, site: int) -> Array:
    """Vectors [B, T, H] in place of word embeddings (transformers' inputs_embeds) → [B, T, H]."""
    x = x.astype(jnp.float32)
    if self.config.has_positions:
      # Rows beyond the table are padding, because `check_lengths` refused longer texts: any vector will do.
      places = jnp.asarray(first_position)[..., None] + jnp.arange(x.shape[1])
      rows = jnp.minimum(places, self.config.max_positions - 1)
      x += jnp.asarray(self.position)[rows].astype(jnp.float32)
    if self.config.type_vocab_size:
      x += self.token_type[0].astype(jnp.float32)
    x = self.norm(x).astype(self.dtype)
    return x if noise is None else drop.dropout(x, noise.at(0, site), noise.rates.hidden)


class Layer(nn.Module):
  """Self-attention and feed-forward, each followed by dropout, the residual and LayerNorm.

  Attributes:
    row: compute only this row of the output, from the keys and values of all rows. None: compute all rows.
    keep_probabilities: see `attention.attend`.
  """

  config: EncoderConfig
  dtype: Any
  method: str
  row: int | None = None
  keep_probabilities: bool = True

  @nn.compact
  def __call__(
    self,
    x: Array,  # [B, T, H]
    layer: Array | int,
    prompt: attention.Prompt | attention.RowPrompts | None,
    lengths: Array,  # [B]
    noise: drop.Noise | None,
    relative_positions: Array | None,  # [2k, H]
  ) -> tuple[Array, None]:
    x = _pin_rows(x)
    rows = x if self.row is None else x[:, self.row : self.row + 1]
    mixed = _pin_rows(self._attention(rows, x, layer, prompt, lengths, noise, relative_positions))
    x = rows + self._dropout(self._dense("attention_output")(mixed), noise, layer, drop.ATTENTION_OUTPUT)
    x = _pin_rows(LayerNorm(self.config.layer_norm_eps, name="attention_norm")(x))
    # With jax.checkpoint the activation stores only its input.
    activation = jax.checkpoint(ACTIVATION[self.config.activation], prevent_cse=False)
    wide = _pin_rows(activation(self._dense("intermediate", self.config.intermediate_size)(x)))
    x = x + self._dropout(self._dense("output")(wide), noise, layer, drop.FEED_FORWARD)
    return LayerNorm(self.config.layer_norm_eps, name="output_norm")(x), None

  def _attention(self, rows, x, layer, prompt, lengths, noise, relative_positions):
    config = self.config
    heads = (config.num_heads, config.head_size)
    query = self._dense("query")(rows).reshape(*rows.shape[:2], *heads)
    # DeBERTa's keys have no bias.
    key = self._dense("key", use_bias=config.family != "deberta")(x).reshape(*x.shape[:2], *heads)
    value = self._dense("value")(x).reshape(*x.shape[:2], *heads)
    self.sow("intermediates", "keys", key)  # prompts can be initialised with the backbone's own keys and values
    self.sow("intermediates", "values", value)
    first_row = self.row or 0
    scale, bias = config.head_size**-0.5, None
    if config.family == "deberta":
      scale = deberta.score_scale(config)
      bias = self._relative_bias(query, key, relative_positions, first_row)
    mixed = attention.attend(
      query, key, value, lengths, scale=scale, prompt=prompt, bias=bias,
      noise=noise, layer=layer, first_row=first_row, method=self.method, keep_probabilities=self.keep_probabilities,
    )  # fmt: skip
    return mixed.reshape(*rows.shape[:2], config.hidden_size)

  def _relative_bias(self, query, key, relative_positions, first_row):
    config = self.config
    if not {"c2p", "p2c"} & set(config.pos_att_type):
      return None
    window, index = deberta.relative_rows(config, query.shape[1], key.shape[1], first_row)
    table = relative_positions[window].astype(self.dtype)
    projected = {}
    for name, kind, use_bias in (("position_key", "c2p", False), ("position_query", "p2c", True)):
      if kind in config.pos_att_type:
        projected[name] = self._dense(name, use_bias=use_bias)(table).reshape(-1, config.num_heads, config.head_size)
    return deberta.relative_bias(
      config, query, key, projected.get("position_key"), projected.get("position_query"), index
    )

  def _dense(self, name: str, features: int | None = None, use_bias: bool = True) -> nn.Dense:
    init = nn.initializers.normal(self.config.initializer_range)
    options = {"dtype": self.dtype, "precision": precision(self.dtype), "kernel_init": init, "name": name}
    return nn.Dense(features or self.config.hidden_size, use_bias, **options)

  def _dropout(self, x, noise, layer, site):
    if noise is None:
      return x
    offset = (self.row or 0) * x.shape[-1]
    return drop.dropout(x, noise.at(layer, site), noise.rates.hidden, offset=offset)


class Encoder(nn.Module):
  """Token ids to the last layer's vectors.

  Attributes:
    dtype: of matrix products and of the activations between them.
    method: of attention, see `attention.choose_method`.
    row: compute only this row of the result. None: all rows.
    position_shift: added to every position (P for deep prompts of the original).
    remat: what the backward pass recomputes instead of storing: 'none' (almost nothing), 'attention' (the
      probabilities), 'layer' (everything but the layers' inputs, which costs one more forward pass).
  """

  config: EncoderConfig
  dtype: Any = jnp.float32
  method: str = "auto"
  row: int | None = None
  position_shift: int = 0
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    tokens: Array,
    lengths: Array,
    deep: attention.Prompt | None = None,
    shallow: Array | None = None,
    noise: drop.Noise | None = None,
  ) -> Array:
    """Encodes a batch.

    Args:
      tokens: [B, T] int32, padded on the right; lengths: [B] int32.
      deep: keys and values [L, P, N, D], put before the tokens' keys and values in every layer.
      shallow: vectors [P, H], put before the tokens' embeddings.

    Returns:
      [B, T, H] in `dtype`. With a shallow prompt [B, P + T, H], the prompt's rows first. With `row` only that row,
      [B, 1, H].
    """
    config, keep = self.config, self.remat == "none"
    embeddings = Embeddings(config, self.dtype, name="embeddings")
    x = embeddings(tokens, config.first_position + self.position_shift, noise)
    if shallow is not None:
      front = jnp.broadcast_to(shallow.astype(x.dtype), (x.shape[0], *shallow.shape))
      x = jnp.concatenate([front, x], axis=1)
      x = embeddings.from_vectors(x, config.first_position, noise, drop.EMBEDDING_AGAIN)
      lengths = lengths + shallow.shape[0]
    relative = None
    if config.pos_att_type:
      init = nn.initializers.normal(config.initializer_range)
      relative = self.param("relative_positions", init, (2 * config.max_relative_positions, config.hidden_size))

    last = config.num_layers - 1
    if last:
      scanned = nn.scan(
        nn.remat(Layer, prevent_cse=False) if self.remat == "layer" else Layer,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
        length=last,
        check_constancy_invariants=False,  # no variable is shared by the layers, and the check traces a second time
      )
      lower = None if deep is None else (deep[0][:-1], deep[1][:-1])
      layers = scanned(config, self.dtype, self.method, keep_probabilities=keep, name="layers")
      x, _ = layers(x, jnp.arange(last), lower, lengths, noise, relative)
    upper = None if deep is None else (deep[0][-1], deep[1][-1])
    layer = Layer(config, self.dtype, self.method, self.row, keep, name="last_layer")
    return layer(x, last, upper, lengths, noise, relative)[0]
