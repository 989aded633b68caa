"""One step of contrastive training, jitted over a mesh, with the gradient cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dptdr_jax.runtime.mesh import WHOLE, batch_sharding, replicated
from dptdr_jax.training.chunks import chunk_count, on_all
from dptdr_jax.training.encoders import SIDES, BiEncoder
from dptdr_jax.training.gradient_cache import GradientCache
from dptdr_jax.training.losses import contrastive_loss
from dptdr_jax.training.optimizer import Optimizer
from dptdr_jax.training.state import TrainState, make_step, row_keys


def make_train_step(
  model: BiEncoder, optimizer: Optimizer, *, mesh: Mesh, shardings: tuple[Any, Any] | None = None,
  **options: Any,
) -> Callable:  # fmt: skip
  """Builds the jitted step (seed, state, backbone_params, batch) → (state, metrics), see `state.make_step`.

  Its batch: see `loss_and_gradient`. Metrics of its own: accuracy, positive_score.

  Args:
    shardings: of state and backbone, leaf by leaf; None: whole on every device.
    options: query_chunk, passage_chunk, temperature, both_directions; see `loss_and_gradient`.
  """
  whole, rows = replicated(mesh), batch_sharding(mesh)
  of_state, of_backbone = shardings or (whole, whole)
  batch = {f"{side}_{what}": rows for side in SIDES for what in ("tokens", "lengths")} | dict.fromkeys(WHOLE, whole)
  run = functools.partial(loss_and_gradient, model, mesh=mesh, **options)
  return make_step(run, optimizer, mesh=mesh, state=of_state, inputs=(of_backbone, batch))


def loss_and_gradient(
  model: BiEncoder, state: TrainState, backbone: Any, batch: dict[str, jax.Array], *, seed: int | jax.Array, mesh: Mesh,
  query_chunk: int = 0, passage_chunk: int = 0, temperature: float = 1.0, both_directions: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:  # fmt: skip
  """The loss of a batch, its metrics, and the gradient with respect to `state.trainable` (a tree like it).

  Args:
    backbone: the frozen weights.
    batch: see `runtime.mesh.put_batch`: query_tokens [B, Tq] int32, query_lengths [B], passage_tokens [M, Tp] and
      passage_lengths [M], rows sharded; targets [B], blocked [B, M] bool and repeated [M] bool, replicated. Rows of
      tokens beyond B and M fill up the devices and count for nothing.
    seed: of every random mask, with the step; may be traced.
    query_chunk, passage_chunk: rows per device that are encoded at once with a gradient; 0 is all of them.
    temperature, both_directions: see `training.losses.contrastive_loss`.

  Raises (when it first sees a shape):
    InputError: a chunk that does not divide its share of the batch.
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  vectors, pullbacks = [], []
  for number, (side, chunk) in enumerate(zip(SIDES, (query_chunk, passage_chunk), strict=True)):
    tokens = batch[f"{side}_tokens"]
    count = tokens.shape[0]
    cache = GradientCache(functools.partial(_encode, model, side), mesh, chunk_count(count, mesh.size, chunk, side))
    row_key = jax.random.split(jax.random.fold_in(key, number))[0]
    rows = (tokens, batch[f"{side}_lengths"], jnp.arange(count))
    encoded, pullback = cache.encode(state.trainable, (backbone, row_key), rows)
    vectors.append(encoded)
    pullbacks.append(pullback)

  def loss_of(queries, passages, targets, blocked, repeated):
    queries, passages = queries[: blocked.shape[0]], passages[: blocked.shape[1]]  # without what fills up the devices
    options = {"temperature": temperature, "both_directions": both_directions}
    return contrastive_loss(queries, passages, targets, blocked, repeated, **options)

  # On every device, whole: the compiler would share it out by an all-to-all.
  run = on_all(jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True), mesh, 5)
  (loss, metrics), cotangents = run(*vectors, *(batch[name] for name in WHOLE))
  gradients = [pull({"vectors": towards})[1] for pull, towards in zip(pullbacks, cotangents, strict=True)]
  return loss, metrics, jax.tree.map(jnp.add, *gradients)


def _encode(model: BiEncoder, side: str, trainable: Any, frozen: tuple, inputs: tuple) -> dict[str, jax.Array]:
  (backbone, row_key), (tokens, lengths, rows) = frozen, inputs
  return {"vectors": model.encode(side, trainable, backbone, tokens, lengths, keys=row_keys(row_key, rows))}
