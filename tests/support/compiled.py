"""Programs compiled once for several runs of the main job: compiling is most of what a tiny run does."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def once(directory: pathlib.Path) -> Iterator[None]:
  """Keeps what is compiled within the block in `directory`."""
  compilation_cache.reset_cache()  # whether there is one is asked once, at the first compilation
  jax.config.update("jax_compilation_cache_dir", str(directory))
  try:
    yield
  finally:
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
