"""Matrix products: the dtypes of operands and results in the forward and backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dptdr_jax.models import dropout
from dptdr_jax.models.products import product


def operands(dtype):
  keys = jax.random.split(jax.random.key(0), 2)
  return tuple(jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, ((3, 4), (5, 4)), strict=True))


def loss(left, right):
  return jnp.sum(jnp.sin(product("id,jd->ij", left, right)))


def test_float32_product_and_gradient_equal_einsum():
  plain = jax.grad(lambda left, right: jnp.sum(jnp.sin(jnp.einsum("id,jd->ij", left, right))), (0, 1))
  for mine, theirs in zip(jax.grad(loss, (0, 1))(*operands("float32")), plain(*operands("float32")), strict=True):
    np.testing.assert_array_equal(mine, theirs)


def test_bfloat16_products_have_bfloat16_operands_and_float32_sums():
  given = operands("bfloat16")
  assert product("id,jd->ij", *given).dtype == jnp.float32
  traced = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*given)
  kinds = [tuple(v.aval.dtype.name for v in one.invars) for one in equations(traced.jaxpr)]
  assert len(kinds) >= 3 and set(kinds) == {("bfloat16", "bfloat16")}, kinds
  exact = jax.grad(loss, (0, 1))(*(one.astype(jnp.float32) for one in given))
  for mine, theirs in zip(jax.grad(loss, (0, 1))(*given), exact, strict=True):
    np.testing.assert_allclose(mine.astype(jnp.float32), theirs, rtol=0.03, atol=0.03)


def equations(jaxpr):
  """All products of a traced function, with those in nested jaxprs."""
  for one in jaxpr.eqns:
    if one.primitive.name == "dot_general":
      yield one
    for inner in jax.core.jaxprs_in_params(one.params):
      yield from equations(inner)


def test_bfloat16_dropout_keeps_the_mean():
  x = jax.random.uniform(jax.random.key(1), (1, 400_000), minval=1.0, maxval=2.0).astype(jnp.bfloat16)
  out = dropout.dropout(x, jnp.array([[3, 5]], jnp.uint32), 0.1).astype(jnp.float32)
  kept = out > 0
  scale = float(out[kept].mean() / x.astype(jnp.float32)[kept].mean())
  assert abs(scale * 0.9 - 1) < 3e-4, "a factor rounded to bfloat16 is off by 1.6e-3"
