"""One step of contrastive training, jitted over a mesh, with the gradient cache where a batch does not fit at once.

The gradient cache (Gao et al. 2021, arXiv 2101.06983): vectors chunk by chunk without a gradient, the loss and its
gradient with respect to the vectors, then chunk by chunk again with a gradient. Every random mask is keyed by the
example's row in the global batch, so that the second pass sees the masks of the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dptdr_jax.core.errors import InputError
from dptdr_jax.training.losses import contrastive_loss
from dptdr_jax.training.optimizer import Optimizer
from dptdr_jax.training.state import TrainState
from dptdr_jax.training.towers import SIDES, TowerModel


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
  """What a step depends on beside the model and its parameters.

  Attributes:
    seed: of every random mask, with the step.
    temperature: what scores are divided by.
    both_directions: also passages against queries.
    query_chunk, passage_chunk: examples per device that are encoded at once with a gradient; 0 is all of them.
  """

  seed: int
  temperature: float = 1.0
  both_directions: bool = False
  query_chunk: int = 0
  passage_chunk: int = 0

  def chunk(self, side: str) -> int:
    """The chunk of 'query' or 'passage'."""
    return self.query_chunk if side == "query" else self.passage_chunk


def make_train_step(
  model: TowerModel,
  optimizer: Optimizer,
  *,
  seed: int,
  query_chunk: int,
  passage_chunk: int,
  temperature: float,
  both_directions: bool,
  mesh: Mesh,
) -> Callable[[TrainState, Any, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
  """Builds the jitted step: (state, backbone_params, batch) → (state, metrics).

  The state is donated, the backbone never. The batch (see `runtime.mesh.put_batch`): query_tokens [B, Tq] int32,
  query_lengths [B], passage_tokens [M, Tp], passage_lengths [M], rows sharded; targets [B] and blocked [B, M] bool,
  replicated. It compiles once for each set of shapes.

  Metrics are float32 scalars: loss, accuracy, positive_score, gradient_norm (before clipping), learning_rate. Where the
  loss or the norm is not finite the state comes back as it was, its step too: the caller stops and keeps what it had.

  Raises (when it first sees a shape):
    InputError: a chunk that does not divide its share of the batch.
  """
  config = ContrastiveConfig(seed, temperature, both_directions, query_chunk, passage_chunk)

  def step(state: TrainState, backbone: Any, batch: dict[str, jax.Array]):
    loss, metrics, gradient = loss_and_gradient(model, config, mesh, state, backbone, batch)
    norm = optax.global_norm(gradient)
    updates, opt_state = optimizer.transform.update(gradient, state.opt_state, state.trainable)
    new = TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new = jax.tree.map(lambda ours, theirs: jnp.where(finite, ours, theirs), new, state)
    rate = jnp.asarray(optimizer.schedule(state.step), jnp.float32)
    return new, {"loss": loss, **metrics, "gradient_norm": norm, "learning_rate": rate}

  whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  batch = {f"{side}_{what}": rows for side in SIDES for what in ("tokens", "lengths")}
  return jax.jit(
    step,
    in_shardings=(whole, whole, {**batch, "targets": whole, "blocked": whole}),
    out_shardings=whole,
    donate_argnums=0,
  )


def loss_and_gradient(
  model: TowerModel,
  config: ContrastiveConfig,
  mesh: Mesh,
  state: TrainState,
  backbone: Any,
  batch: dict[str, jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """The loss of a batch, metrics of it, and the gradient with respect to `state.trainable` (a tree like it)."""
  key = jax.random.fold_in(jax.random.key(config.seed), state.step)
  vectors, pullbacks = [], []
  for number, side in enumerate(SIDES):
    encode = _encoder(model, side, backbone, jax.random.fold_in(key, number))
    tokens = batch[f"{side}_tokens"]
    inputs = (tokens, batch[f"{side}_lengths"], jnp.arange(tokens.shape[0]))
    encoded, pullback = _encode(encode, state.trainable, inputs, _Layout(mesh, side, config.chunk(side)))
    vectors.append(encoded)
    pullbacks.append(pullback)

  def loss_of(queries, passages):
    options = {"temperature": config.temperature, "both_directions": config.both_directions}
    return contrastive_loss(queries, passages, batch["targets"], batch["blocked"], **options)

  (loss, metrics), cotangents = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(*vectors)
  gradients = [pullback(cotangent) for pullback, cotangent in zip(pullbacks, cotangents, strict=True)]
  return loss, metrics, jax.tree.map(jnp.add, *gradients)


def chunk_count(rows: int, devices: int, chunk: int, side: str) -> int:
  """How many chunks a side's batch of `rows` falls into on each device; `chunk` 0 is all at once.

  Raises:
    InputError: names the chunk sizes that work.
  """
  if rows % devices:
    raise InputError(f"a batch of {rows} {side} rows does not divide over {devices} devices")
  share = rows // devices
  if chunk and chunk < share and share % chunk:
    works = [size for size in range(1, share + 1) if share % size == 0]
    raise InputError(
      f"a {side} chunk of {chunk} does not divide the {share} rows that each of {devices} devices holds",
      fix=f"These do: {', '.join(map(str, works))}",
    )
  return max(share // chunk, 1) if chunk else 1


def _encoder(model: TowerModel, side: str, backbone: Any, key: jax.Array) -> Callable[..., jax.Array]:
  """(trainable, tokens, lengths, rows) → vectors, with a key for each row of the global batch."""
  row_key, batch_key = jax.random.split(key)

  def encode(trainable, tokens, lengths, rows):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(row_key, rows)
    return model.encode(side, trainable, backbone, tokens, lengths, keys=keys, batch_key=batch_key)

  return encode


def _encode(
  encode: Callable[..., jax.Array], trainable: Any, inputs: tuple[jax.Array, ...], layout: _Layout
) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
  """Vectors [B, H] on every device, and the function that turns their cotangent into the gradient."""
  inputs = jax.tree.map(layout.rows, inputs)
  if layout.count(inputs[0]) == 1:
    vectors, pullback = jax.vjp(lambda trained: encode(trained, *inputs), trainable)
    return layout.gather(vectors), lambda cotangent: pullback(layout.rows(cotangent))[0]

  chunks = jax.tree.map(layout.split, inputs)
  vectors = jax.lax.map(lambda chunk: encode(trainable, *chunk), chunks)

  def pullback(cotangent):
    def add(total, chunk_and_cotangent):
      chunk, cotangent = chunk_and_cotangent
      gradient = jax.vjp(lambda trained: encode(trained, *chunk), trainable)[1](cotangent)[0]
      return jax.tree.map(jnp.add, total, gradient), None

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trainable)
    return jax.lax.scan(add, zero, (chunks, layout.split(layout.rows(cotangent))))[0]

  return layout.gather(layout.join(vectors)), pullback


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How the rows of one side lie on the devices, whole and in chunks.

  A device keeps its rows: chunk i holds the i-th `chunk` rows of every device, so that cutting a batch into chunks
  moves nothing between devices.
  """

  mesh: Mesh
  side: str
  chunk: int

  def rows(self, x: jax.Array) -> jax.Array:
    """[B, …], rows shared out over the devices."""
    return self._constrain(x, PartitionSpec(self.mesh.axis_names))

  def gather(self, x: jax.Array) -> jax.Array:
    """[B, …] shared out → all of it on every device."""
    return self._constrain(self.rows(x), PartitionSpec())

  def count(self, x: jax.Array) -> int:
    """Number of chunks of [B, …]."""
    return chunk_count(x.shape[0], self.mesh.size, self.chunk, self.side)

  def split(self, x: jax.Array) -> jax.Array:
    """[B, …] → [chunks, devices · chunk, …]."""
    x = x.reshape(self.mesh.size, self.count(x), self.chunk, *x.shape[1:]).swapaxes(0, 1)
    return self._constrain(x.reshape(x.shape[0], -1, *x.shape[3:]), PartitionSpec(None, self.mesh.axis_names))

  def join(self, x: jax.Array) -> jax.Array:
    """[chunks, devices · chunk, …] → [B, …], the inverse of `split`."""
    x = x.reshape(x.shape[0], self.mesh.size, self.chunk, *x.shape[2:]).swapaxes(0, 1)
    return self.rows(x.reshape(-1, *x.shape[3:]))

  def _constrain(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
