"""One step of retrieval-oriented pretraining (RIP), jitted over a mesh: contrast between spans, and masked language
modelling (MLM).

Both losses come from one forward pass over the masked spans, as in coCondenser (Gao and Callan 2022). With the gradient
cache the MLM loss is computed in the second pass only; every masked token of the global batch counts once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dptdr_jax.core.errors import InputError
from dptdr_jax.models import mlm
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.dropout import Dropout
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.models.represent import hidden_states, pool, represent
from dptdr_jax.runtime.mesh import batch_sharding, replicated
from dptdr_jax.training.chunks import chunk_count, on_all
from dptdr_jax.training.gradient_cache import GradientCache
from dptdr_jax.training.losses import contrastive_loss
from dptdr_jax.training.optimizer import Optimizer
from dptdr_jax.training.state import TrainState, make_step, row_keys

_NO_PROMPT = PromptSpec("none")


@dataclasses.dataclass(frozen=True)
class PretrainModel:
  """How spans become losses.

  Attributes:
    encoder: the backbone's shape.
    pooling, normalize, compute_dtype, dropout, remat: see `models.represent.represent`.
    temperature: what scores of the contrast are divided by.
    contrast_weight, mlm_weight: of the two losses; mlm_weight 0: no MLM head and no masking.
  """

  encoder: EncoderConfig
  pooling: str = "first"
  normalize: bool = False
  temperature: float = 1.0
  contrast_weight: float = 1.0
  mlm_weight: float = 1.0
  compute_dtype: Any = jnp.float32
  dropout: Dropout | None = None
  remat: str = "none"

  def __post_init__(self):
    if min(self.contrast_weight, self.mlm_weight) < 0 or not self.contrast_weight + self.mlm_weight:
      raise InputError(
        "the weights of contrast and masked language modelling must not be negative, nor both 0",
        value=(self.contrast_weight, self.mlm_weight),
      )
    if self.mlm_weight:
      mlm.check_family(self.encoder)

  def init_trainable(self, key: jax.Array, backbone: Any, head: Any | None) -> dict[str, Any]:
    """What is trained, float32: {'backbone': …} and, with MLM, {'mlm_head': …} (a fresh one if `head` is None)."""
    as_float = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), {"backbone": backbone})
    if self.mlm_weight:
      as_float["mlm_head"] = mlm.init_head(key, self.encoder) if head is None else jax.tree.map(jnp.asarray, head)
    return as_float

  def vectors(self, trainable: dict[str, Any], key: jax.Array, spans: dict[str, jax.Array]) -> jax.Array:
    """Vectors [n, H] of spans: the batch's arrays, and 'rows', their rows in the global batch."""
    return represent(
      self.encoder, _NO_PROMPT, trainable["backbone"], None, spans["tokens"], spans["lengths"],
      pooling=self.pooling, normalize=self.normalize, **self._options(key, spans),
    )  # fmt: skip

  def outputs(self, trainable: dict[str, Any], key: jax.Array, spans: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """'vectors' [n, H]; with MLM also 'nll' and 'hits' [n], sums over a span's masked tokens."""
    if not self.mlm_weight:
      return {"vectors": self.vectors(trainable, key, spans)}
    hidden = hidden_states(
      self.encoder, _NO_PROMPT, trainable["backbone"], None, spans["tokens"], spans["lengths"],
      **self._options(key, spans),
    )  # fmt: skip
    words = trainable["backbone"]["embeddings"]["word"]
    nll, hits = mlm.masked_loss(
      trainable["mlm_head"], words, hidden, spans["positions"], spans["labels"], self.encoder, self.compute_dtype
    )
    vectors = pool(hidden, spans["lengths"], pooling=self.pooling, normalize=self.normalize)
    return {"vectors": vectors, "nll": nll, "hits": hits}

  def _options(self, key: jax.Array, spans: dict[str, jax.Array]) -> dict[str, Any]:
    return dict(
      keys=row_keys(key, spans["rows"]), dropout=self.dropout, compute_dtype=self.compute_dtype, remat=self.remat
    )


def make_pretrain_step(
  model: PretrainModel, optimizer: Optimizer, *, chunk: int, mesh: Mesh, shardings: TrainState
) -> Callable:
  """Builds the jitted step (seed, state, batch) → (state, metrics), see `state.make_step`.

  The batch is that of `data.spans.SpanBatches`: tokens [S, T], lengths [S] and, with masked language modelling,
  positions and labels [S, K], rows sharded; groups [S], replicated. Spans 2i and 2i + 1 are of one passage.

  Metrics of its own: contrastive_loss, accuracy, alignment, uniformity, tokens (without padding), and with masked
  language modelling mlm_loss and mlm_accuracy.

  Args:
    chunk: spans per device at once (gradient cache); 0: all.
    shardings: of the state, leaf by leaf.

  Raises (when it first sees a shape):
    InputError: a chunk that does not divide its share of the batch.
  """

  def run(state: TrainState, batch: dict[str, jax.Array], seed: jax.Array):
    loss, metrics, gradient = loss_and_gradient(model, state, batch, seed=seed, chunk=chunk, mesh=mesh)
    return loss, metrics, jax.lax.with_sharding_constraint(gradient, shardings.trainable)

  names = ("tokens", "lengths", *(("positions", "labels") if model.mlm_weight else ()))
  batch = {**dict.fromkeys(names, batch_sharding(mesh)), "groups": replicated(mesh)}
  return make_step(run, optimizer, mesh=mesh, state=shardings, inputs=(batch,))


def loss_and_gradient(
  model: PretrainModel, state: TrainState, batch: dict[str, jax.Array], *, seed: int | jax.Array, chunk: int, mesh: Mesh
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """The loss of a batch, its metrics, and the gradient with respect to `state.trainable` (a tree like it)."""
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  spans = {name: value for name, value in batch.items() if name != "groups"}
  count = spans["tokens"].shape[0]
  spans["rows"] = jnp.arange(count)
  masked = jnp.maximum(jnp.sum(batch["labels"] >= 0), 1).astype(jnp.float32) if model.mlm_weight else None
  cache = GradientCache(model.outputs, mesh, chunk_count(count, mesh.size, chunk, "span"), model.vectors)

  def contrast(vectors):
    function = jax.value_and_grad(lambda v, groups: span_contrast(v, groups, model.temperature), has_aux=True)
    return on_all(function, mesh, 2)(vectors, batch["groups"])

  def cotangents(towards):
    parts = {"vectors": model.contrast_weight * towards}
    if model.mlm_weight:
      parts |= {"nll": jnp.full((count,), model.mlm_weight / masked), "hits": jnp.zeros((count,))}
    return parts

  if model.contrast_weight or cache.chunks == 1:
    vectors, pullback = cache.encode(state.trainable, key, spans)
    (value, metrics), towards = contrast(vectors)
    outputs, gradient = pullback(cotangents(towards))
  else:  # the vectors have no gradient, so one pass is enough
    none = jnp.zeros((count, model.encoder.hidden_size))
    outputs, gradient = cache.backward(state.trainable, key, spans, cotangents(none))
    (value, metrics), _ = contrast(outputs["vectors"])
  loss = model.contrast_weight * value
  metrics |= {"contrastive_loss": value, "tokens": jnp.sum(spans["lengths"]).astype(jnp.float32)}
  if model.mlm_weight:
    metrics["mlm_loss"] = jnp.sum(outputs["nll"]) / masked
    metrics["mlm_accuracy"] = jnp.sum(outputs["hits"]) / masked
    loss += model.mlm_weight * metrics["mlm_loss"]
  return loss, metrics, gradient


def span_contrast(vectors: jax.Array, groups: jax.Array, temperature: float) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Each span against all others of the batch; its partner is the positive, other spans of the same text are ignored.

  Args:
    vectors: [S, H], partners in rows 2i and 2i + 1. groups: [S] int32, equal for spans of one text.

  Returns:
    The mean cross-entropy, and scalars: 'accuracy', the share of spans whose partner scores highest, and of the
    normalised vectors 'alignment' E‖x − x⁺‖² and 'uniformity' log E exp(−2‖x − y‖²) over spans of different texts
    (Wang and Isola 2020).
  """
  partner = jnp.arange(vectors.shape[0]) ^ 1
  same = groups[:, None] == groups[None, :]
  blocked = same & (jnp.arange(vectors.shape[0])[None, :] != partner[:, None])
  loss, metrics = contrastive_loss(vectors, vectors, partner, blocked, temperature=temperature)
  unit = jax.lax.stop_gradient(vectors)
  unit *= jax.lax.rsqrt(jnp.maximum(jnp.sum(unit * unit, axis=-1, keepdims=True), 1e-24))
  distance = 2 - 2 * jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST)
  others = jnp.where(same, 0.0, jnp.exp(-2 * distance))
  return loss, {
    "accuracy": metrics["accuracy"],
    "alignment": jnp.mean(jnp.take_along_axis(distance, partner[:, None], axis=1)),
    "uniformity": jnp.log(jnp.sum(others) / jnp.sum(~same)),
  }
