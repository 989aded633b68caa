"""One step of cross-encoder training, jitted over a mesh: binary cross-entropy of pairs, in micro-batches.

Both classes have half of the weight each, whatever their numbers. With n negatives per positive the base rate is
1 / (n + 1), so an unweighted probability of .1 would mean something else for every n (for n = 9 just the base rate).
Weighted so, the sigmoid of the logit is the probability of relevance at even prior odds: p / (1 − p) is the likelihood
ratio of positive to negative, and RocketQA's thresholds .1 and .9 (arXiv 2010.08191) mean 9 to 1 for any n.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.cross import cross_logits, init_cross
from dptdr_jax.models.dropout import Dropout
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.runtime.mesh import batch_sharding, replicated
from dptdr_jax.training.chunks import ROWS, WHOLE, chunk_count, on_data, sum_chunks
from dptdr_jax.training.optimizer import Optimizer
from dptdr_jax.training.state import TrainState, make_step, row_keys

_READ = ("tokens", "lengths", "segments", "relevant")  # the arrays of a batch that a pair's loss depends on


@dataclasses.dataclass(frozen=True)
class CrossModel:
  """How a pair of texts becomes a logit.

  Attributes:
    encoder: the backbone's shape.
    prompt: the cross-encoder's own deep or shallow prompt.
    head: see `models.cross`.
    compute_dtype, dropout: see `models.represent.represent`.
  """

  encoder: EncoderConfig
  prompt: PromptSpec
  head: str = "match"
  compute_dtype: Any = jnp.float32
  dropout: Dropout | None = None

  def init_trainable(self, key: jax.Array, backbone: Any = None, word_ids: np.ndarray | None = None) -> dict[str, Any]:
    """Fresh {'prompt': …, 'head': …}, float32; backbone and word_ids for prompts that start from words."""
    return init_cross(key, self.prompt, self.encoder, backbone, word_ids, self.head)

  def logits(
    self,
    trainable: dict[str, Any],
    backbone: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    segments: jax.Array,
    *,
    keys: jax.Array | None = None,
  ) -> jax.Array:
    """Pairs [B, T], lengths [B], segments [B, T] → logits [B] float32; with keys [B] dropout is on."""
    return cross_logits(
      self.encoder, self.prompt, backbone, trainable, tokens, lengths, segments,
      keys=keys, dropout=self.dropout, compute_dtype=self.compute_dtype,
    )  # fmt: skip


def make_cross_step(
  model: CrossModel, optimizer: Optimizer, *, chunk: int, mesh: Mesh, shardings: tuple[Any, Any] | None = None
) -> Callable:
  """Builds the jitted step (seed, state, backbone_params, batch) → (state, metrics), see `state.make_step`.

  The batch, rows sharded: tokens [M, T] int32, lengths [M], segments [M, T] int8 (see `models.cross.cross_logits`),
  relevant [M] bool, real [M] bool (False: fills up the devices, counts for nothing). A metric of its own: accuracy, the
  share of pairs on the right side of .5, half of it from each class, so chance is .5.

  Args:
    chunk: pairs per device that are encoded at a time; 0: all. The gradient is the same.
    shardings: of state and backbone, leaf by leaf; None: whole on every device.

  Raises (when it first sees a shape):
    InputError: a chunk that does not divide its share of the batch.
  """
  of_state, of_backbone = shardings or (replicated(mesh), replicated(mesh))
  batch = dict.fromkeys((*_READ, "real"), batch_sharding(mesh))
  run = functools.partial(loss_and_gradient, model, chunk=chunk, mesh=mesh)
  return make_step(run, optimizer, mesh=mesh, state=of_state, inputs=(of_backbone, batch))


def loss_and_gradient(
  model: CrossModel, state: TrainState, backbone: Any, batch: dict[str, jax.Array], *, seed: int | jax.Array,
  chunk: int, mesh: Mesh,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:  # fmt: skip
  """The loss of a batch, its accuracy, and the gradient with respect to `state.trainable` (a tree like it).

  A device cuts its own rows into chunks and sums its own gradient; only one sum crosses devices. Every random mask is
  keyed by the pair's row in the global batch.
  """
  count = batch["tokens"].shape[0]
  row_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))[0]
  inputs = {name: batch[name] for name in _READ}
  inputs |= {"weights": balanced(batch["relevant"], batch["real"]), "rows": jnp.arange(count)}
  chunks = chunk_count(count, mesh.size, chunk, "pair")

  def weighed(trainable, frozen, part):
    backbone, row_key = frozen
    arguments = (part[name] for name in ("tokens", "lengths", "segments"))
    logits = model.logits(trainable, backbone, *arguments, keys=row_keys(row_key, part["rows"]))
    return weighted_loss(logits, part["relevant"], part["weights"])

  def on_device(trainable, frozen, inputs):
    def of_chunk(part):
      (loss, right), gradient = jax.value_and_grad(weighed, has_aux=True)(trainable, frozen, part)
      return (loss, right, gradient), None

    zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
    return sum_chunks(of_chunk, zero, inputs, chunks, mesh)[0]

  run = on_data(on_device, mesh, (WHOLE, WHOLE, ROWS), WHOLE)
  loss, accuracy, gradient = run(state.trainable, (backbone, row_key), inputs)
  return loss, {"accuracy": accuracy}, gradient


def balanced(relevant: jax.Array, real: jax.Array) -> jax.Array:
  """Weights of pairs [M], float32: over the real ones ½ to the relevant and ½ to the others; 0 where not real."""
  positives = jnp.sum(relevant & real, dtype=jnp.float32)
  shares = jnp.where(relevant, positives, jnp.sum(real, dtype=jnp.float32) - positives)
  return jnp.where(real, 0.5 / shares, 0.0)


def weighted_loss(logits: jax.Array, relevant: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Binary cross-entropy and how much is on the right side of .5: weighted sums over pairs [M], float32 scalars."""
  signed = jnp.where(relevant, logits, -logits)
  return jnp.sum(weights * jax.nn.softplus(-signed)), jnp.sum(weights * (signed > 0))
