"""One step of contrastive training, jitted over a mesh, with the gradient cache where a batch does not fit at once.

The gradient cache (Gao et al. 2021, arXiv 2101.06983): vectors chunk by chunk without a gradient, the loss and its
gradient with respect to the vectors, then chunk by chunk again with a gradient. Every random mask is keyed by the
example's row in the global batch, so that the second pass sees the masks of the first.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dptdr_jax.training.chunks import ROWS, WHOLE, chunk_count, on_all, on_data, share_inner, split
from dptdr_jax.training.losses import contrastive_loss
from dptdr_jax.training.optimizer import Optimizer
from dptdr_jax.training.seeded import SeededStep
from dptdr_jax.training.state import TrainState, apply_gradient
from dptdr_jax.training.towers import SIDES, TowerModel

_OF_ALL = ("targets", "blocked", "repeated")  # of a batch, what speaks of its pairs, whole on every device


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
  """What a step depends on beside the model and its parameters.

  Attributes:
    seed: of every random mask, with the step; may be traced.
    temperature: what scores are divided by.
    both_directions: also passages against queries.
    query_chunk, passage_chunk: examples per device that are encoded at once with a gradient; 0 is all of them.
  """

  seed: int | jax.Array
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
  shardings: tuple[Any, Any] | None = None,
) -> SeededStep:
  """Builds the jitted step: (state, backbone_params, batch) → (state, metrics).

  The state is donated, the backbone never. `shardings` of the two, leaf by leaf; None: whole on every device. The batch
  (see `runtime.mesh.put_batch`): query_tokens [B, Tq] int32, query_lengths [B], passage_tokens [M, Tp] and
  passage_lengths [M], rows sharded; targets [B], blocked [B, M] bool and repeated [M] bool, replicated. Rows of tokens
  beyond B and M fill the devices up and count for nothing. It compiles once for each set of shapes.

  Metrics are float32 scalars: loss, accuracy, positive_score, gradient_norm (before clipping), learning_rate. Where the
  loss or the norm is not finite the state comes back as it was, its step too: the caller stops and keeps what it had.

  Raises (when it first sees a shape):
    InputError: a chunk that does not divide its share of the batch.
  """
  config = ContrastiveConfig(seed, temperature, both_directions, query_chunk, passage_chunk)

  def step(seed: jax.Array, state: TrainState, backbone: Any, batch: dict[str, jax.Array]):
    seeded = dataclasses.replace(config, seed=seed)
    loss, metrics, gradient = loss_and_gradient(model, seeded, mesh, state, backbone, batch)
    state, applied = apply_gradient(state, optimizer, loss, gradient)
    return state, applied | metrics

  whole, rows = NamedSharding(mesh, WHOLE), NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  of_state, of_backbone = shardings or (whole, whole)
  batch = {f"{side}_{what}": rows for side in SIDES for what in ("tokens", "lengths")}
  jitted = jax.jit(
    step,
    in_shardings=(whole, of_state, of_backbone, batch | dict.fromkeys(_OF_ALL, whole)),
    out_shardings=(of_state, whole),
    donate_argnums=1,
  )
  return SeededStep(jitted, seed)


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
  for number, name in enumerate(SIDES):
    side = _Side(model, name, config.chunk(name), mesh, jax.random.fold_in(key, number))
    encoded, pullback = side.encode(state.trainable, backbone, batch[f"{name}_tokens"], batch[f"{name}_lengths"])
    vectors.append(encoded)
    pullbacks.append(pullback)

  def loss_of(queries, passages, targets, blocked, repeated):
    queries, passages = queries[: blocked.shape[0]], passages[: blocked.shape[1]]  # without what fills the devices up
    options = {"temperature": config.temperature, "both_directions": config.both_directions}
    return contrastive_loss(queries, passages, targets, blocked, repeated, **options)

  # The compiler would share it out by an all-to-all.
  run = on_all(jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True), mesh, 5)
  (loss, metrics), cotangents = run(*vectors, *(batch[name] for name in _OF_ALL))
  gradients = [pullback(cotangent) for pullback, cotangent in zip(pullbacks, cotangents, strict=True)]
  return loss, metrics, jax.tree.map(jnp.add, *gradients)


class _Side:
  """Queries or passages of one step: their vectors, and the gradient that a cotangent of these gives.

  Nothing moves between devices along 'data' but the vectors, once, and the gradient, once; see `training.chunks`.
  """

  def __init__(self, model: TowerModel, name: str, chunk: int, mesh: Mesh, key: jax.Array):
    self.model, self.name, self.chunk, self.mesh = model, name, chunk, mesh
    self.row_key, self.batch_key = jax.random.split(key)

  def encode(self, trainable: Any, backbone: Any, tokens: jax.Array, lengths: jax.Array):
    """Token ids [B, T] and lengths [B] → vectors [B, H], and the function from their cotangent to the gradient."""
    inputs = (tokens, lengths, jnp.arange(tokens.shape[0]))
    chunks = chunk_count(tokens.shape[0], self.mesh.size, self.chunk, self.name)
    frozen = (backbone, self.row_key, self.batch_key)
    if chunks == 1:
      # A replicated argument's cotangent is summed over the devices where shard_map is entered.
      run = on_data(self._vectors, self.mesh, (WHOLE, WHOLE, ROWS), ROWS)
      vectors, pullback = jax.vjp(lambda trained: run(trained, frozen, inputs), trainable)
      return vectors, lambda cotangent: pullback(cotangent)[0]

    def forward(trained, frozen, inputs):
      vectors = jax.lax.map(lambda chunk: self._vectors(trained, frozen, chunk), split(inputs, chunks))
      return vectors.reshape(-1, vectors.shape[-1])

    def backward(trained, frozen, inputs, cotangent):
      def add(total, chunk_and_cotangent):
        chunk, cotangent = chunk_and_cotangent
        cotangent = share_inner(cotangent)
        gradient = jax.vjp(lambda trained: self._vectors(trained, frozen, chunk), trained)[1](cotangent)[0]
        return jax.tree.map(jnp.add, total, gradient), None

      total = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), split((inputs, cotangent), chunks))[0]
      return jax.lax.psum(total, "data")

    vectors = on_data(forward, self.mesh, (WHOLE, WHOLE, ROWS), ROWS)(trainable, frozen, inputs)
    pull = on_data(backward, self.mesh, (WHOLE, WHOLE, ROWS, ROWS), WHOLE)
    return vectors, lambda cotangent: pull(trainable, frozen, inputs, cotangent)

  def _vectors(self, trainable: Any, frozen: tuple, inputs: tuple[jax.Array, ...]) -> jax.Array:
    """Vectors of some rows, each with a key of its row in the global batch."""
    (backbone, row_key, batch_key), (tokens, lengths, rows) = frozen, share_inner(inputs)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(row_key, rows)
    return self.model.encode(self.name, trainable, backbone, tokens, lengths, keys=keys, batch_key=batch_key)
