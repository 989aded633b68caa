"""One step of a cross-encoder's training, jitted over a mesh: binary cross-entropy of pairs, in micro-batches.

Both classes weigh the same, whatever their numbers: with n negatives a positive the base rate of the training pairs is
1 / (n + 1), and unweighted a probability of .1 would mean another thing for every n (for n = 9 just the base rate). So
each class gets half of the weight. The sigmoid of the logit is then the probability of relevance at even odds, that is
p / (1 − p) is how much likelier the pair is among positives than among negatives, and RocketQA's thresholds .1 and .9
(arXiv 2010.08191) stand for 9 to 1 against and for, with any n.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.cross import cross_logits, init_cross
from dptdr_jax.models.dropout import Dropout
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.training.chunks import ROWS, WHOLE, chunk_count, on_data, share_inner, split
from dptdr_jax.training.optimizer import Optimizer
from dptdr_jax.training.seeded import SeededStep
from dptdr_jax.training.state import TrainState, apply_gradient

_READ = ("tokens", "lengths", "segments", "relevant")  # of a batch, by pair


@dataclasses.dataclass(frozen=True)
class CrossModel:
  """How a pair of texts becomes a logit.

  Attributes:
    encoder: the backbone's shape.
    prompt: a deep or shallow prompt of the cross-encoder's own.
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
    batch_key: jax.Array | None = None,
  ) -> jax.Array:
    """Pairs [B, T] of lengths [B] and segments [B, T] → logits [B] float32; with keys [B] and a batch_key dropout is
    on."""
    return cross_logits(
      self.encoder, self.prompt, backbone, trainable, tokens, lengths, segments,
      keys=keys, batch_key=batch_key, dropout=self.dropout, compute_dtype=self.compute_dtype,
    )  # fmt: skip


def make_cross_step(
  model: CrossModel, optimizer: Optimizer, *, seed: int, chunk: int, mesh: Mesh, frozen: Any | None = None
) -> SeededStep:
  """Builds the jitted step: (state, backbone_params, batch) → (state, metrics).

  The state is donated, the backbone never; `frozen` are its shardings, leaf by leaf (None: whole on every device). The
  batch, rows sharded: tokens [M, T] int32, lengths [M], segments [M, T] int8 (see `models.cross.cross_logits`),
  relevant [M] bool, real [M] bool (False: fills the devices up, counts for nothing). `chunk` pairs a device are encoded
  at a time, 0 is all of them; the gradient is the same.

  Metrics are float32 scalars: loss, accuracy (share of pairs on the right side of .5, both classes weighing the same,
  so that chance is .5), gradient_norm (before clipping), learning_rate. Where the loss or the norm is not finite the
  state comes back as it was.

  Raises (when it first sees a shape):
    InputError: a chunk that does not divide its share of the batch.
  """

  def step(seed: jax.Array, state: TrainState, backbone: Any, batch: dict[str, jax.Array]):
    loss, accuracy, gradient = loss_and_gradient(model, seed, chunk, mesh, state, backbone, batch)
    state, applied = apply_gradient(state, optimizer, loss, gradient)
    return state, applied | {"accuracy": accuracy}

  whole, rows = NamedSharding(mesh, WHOLE), NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  batch = dict.fromkeys((*_READ, "real"), rows)
  shardings = (whole, whole, whole if frozen is None else frozen, batch)
  return SeededStep(jax.jit(step, in_shardings=shardings, out_shardings=whole, donate_argnums=1), seed)


def loss_and_gradient(
  model: CrossModel,
  seed: int | jax.Array,
  chunk: int,
  mesh: Mesh,
  state: TrainState,
  backbone: Any,
  batch: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array, Any]:
  """The loss of a batch, its accuracy, and the gradient with respect to `state.trainable` (a tree like it).

  A device cuts its own rows into chunks and adds up its own gradient; one sum over the devices is all that moves. Every
  random mask is keyed by the pair's row in the global batch.
  """
  count = batch["tokens"].shape[0]
  row_key, batch_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
  inputs = {name: batch[name] for name in _READ}
  inputs |= {"weights": balanced(batch["relevant"], batch["real"]), "rows": jnp.arange(count)}
  chunks = chunk_count(count, mesh.size, chunk, "pair")

  def weighed(trainable, frozen, part):
    (backbone, row_key, batch_key), part = frozen, share_inner(part)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(row_key, part["rows"])
    arguments = (part[name] for name in ("tokens", "lengths", "segments"))
    logits = model.logits(trainable, backbone, *arguments, keys=keys, batch_key=batch_key)
    return weighted_loss(logits, part["relevant"], part["weights"])

  def on_device(trainable, frozen, inputs):
    def add(total, part):
      (loss, right), gradient = jax.value_and_grad(weighed, has_aux=True)(trainable, frozen, part)
      return jax.tree.map(jnp.add, total, (loss, right, gradient)), None

    zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
    total = jax.lax.scan(add, zero, split(inputs, chunks))[0]
    return jax.lax.psum(total, "data")

  run = on_data(on_device, mesh, (WHOLE, WHOLE, ROWS), WHOLE)
  return run(state.trainable, (backbone, row_key, batch_key), inputs)


def balanced(relevant: jax.Array, real: jax.Array) -> jax.Array:
  """Weights of pairs [M], float32: over the real ones ½ to the relevant and ½ to the others; 0 where not real."""
  positives = jnp.sum(relevant & real, dtype=jnp.float32)
  shares = jnp.where(relevant, positives, jnp.sum(real, dtype=jnp.float32) - positives)
  return jnp.where(real, 0.5 / shares, 0.0)


def weighted_loss(logits: jax.Array, relevant: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Binary cross-entropy and how much is on the right side of .5: weighted sums over pairs [M], float32 scalars."""
  signed = jnp.where(relevant, logits, -logits)
  return jnp.sum(weights * jax.nn.softplus(-signed)), jnp.sum(weights * (signed > 0))
