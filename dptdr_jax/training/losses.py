"""Contrastive loss over the global batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def contrastive_loss(
  queries: jax.Array,
  passages: jax.Array,
  targets: jax.Array,
  blocked: jax.Array,
  repeated: jax.Array | None = None,
  *,
  temperature: float,
  both_directions: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Cross-entropy of each query against all passages of the global batch.

  Args:
    queries: [B, H] vectors.
    passages: [M, H] vectors.
    targets: [B] int32, the row in `passages` of each query's positive.
    blocked: [B, M] bool, pairs that are not negatives: other known positives of the query, and copies of its own
      positive. Never true at a target.
    repeated: [M] bool, passages that occurred before in the batch: as negatives they count once. As a target they stay.
      None: there are none.
    temperature: scores are divided by it; 1 in the original.
    both_directions: also each positive against the queries of the batch, blocked likewise; the loss is the mean.

  Returns:
    The loss, a float32 scalar, and scalars: 'accuracy', the share of queries whose positive scores above every
    passage that is not blocked, and 'positive_score', the mean dot product with the positive (before temperature).
  """
  scores = jnp.matmul(
    queries.astype(jnp.float32), passages.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST
  )  # accelerators would otherwise multiply float32 in fewer bits
  ignored = blocked
  if repeated is not None:
    ignored |= repeated & (jnp.arange(passages.shape[0]) != targets[:, None])
  loss = _cross_entropy(scores / temperature, targets, ignored)
  if both_directions:
    # Row i: the positive of query i against query j, which is column targets[i] of the same scores.
    backward = jnp.take(scores, targets, axis=1).T / temperature
    # Not `ignored`: repeated positives still get the other queries as negatives.
    others_too = jnp.take(blocked, targets, axis=1).T
    loss = (loss + _cross_entropy(backward, jnp.arange(targets.shape[0]), others_too)) / 2
  positive = jnp.take_along_axis(scores, targets[:, None], axis=1)
  is_rival = ~ignored & (jnp.arange(passages.shape[0]) != targets[:, None])
  return loss, {
    "accuracy": jnp.mean(~jnp.any(is_rival & (scores >= positive), axis=1), dtype=jnp.float32),
    "positive_score": jnp.mean(positive),
  }


def _cross_entropy(logits: jax.Array, targets: jax.Array, blocked: jax.Array) -> jax.Array:
  """Mean over rows of −log softmax at the target, over what is not blocked: logits, blocked [B, M], targets [B]."""
  logits = jnp.where(blocked, jnp.finfo(logits.dtype).min, logits)  # −inf could give NaN
  chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
  return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)
