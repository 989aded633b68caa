"""Vectors to search in: random ones, and what holds them on disk."""

from __future__ import annotations

import numpy as np

from dptdr_jax.retrieval.embeddings import Embeddings, write_vectors
from dptdr_jax.retrieval.runs import Run


def gaussian(shape, seed: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integers(shape, seed: int) -> np.ndarray:
  """Small whole numbers: every sum is exact, also of bfloat16, so ties are true ties, and there are many."""
  return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


def embeddings(path, passages: np.ndarray, shard_rows: int = 300, dtype: str = "float32") -> Embeddings:
  ids = [str(row) for row in range(len(passages))]
  options = {"width": passages.shape[1], "source": {"made": "here"}, "shard_rows": shard_rows, "dtype": dtype}
  return write_vectors(path, ids=ids, make=lambda rows: passages[rows], **options)


def same(got: Run, expected: Run) -> None:
  """Equal rows and bits of scores."""
  np.testing.assert_array_equal(got.rows, expected.rows)
  np.testing.assert_array_equal(got.scores, expected.scores)
