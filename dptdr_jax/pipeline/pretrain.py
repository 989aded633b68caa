"""pretrain: the whole backbone by contrast between spans and masked language modelling, before it is frozen (RIP)."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import jax

from dptdr_jax import backbone as backbones
from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.store import Inputs, Kind, Making, Ref, neutral
from dptdr_jax.data.masking import Masking
from dptdr_jax.data.spans import SpanBatches, SpanLengths
from dptdr_jax.data.store import TokenStore, write_token_store
from dptdr_jax.models import convert, mlm
from dptdr_jax.models.dropout import Dropout
from dptdr_jax.pipeline import models, trials
from dptdr_jax.pipeline.models import BackboneInput, Compute
from dptdr_jax.pipeline.prepare import TextsInput, TokenizerInput
from dptdr_jax.pipeline.trials import DevInput
from dptdr_jax.retriever import Retriever
from dptdr_jax.runtime import hosts
from dptdr_jax.runtime import mesh as meshes
from dptdr_jax.settings import Pretrain, Text, Vector
from dptdr_jax.training import steps
from dptdr_jax.training.loop import Loop, Task
from dptdr_jax.training.state import TrainState, init_state

_log = logging.getLogger(__name__)

_STORED_TOKENS = 1024  # of a passage, from which spans are cut
_MANY_TWINS = 0.5  # share of passages both spans of which are the whole passage, from which a warning is due


class SpanTokensInputs(Inputs):
  """Tokens of a corpus with the starts of words."""

  texts: TextsInput
  separator: str
  tokenizer: TokenizerInput


class PretrainInputs(Inputs):
  """Pretraining of the backbone."""

  seed: int
  pretrain: Pretrain
  vector: Vector
  text: Text | None  # of the trial on dev; None: there is none
  compute: Compute
  dropout: float
  backbone: BackboneInput
  tokens: tuple[Ref, ...]
  dev: DevInput | None
  log_every: int = neutral(10)


def build_span_tokens(inputs: SpanTokensInputs, making: Making) -> None:
  """Writes a token store with words."""
  count, texts = inputs.texts.open(making, inputs.separator)
  options = {"max_tokens": _STORED_TOKENS, "words": True}
  write_token_store(texts, count, inputs.tokenizer.load(making), making.directory / "tokens", **options)


def build_pretrained(inputs: PretrainInputs, making: Making) -> None:
  """Trains, and writes backbone/ in Hugging Face layout with a manifest.json, and metrics.jsonl."""
  models.forget()  # its place is wanted for the state
  directory = inputs.backbone.directory(making)
  tensors = convert.load_backbone_tensors(directory)
  name = inputs.backbone.path or str(directory.resolve())
  # On the host: the state is a copy that is sharded, and a whole one beside it might not fit the devices.
  backbone = Backbone.from_tensors(name, directory, tensors, "float32", inputs.compute.fsdp, on_host=True)
  head = _head(backbone, tensors, needed=bool(inputs.pretrain.mlm_weight))
  stores = [TokenStore(making.path(ref) / "tokens") for ref in inputs.tokens]
  batches = _batches(inputs, stores, backbone)
  if making.team.is_main:
    _warn(inputs, backbone, stores, batches)
  loop = _loop(inputs, making, backbone, head, batches)
  loop.run()
  trained = hosts.fetch(loop.state.trainable)
  if making.team.is_main:
    _export(inputs, making, trained, loop, backbone, head, stores, batches)


SPAN_TOKENS = Kind("span_tokens", 1, build_span_tokens, together=False)
PRETRAIN = Kind("pretrain", 1, build_pretrained, chosen=True)


def _batches(inputs: PretrainInputs, stores: list[TokenStore], backbone: Backbone) -> SpanBatches:
  wanted = inputs.pretrain
  masking = Masking.of(backbone.tokenizer) if wanted.mlm_weight else None
  lengths = SpanLengths(wanted.span_tokens, wanted.short_share, wanted.overlap)
  return SpanBatches(stores, lengths, masking, batch_size=wanted.spans, seed=inputs.seed, neighbours=wanted.neighbours,
                     host=hosts.TEAM.index, num_hosts=hosts.TEAM.count)  # fmt: skip


def _loop(inputs: PretrainInputs, making: Making, backbone: Backbone, head: Any | None, batches: SpanBatches) -> Loop:
  wanted, dtype = inputs.pretrain, inputs.compute.dtype
  model = steps.pretrain_model(backbone.config, inputs.vector, wanted, dropout=inputs.dropout, compute_dtype=dtype)
  mesh = meshes.make_mesh(fsdp=inputs.compute.fsdp)
  count = wanted.steps or math.ceil(wanted.epochs * batches.steps_per_epoch)
  optimizer = steps.optimizer(wanted, count)

  def first_state(params):
    return init_state(model.init_trainable(jax.random.key(inputs.seed), params, head), optimizer)

  abstract = jax.eval_shape(first_state, backbone.params)
  step, shardings = steps.pretrain_step(model, optimizer, abstract, chunk=wanted.chunk, seed=inputs.seed, mesh=mesh)
  params = meshes.place(backbone.params, shardings.trainable["backbone"])

  def candidate(state: TrainState) -> Retriever:
    compute = dataclasses.replace(backbone, compute_dtype=backbones.resolve_dtype(dtype))
    tuned = compute.with_params(hosts.fetch(state.trainable["backbone"]))
    return Retriever.untuned(tuned, **inputs.vector.model_dump(), **inputs.text.model_dump())

  task = Task(
    "pretrain", lambda state, batch: step(state, meshes.put_batch(batch, mesh, whole=("groups",))), candidate,
    attempt=trials.of_retriever(inputs.dev, making, inputs.seed), tries_first=True,
  )  # fmt: skip
  return Loop(
    task, jax.jit(first_state, out_shardings=shardings)(params), batches, making.directory, count,
    log_every=inputs.log_every, checkpoint_every=wanted.checkpoint_every, evaluate_every=wanted.evaluate_every,
    on_checkpoint=lambda step: making.checkpoint(),
  )  # fmt: skip


def _export(
  inputs: PretrainInputs, making: Making, trained: dict, loop: Loop, parent: Backbone, head: Any | None,
  stores: list[TokenStore], batches: SpanBatches,
) -> None:  # fmt: skip
  """Writes the backbone, with its language-model head if it has one, and what it was made from."""
  with files.atomic_directory(making.directory / "backbone") as partial:
    head = trained.get("mlm_head", head)
    made = backbones.export(partial, trained["backbone"], parent.config, parent.tokenizer, head)
    corpora = zip(inputs.tokens, stores, batches.counts(), batches.position(loop.steps), strict=True)
    about = {
      "hash": made,
      "parent": {"path": parent.path, "hash": parent.hash},
      "tokenizer": parent.tokenizer.hash,
      "seed": inputs.seed,
      "steps": loop.steps,
      "spans": inputs.pretrain.spans,
      "tokens": loop.progress.tokens,
      "corpora": [
        {"name": name, "key": ref.key, "passages": kinds, "truncated": _truncated(store), **position}
        for name, (ref, store, kinds, position) in zip(inputs.pretrain.corpora, corpora, strict=True)
      ],
    }
    files.write_json(partial / "manifest.json", about)


def _warn(inputs: PretrainInputs, backbone: Backbone, stores: list[TokenStore], batches: SpanBatches) -> None:
  """Warns where spans are the whole passage twice, and where passages were cut."""
  own = Dropout(backbone.config.hidden_dropout, backbone.config.attention_dropout)
  rates = steps.backbone_dropout(inputs.dropout) or own
  alike = not (inputs.pretrain.mlm_weight or rates.hidden or rates.attention)
  for name, store, kinds in zip(inputs.pretrain.corpora, stores, batches.counts(), strict=True):
    twins, number = kinds["twins"], sum(kinds.values())
    if alike and twins:
      _log.warning("%s: both spans of %d of %d passages are the whole text unless one is drawn short, and nothing "
                   "tells them apart: set pretrain.mlm_weight or backbone.dropout above 0", name, twins,
                   number)  # fmt: skip
    elif twins > _MANY_TWINS * number:
      _log.warning("%s: %d of %d passages are so short that both of their spans are the whole text, unless one is "
                   "drawn short (pretrain.span_tokens, .overlap)", name, twins, number)  # fmt: skip
    if cut := _truncated(store):
      _log.warning("%s: %d of %d passages have %d tokens or more; spans come from the first %d", name, cut, len(store),
                   store.max_tokens, store.max_tokens)  # fmt: skip


def _truncated(store: TokenStore) -> int:
  """How many passages have as many tokens as are stored at most: they were cut there, or are exactly as long."""
  return int((store.lengths == store.max_tokens).sum())


def _head(backbone: Backbone, tensors: dict, needed: bool) -> Any | None:
  """The checkpoint's language-model head; None where it has none, or one that we cannot train and `needed` is False."""
  try:
    return mlm.head_from_huggingface(tensors, backbone.config, backbone.path)
  except InputError:
    if needed:
      raise
    return None
