"""One step of retrieval-oriented pretraining, jitted over a mesh: contrast between spans and masked language modelling.

Both losses come from one forward pass over the masked spans, as in coCondenser (Gao and Callan 2022). With the gradient
cache the vectors are computed chunk by chunk first, for the contrast over the whole batch; the second pass, which has
the gradient, is the one that meets the vocabulary, and every masked token of the global batch counts once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dptdr_jax.core.errors import InputError
from dptdr_jax.models import mlm
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.dropout import Dropout
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.models.represent import hidden_states, pool, represent
from dptdr_jax.training.chunks import ROWS, WHOLE, chunk_count, on_all, on_data, share_inner, split
from dptdr_jax.training.losses import contrastive_loss
from dptdr_jax.training.optimizer import Optimizer
from dptdr_jax.training.seeded import SeededStep
from dptdr_jax.training.state import TrainState, apply_gradient

_NO_PROMPT = PromptSpec("none")


@dataclasses.dataclass(frozen=True)
class PretrainModel:
  """How spans become losses.

  Attributes:
    encoder: the backbone's shape.
    pooling, normalize, compute_dtype, attention, dropout, remat: see `models.represent.represent`.
    temperature: what scores of the contrast are divided by.
    contrast_weight, mlm_weight: of the two losses; at a weight of 0 for the second there is no head and no masking.
  """

  encoder: EncoderConfig
  pooling: str = "first"
  normalize: bool = False
  temperature: float = 1.0
  contrast_weight: float = 1.0
  mlm_weight: float = 1.0
  compute_dtype: Any = jnp.float32
  attention: str = "auto"
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
    """What is trained, float32: {'backbone': …} and, where it is needed, {'mlm_head': …}, a fresh one for None."""
    as_float = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), {"backbone": backbone})
    if self.mlm_weight:
      as_float["mlm_head"] = mlm.init_head(key, self.encoder) if head is None else jax.tree.map(jnp.asarray, head)
    return as_float

  def vectors(self, trainable: dict[str, Any], key: jax.Array, spans: dict[str, jax.Array]) -> jax.Array:
    """Vectors [n, H] of some spans (the batch's arrays and 'rows', their rows in the global batch)."""
    return represent(
      self.encoder, _NO_PROMPT, trainable["backbone"], None, spans["tokens"], spans["lengths"],
      pooling=self.pooling, normalize=self.normalize, **self._options(key, spans),
    )  # fmt: skip

  def outputs(self, trainable: dict[str, Any], key: jax.Array, spans: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """'vectors' [n, H]; with masked language modelling also 'nll' and 'hits' [n], sums over a span's masked tokens."""
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
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, spans["rows"])
    return dict(
      keys=keys, dropout=self.dropout, compute_dtype=self.compute_dtype, attention=self.attention, remat=self.remat
    )


def make_pretrain_step(
  model: PretrainModel, optimizer: Optimizer, *, seed: int, chunk: int, mesh: Mesh, shardings: TrainState
) -> SeededStep:
  """Builds the jitted step: (state, batch) → (state, metrics); the state is donated.

  The batch, as `data.spans.SpanBatches` makes it: tokens [S, T], lengths [S] and with masked language modelling
  positions and labels [S, K], rows sharded; groups [S], replicated. Spans 2i and 2i + 1 are of one passage.

  Metrics, float32 scalars: loss, contrastive_loss, accuracy, alignment, uniformity, mlm_loss and mlm_accuracy (with
  masked language modelling), gradient_norm (before clipping), learning_rate, tokens (padding not counted). A step that
  is not finite leaves the state as it was.

  Args:
    chunk: gradient cache, spans per device at once; 0: all.
    shardings: of the state, leaf by leaf.

  Raises (when it first sees a shape):
    InputError: a chunk that does not divide its share of the batch.
  """

  def step(seed: jax.Array, state: TrainState, batch: dict[str, jax.Array]):
    loss, metrics, gradient = loss_and_gradient(model, state, batch, seed=seed, chunk=chunk, mesh=mesh)
    gradient = jax.lax.with_sharding_constraint(gradient, shardings.trainable)
    state, applied = apply_gradient(state, optimizer, loss, gradient)
    return state, applied | metrics

  whole, rows = NamedSharding(mesh, WHOLE), NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  names = ("tokens", "lengths", *(("positions", "labels") if model.mlm_weight else ()))
  jitted = jax.jit(
    step,
    in_shardings=(whole, shardings, {**dict.fromkeys(names, rows), "groups": whole}),
    out_shardings=(shardings, whole),
    donate_argnums=1,
  )
  return SeededStep(jitted, seed)


def loss_and_gradient(
  model: PretrainModel, state: TrainState, batch: dict[str, jax.Array], *, seed: int | jax.Array, chunk: int, mesh: Mesh
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
  """The loss of a batch, metrics of it, and the gradient with respect to `state.trainable` (a tree like it)."""
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  spans = {name: value for name, value in batch.items() if name != "groups"}
  count = spans["tokens"].shape[0]
  spans["rows"] = jnp.arange(count)
  masked = jnp.maximum(jnp.sum(batch["labels"] >= 0), 1).astype(jnp.float32) if model.mlm_weight else None

  def contrast(vectors):
    function = jax.value_and_grad(lambda v, groups: span_contrast(v, groups, model.temperature), has_aux=True)
    return on_all(function, mesh, 2)(vectors, batch["groups"])

  def cotangent(towards):
    parts = {"vectors": model.contrast_weight * towards}
    if model.mlm_weight:
      parts |= {"nll": jnp.full((count,), model.mlm_weight / masked), "hits": jnp.zeros((count,))}
    return parts

  chunks = chunk_count(count, mesh.size, chunk, "span")
  passes = _Passes(model, mesh, key, chunks)
  if chunks == 1:
    outputs, pullback = passes.direct(state.trainable, spans)
    (value, metrics), towards = contrast(outputs["vectors"])
    gradient = pullback(cotangent(towards))
  elif model.contrast_weight:
    (value, metrics), towards = contrast(passes.vectors(state.trainable, spans))
    outputs, gradient = passes.again(state.trainable, spans, cotangent(towards))
  else:  # nothing pulls on the vectors, so that one pass does
    none = jnp.zeros((count, model.encoder.hidden_size))
    outputs, gradient = passes.again(state.trainable, spans, cotangent(none))
    (value, metrics), _ = contrast(outputs["vectors"])
  loss = model.contrast_weight * value
  metrics |= {"contrastive_loss": value, "tokens": jnp.sum(spans["lengths"]).astype(jnp.float32)}
  if model.mlm_weight:
    metrics["mlm_loss"] = jnp.sum(outputs["nll"]) / masked
    metrics["mlm_accuracy"] = jnp.sum(outputs["hits"]) / masked
    loss += model.mlm_weight * metrics["mlm_loss"]
  return loss, metrics, gradient


class _Passes:
  """The passes of a step over its spans, devices along 'data' each over their own."""

  def __init__(self, model: PretrainModel, mesh: Mesh, key: jax.Array, chunks: int):
    self.model, self.mesh, self.key, self.chunks = model, mesh, key, chunks

  def direct(self, trainable: Any, spans: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Outputs of all spans at once, and the function from their cotangents to the gradient."""
    run = on_data(lambda t, key, s: self.model.outputs(t, key, share_inner(s)), self.mesh, (WHOLE, WHOLE, ROWS), ROWS)
    outputs, pullback = jax.vjp(lambda trained: run(trained, self.key, spans), trainable)
    return outputs, lambda cotangents: pullback(cotangents)[0]

  def vectors(self, trainable: Any, spans: Any) -> jax.Array:
    """Vectors [S, H], chunk by chunk, without a gradient."""

    def forward(trained, key, spans):
      found = jax.lax.map(lambda chunk: self.model.vectors(trained, key, share_inner(chunk)), split(spans, self.chunks))
      return found.reshape(-1, found.shape[-1])

    return on_data(forward, self.mesh, (WHOLE, WHOLE, ROWS), ROWS)(trainable, self.key, spans)

  def again(self, trainable: Any, spans: Any, cotangents: Any) -> tuple[Any, Any]:
    """Outputs and the gradient, chunk by chunk."""

    def backward(trained, key, spans, cotangents):
      def add(total, chunk_and_cotangents):
        chunk, towards = jax.tree.map(share_inner, chunk_and_cotangents)
        outputs, pullback = jax.vjp(lambda t: self.model.outputs(t, key, chunk), trained)
        return jax.tree.map(jnp.add, total, pullback(towards)[0]), outputs

      zero = jax.tree.map(jnp.zeros_like, trained)
      total, outputs = jax.lax.scan(add, zero, split((spans, cotangents), self.chunks))
      outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
      return outputs, jax.lax.psum(total, "data")

    run = on_data(backward, self.mesh, (WHOLE, WHOLE, ROWS, ROWS), (ROWS, WHOLE))
    return run(trainable, self.key, spans, cotangents)


def span_contrast(vectors: jax.Array, groups: jax.Array, temperature: float) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Each span against all others of the batch; its partner is right, other spans of the same text don't count.

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
