"""DeBERTa v1's disentangled attention: scores of relative positions are added to scores of content.

He et al., 2021 (arXiv 2006.03654), equations 4 and 5, with the details of transformers' DebertaModel: relative
positions are clipped to ±k (k = max_relative_positions), the table has 2k rows, and all scores are scaled by
1/√(D (1 + number of types)). Like transformers, this counts 'p2p' in the scale but adds no score for it. There is no
dropout on the table: all examples share it, and every mask here belongs to one example.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.products import product


def score_scale(config: EncoderConfig) -> float:
  """The factor on all scores."""
  return (config.head_size * (1 + len(config.pos_att_type))) ** -0.5


def relative_rows(config: EncoderConfig, rows: int, tokens: int, first_row: int) -> tuple[slice, jax.Array]:
  """The rows of the relative table that a sequence needs, and the index into them for each pair of tokens.

  Args:
    rows: R query rows; the first one is row `first_row` of the sequence.
    tokens: T keys.

  Returns:
    A slice of 2·min(T, k) of the table's 2k rows, and indices into it [R, T]: row − column + min(T, k), clipped.
  """
  span = min(tokens, config.max_relative_positions)
  distance = first_row + jnp.arange(rows)[:, None] - jnp.arange(tokens)[None, :]
  window = slice(config.max_relative_positions - span, config.max_relative_positions + span)
  return window, jnp.clip(distance + span, 0, 2 * span - 1)


def relative_bias(
  config: EncoderConfig,
  query: jax.Array,
  key: jax.Array,
  position_keys: jax.Array | None,
  position_queries: jax.Array | None,
  index: jax.Array,
) -> jax.Array:
  """Sum of the content-to-position and position-to-content scores, scaled.

  Args:
    query: [B, R, N, D]. key: [B, T, N, D].
    position_keys, position_queries: [W, N, D], the projected slice of the relative table; None if not configured.
    index: [R, T] into that slice.

  Returns:
    [N, B, R, T] float32.
  """
  total = jnp.zeros((), jnp.float32)
  if "c2p" in config.pos_att_type:
    scores = product("brnd,wnd->nbrw", query, position_keys)
    total += jnp.take_along_axis(scores, index[None, None], axis=-1)
  if "p2c" in config.pos_att_type:
    scores = product("btnd,wnd->nbwt", key, position_queries)
    total += jnp.take_along_axis(scores, index[None, None], axis=-2)
  return total * score_scale(config)
