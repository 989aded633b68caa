"""Matrix products in the compute dtype, in both directions."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


def precision(dtype: Any) -> jax.lax.Precision | None:
  """Of products in `dtype`: float32 is meant where it is asked for, which accelerators would multiply in fewer bits."""
  return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


# A custom rule, because autodiff's products of the backward pass would be of the float32 gradient and a 16-bit operand:
# XLA widens the latter, and a GPU's or a TPU's fast units stand idle.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
  """einsum of two arrays of one dtype, summed up and returned in float32; its gradient is multiplied in their dtype."""
  return jnp.einsum(equation, left, right, precision=precision(left.dtype), preferred_element_type=jnp.float32)


def _forward(equation, left, right):
  return product(equation, left, right), (left, right)


def _backward(equation, operands, gradient):
  narrow = functools.partial(jnp.einsum, equation, precision=precision(operands[0].dtype))
  return jax.vjp(narrow, *operands)[1](gradient.astype(operands[0].dtype))


product.defvjp(_forward, _backward)
