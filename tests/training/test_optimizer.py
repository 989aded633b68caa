"""Learning rates by hand, clipping, and which parameters shrink."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.training.optimizer import decay_mask, make_optimizer, make_schedule


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({"warmup": 2, "decay": "linear"}, [0.5, 1, 1, 0.75, 0.5, 0.25, 0]),
    ({"warmup": 1 / 3, "decay": "linear"}, [0.5, 1, 1, 0.75, 0.5, 0.25, 0]),
    ({"warmup": 2, "decay": "cosine"}, [0.5, 1, 1, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2, 0]),
    ({"warmup": 4, "decay": "constant"}, [0.25, 0.5, 0.75, 1, 1, 1, 1]),
    ({"warmup": 0, "decay": "linear"}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
  ],
)
def test_schedule_by_hand(options, expected):
  schedule = make_schedule(7e-3, 6, **options)
  np.testing.assert_allclose([schedule(step) for step in range(7)], 7e-3 * np.array(expected), atol=1e-9)


@pytest.mark.parametrize("options", [{"warmup": 7}, {"warmup": -1}, {"decay": "exponential"}])
def test_schedules_that_cannot_be(options):
  with pytest.raises(InputError):
    make_schedule(1.0, 6, **options)


def params():
  return {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}


def test_decay_falls_on_kernels_alone():
  optimizer = make_optimizer(lambda _: 0.5, weight_decay=0.1)
  zero = jax.tree.map(jnp.zeros_like, params())
  update, _ = optimizer.transform.update(zero, optimizer.transform.init(params()), params())
  np.testing.assert_allclose(update["dense"]["kernel"], -0.05 * np.ones((2, 2)), rtol=1e-6)
  assert not update["dense"]["bias"].any() and not update["norm"]["scale"].any()


@pytest.mark.parametrize("names", [{"bias": 1.0}, {"kernel": 1.0, "mystery": 1.0}])
def test_masks_that_miss(names):
  with pytest.raises(InputError, match="weight decay"):
    decay_mask({"layer": names})


def test_gradient_is_clipped_as_a_whole():
  """Adam's first step is blind to the scale, so the second moment tells: (1 − b2) · g² with |g| = clip."""
  optimizer = make_optimizer(lambda _: 1.0, clip=1.0)
  gradient = jax.tree.map(lambda x: 100 * x, params())
  _, state = optimizer.transform.update(gradient, optimizer.transform.init(params()), params())
  moments = next(part.nu for part in state if hasattr(part, "nu"))
  np.testing.assert_allclose(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(moments)), 1e-3, rtol=1e-5)
