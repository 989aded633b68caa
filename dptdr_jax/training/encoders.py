"""The bi-encoder: two sides on one backbone, and everything that their vectors depend on besides parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dptdr_jax.core.errors import InputError
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.dropout import Dropout
from dptdr_jax.models.prompts import PromptSpec, init_prompt
from dptdr_jax.models.represent import represent

SIDES = ("query", "passage")


@dataclasses.dataclass(frozen=True)
class BiEncoder:
  """How token ids become vectors. Both sides share everything but the prompt.

  Attributes:
    encoder: the backbone's shape.
    prompt: 'none' trains all weights.
    pooling, normalize, compute_dtype, dropout, remat: see `models.represent.represent`.
  """

  encoder: EncoderConfig
  prompt: PromptSpec
  pooling: str = "first"
  normalize: bool = False
  compute_dtype: Any = jnp.float32
  dropout: Dropout | None = None
  remat: str = "none"

  def encode(
    self,
    side: str,
    trainable: dict[str, Any],
    backbone: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    keys: jax.Array | None = None,
  ) -> jax.Array:
    """Encodes texts of one side.

    Args:
      side: 'query' or 'passage'.
      trainable: as in `TrainState`.
      backbone: the frozen weights; not read where `trainable` has its own.
      tokens: [B, T] int32. lengths: [B] int32.
      keys: [B], one per example: with them dropout is on.

    Returns:
      [B, H] float32.
    """
    prompt = trainable.get("prompt", trainable.get(side))
    return represent(
      self.encoder, self.prompt, trainable.get("backbone", backbone), prompt, tokens, lengths,
      pooling=self.pooling, normalize=self.normalize, keys=keys, dropout=self.dropout,
      compute_dtype=self.compute_dtype, remat=self.remat,
    )  # fmt: skip

  def init_trainable(
    self, key: jax.Array, backbone: Any = None, *, tied: bool = True, word_ids: np.ndarray | None = None
  ) -> dict[str, Any]:
    """Fresh parameters to train, float32: prompts, or a copy of the backbone for prompt kind 'none'.

    Args:
      key: typed PRNG key.
      backbone: needed if its weights are trained or prompts start from words.
      tied: one prompt for both sides; False: one each.
      word_ids: see `models.prompts.init_prompt`.
    """
    if self.prompt.kind == "none":
      if not tied:
        raise InputError(
          "only prompts can be untied: all weights are trained for both sides", fix="Set prompt.tied=True"
        )
      return {"backbone": jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), backbone)}
    names = ("prompt",) if tied else SIDES
    keys = jax.random.split(key, len(names))
    return {
      name: init_prompt(key, self.prompt, self.encoder, backbone, word_ids)
      for name, key in zip(names, keys, strict=True)
    }
