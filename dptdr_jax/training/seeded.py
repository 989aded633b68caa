"""Jitted steps that take their seed as an argument, so that what was compiled for one seed runs with every other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class SeededStep:
  """A step (…) → (state, metrics), of a jitted one that takes the seed (uint32) before everything else.

  A compiled step is called with the seed, too: `compiled(step.seed, …)`.
  """

  def __init__(self, jitted: Callable, seed: int):
    self.jitted, self.seed = jitted, np.uint32(seed % 2**32)  # what jax.random.key takes of an integer

  def __call__(self, *arguments: Any) -> Any:
    return self.jitted(self.seed, *arguments)

  def with_seed(self, seed: int) -> SeededStep:
    """The same program with another seed."""
    return SeededStep(self.jitted, seed)

  def trace(self, *arguments: Any) -> Any:
    """As a jitted function's, of arguments or their shapes."""
    return self.jitted.trace(self.seed, *arguments)

  def lower(self, *arguments: Any) -> Any:
    """As a jitted function's, of arguments or their shapes."""
    return self.jitted.lower(self.seed, *arguments)
