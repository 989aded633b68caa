"""The gradient cache (Gao et al. 2021, arXiv 2101.06983): for batches that do not fit the devices at once.

First pass: all vectors, chunk by chunk, without a gradient. Then the loss over the global batch, and its gradient with
respect to the vectors. Second pass: the chunks again, with a gradient. Every random mask is keyed by the row in the
global batch, so both passes draw the same masks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dptdr_jax.training.chunks import ROWS, WHOLE, on_data, share_inner, split, sum_chunks

_INPUTS = (WHOLE, WHOLE, ROWS)  # trainable, frozen, rows
Pullback = Callable[[dict[str, jax.Array]], tuple[dict[str, jax.Array], Any]]


@dataclasses.dataclass(frozen=True)
class GradientCache:
  """The two passes over the rows of a batch. Along 'data' only the vectors and the gradient cross devices, once each.

  Attributes:
    outputs: (trainable, frozen, rows) → {'vectors': [n, H]} and what else has a loss of its own, by row.
    mesh: of the devices that share the rows.
    chunks: on each device; with 1 there is one pass, and nothing is computed twice.
    vectors: the same arguments → vectors [n, H] alone, for the first pass; None: those of `outputs`.
  """

  outputs: Callable[[Any, Any, Any], dict[str, jax.Array]]
  mesh: Mesh
  chunks: int
  vectors: Callable[[Any, Any, Any], jax.Array] | None = None

  def encode(self, trainable: Any, frozen: Any, rows: Any) -> tuple[jax.Array, Pullback]:
    """Vectors [n, H] of all rows, and a function: cotangents of the outputs → (outputs, gradient of `trainable`)."""
    if self.chunks == 1:
      # A replicated argument's cotangent is summed over the devices where shard_map is entered.
      run = on_data(lambda trained, frozen, rows: self.outputs(trained, frozen, share_inner(rows)),
                    self.mesh, _INPUTS, ROWS)  # fmt: skip
      outputs, pullback = jax.vjp(lambda trained: run(trained, frozen, rows), trainable)
      return outputs["vectors"], lambda cotangents: (outputs, pullback(cotangents)[0])

    def forward(trained, frozen, rows):
      def of_chunk(chunk):
        arguments = trained, frozen, share_inner(chunk)
        return self.vectors(*arguments) if self.vectors else self.outputs(*arguments)["vectors"]

      vectors = jax.lax.map(of_chunk, split(rows, self.chunks))
      return vectors.reshape(-1, vectors.shape[-1])

    vectors = on_data(forward, self.mesh, _INPUTS, ROWS)(trainable, frozen, rows)
    return vectors, functools.partial(self.backward, trainable, frozen, rows)

  def backward(self, trainable: Any, frozen: Any, rows: Any, cotangents: Any) -> tuple[dict[str, jax.Array], Any]:
    """The second pass: cotangents of the outputs → (outputs, gradient of `trainable`)."""

    def on_device(trained, frozen, rows, cotangents):
      def of_chunk(chunk):
        rows, cotangents = chunk
        outputs, pullback = jax.vjp(lambda trained: self.outputs(trained, frozen, rows), trained)
        return pullback(cotangents)[0], outputs

      zero = jax.tree.map(jnp.zeros_like, trained)
      gradient, outputs = sum_chunks(of_chunk, zero, (rows, cotangents), self.chunks, self.mesh)
      return outputs, gradient

    run = on_data(on_device, self.mesh, (*_INPUTS, ROWS), (ROWS, WHOLE))
    return run(trainable, frozen, rows, cotangents)
