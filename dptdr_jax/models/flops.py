"""Floating-point operations of encoding and training, counted by hand: matrix products only, 2 for a multiply-add.

With W weights in the dense products, a token costs 2·W in the forward pass. The backward pass costs 2·W through frozen
weights (gradients of the inputs) and 4·W through trained ones (gradients of the weights too): 4·W against 6·W a token
and step. Attention adds 4·S·H a row forward (scores, sums) and twice that backward in both cases. Not counted:
element-wise work, embeddings, prompt projections and DeBERTa's position scores. Legend as in encoder.py.
"""

from __future__ import annotations

from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.prompts import PromptSpec


def encode_flops(config: EncoderConfig, spec: PromptSpec, batch: int, tokens: int, pooling: str) -> int:
  """Operations of one forward pass over `batch` sequences padded to `tokens`; pooling 'first' or 'mean'."""
  dense, attention = _products(config, spec, tokens, pooling)
  return batch * (dense + attention)


def prompt_step_flops(config: EncoderConfig, spec: PromptSpec, batch: int, tokens: int, pooling: str) -> int:
  """Operations of the forward pass and the backward pass to the prompt alone, without gradient cache."""
  dense, attention = _products(config, spec, tokens, pooling)
  return batch * (2 * dense + 3 * attention)


def finetune_step_flops(config: EncoderConfig, spec: PromptSpec, batch: int, tokens: int, pooling: str) -> int:
  """Operations of the forward pass and the backward pass to all weights, without gradient cache."""
  dense, attention = _products(config, spec, tokens, pooling)
  return batch * (3 * dense + 3 * attention)


def _products(config: EncoderConfig, spec: PromptSpec, tokens: int, pooling: str) -> tuple[int, int]:
  """Forward operations of one sequence in dense products and in attention's."""
  rows = tokens + (spec.length if spec.kind == "shallow" else 0)
  keys = tokens + spec.length
  width, wide = config.hidden_size, config.intermediate_size
  dense = attention = 0
  for layer in range(config.num_layers):
    one_row = pooling == "first" and layer == config.num_layers - 1
    queries = 1 if one_row else rows
    dense += 2 * (rows * 2 * width**2 + queries * (2 * width**2 + 2 * width * wide))  # keys, values; the rest
    attention += 4 * queries * keys * width
  return dense, attention
