"""Matrix products in the compute dtype, in both directions."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


def precision(dtype: Any) -> jax.lax.Precision | None:
  """The precision of products in `dtype`: full float32, which accelerators would otherwise multiply in fewer bits."""
  return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


# A custom rule, because autodiff would multiply the float32 gradient by a 16-bit operand in the backward pass. XLA then
# converts the operand to float32 and cannot use the fast units of a GPU or a TPU.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
  """einsum of two arrays of one dtype, summed and returned in float32. The gradient is multiplied in their dtype."""
  return jnp.einsum(equation, left, right, precision=precision(left.dtype), preferred_element_type=jnp.float32)


def _forward(equation, left, right):
  return product(equation, left, right), (left, right)


def _backward(equation, operands, gradient):
  narrow = functools.partial(jnp.einsum, equation, precision=precision(operands[0].dtype))
  return jax.vjp(narrow, *operands)[1](gradient.astype(operands[0].dtype))


product.defvjp(_forward, _backward)
