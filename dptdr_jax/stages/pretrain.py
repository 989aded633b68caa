"""pretrain: the whole backbone by contrast between spans and masked language modelling, before it is frozen."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dptdr_jax import backbone as backbones
from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.masking import Masking, check_rate
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.data.spans import SpanBatches, SpanLengths, check_weights
from dptdr_jax.data.store import TokenStore, write_token_store
from dptdr_jax.data.tokenizer import Tokenizer
from dptdr_jax.data.vocabulary import LEAST
from dptdr_jax.models import convert, mlm
from dptdr_jax.models.dropout import Dropout
from dptdr_jax.models.prompts import PromptSpec, check_lengths
from dptdr_jax.retriever import Retriever
from dptdr_jax.runtime import hosts
from dptdr_jax.runtime import mesh as meshes
from dptdr_jax.runtime.checkpoints import Checkpoints
from dptdr_jax.runtime.shardings import by_rules
from dptdr_jax.stages import common, corpora, scratch, steps
from dptdr_jax.stages.layout import Layout
from dptdr_jax.stages.loop import Loop
from dptdr_jax.stages.trial import DevTrial
from dptdr_jax.training.chunks import chunk_count
from dptdr_jax.training.state import init_state

_log = logging.getLogger(__name__)

# The fields of config.pretrain that the token stores of its corpora depend on.
OF_TOKENS = ("corpora", "max_stored_tokens", "tokenizer", "vocabulary", "shape")
_MANY_TWINS = 0.5  # share of passages both spans of which are the whole passage, from which on a warning is due
_BUDGET_SAMPLE = 8  # batches whose tokens say how many steps a token budget is
_ROBERTA_SPECIAL = 2  # tokens around a text, as the tokenizer that is trained puts them


def run(config: ConfigDict, workdir: files.Path) -> None:
  """Writes DIR/pretrain/backbone (Hugging Face layout, manifest.json), metrics.jsonl and checkpoints."""
  layout = Layout.of(workdir)
  directory = common.base_directory(config, layout)
  tensors = convert.load_backbone_tensors(directory)
  named = str(layout.scratch) if scratch.is_wanted(config) else config.backbone.path
  # On the host: the state is a copy that is sharded, and a whole one beside it might not fit the devices.
  backbone = Backbone.from_tensors(named, directory, tensors, "float32", config.fsdp, on_host=True)
  head = _head(backbone, tensors, needed=bool(config.pretrain.mlm_weight))
  trial = DevTrial.build(config, layout, PreparedData(layout.prepared), config.pretrain.evaluate_every)
  stores = _stores(config, layout, backbone)
  batches = make_batches(config, stores, backbone)
  if hosts.is_main():
    _warn_of_twins(config, backbone, batches)
  loop = PretrainLoop(config, backbone, head, steps_of(config, batches), batches, trial)
  checkpoints = Checkpoints(layout.pretrain / "checkpoints", keep=config.pretrain.keep_checkpoints)
  try:
    loop.run(batches, checkpoints, layout.pretrain)
  finally:
    checkpoints.close()
  _export(config, layout, loop, stores, batches)


def _warn_of_twins(config: ConfigDict, backbone: Backbone, batches: SpanBatches) -> None:
  """Where spans are the whole passage twice: too often, or with nothing that tells them apart."""
  own = Dropout(backbone.config.hidden_dropout, backbone.config.attention_dropout)
  rates = steps.dropout(config.pretrain.dropout) or own
  alike = not (config.pretrain.mlm_weight or rates.hidden or rates.attention)
  for name, kinds in zip(config.pretrain.corpora, batches.counts(), strict=True):
    twins, number = kinds["twins"], sum(kinds.values())
    if alike and twins:
      _log.warning("%s: both spans of %d of %d passages are the whole text unless one is drawn short, and nothing else "
                   "tells them apart: set pretrain.mlm_weight or .dropout above 0", name, twins, number)  # fmt: skip
    elif twins > _MANY_TWINS * number:
      _log.warning("%s: %d of %d passages are so short that both of their spans are the whole text, unless one is "
                   "drawn short (pretrain.span_tokens, .shortest, .overlap)", name, twins, number)  # fmt: skip


def check(config: ConfigDict) -> None:
  """Raises InputError for what can be known to fail before any work is done."""
  pretrain, encoder = config.pretrain, common.encoder_config(config)
  check_lengths(encoder, PromptSpec(kind="none"), pretrain.span_tokens)
  steps.pretrain_model(config, encoder)
  if not any((pretrain.steps, pretrain.tokens, pretrain.epochs)):
    raise InputError("pretraining has no steps", fix="Set one of pretrain.steps, .tokens, .epochs above 0")
  steps.check_optimizer(pretrain)
  if scratch.is_wanted(config) and pretrain.vocabulary < LEAST:
    raise InputError(f"a byte-level pretrain.vocabulary has at least {LEAST} ids", value=pretrain.vocabulary)
  if not pretrain.corpora:
    raise InputError("pretrain.corpora is empty", fix=f"Name '{corpora.OWN}' (this run's own), files, or other runs")
  corpora.outside_files(config)
  check_weights(pretrain.weights, len(pretrain.corpora))
  if pretrain.neighbours < 1:
    raise InputError("pretrain.neighbours must be at least 1", value=pretrain.neighbours)
  if pretrain.mlm_weight:
    check_rate(pretrain.mask_rate)
  special = _ROBERTA_SPECIAL
  if not scratch.is_wanted(config):
    tokenizer = Tokenizer(backbones.locate(config.backbone.path))
    special = len(tokenizer.prefix) + len(tokenizer.suffix)
    if pretrain.mlm_weight:
      Masking.of(tokenizer, pretrain.mask_rate)
  SpanLengths(pretrain.span_tokens, pretrain.shortest, pretrain.short_share).text(special)


def check_devices(config: ConfigDict) -> None:
  """Raises InputError where the devices that are here cannot share weights or spans."""
  pretrain, encoder = config.pretrain, common.encoder_config(config)
  mesh = meshes.make_mesh(fsdp=pretrain.fsdp)
  by_rules(convert.abstract_params(encoder, np.float32), mesh)
  devices = mesh.size
  if pretrain.spans < 4 or pretrain.spans % (2 * hosts.process_count()) or pretrain.spans % devices:
    raise InputError(
      f"pretrain.spans must be pairs that {hosts.process_count()} processes and {devices} devices can share evenly",
      value=pretrain.spans,
    )  # fmt: skip
  chunk_count(pretrain.spans, devices, pretrain.chunk, "span")


def make_batches(config: ConfigDict, stores: list[TokenStore], backbone: Backbone) -> SpanBatches:
  """The batches of spans: a function of (seed, step)."""
  pretrain = config.pretrain
  masking = Masking.of(backbone.tokenizer, pretrain.mask_rate) if pretrain.mlm_weight else None
  lengths = SpanLengths(pretrain.span_tokens, pretrain.shortest, pretrain.short_share, pretrain.overlap)
  return SpanBatches(stores, pretrain.weights, lengths, masking, batch_size=pretrain.spans, seed=config.seed,
    neighbours=pretrain.neighbours, host=hosts.process_index(), num_hosts=hosts.process_count(),
  )  # fmt: skip


def steps_of(config: ConfigDict, batches: SpanBatches) -> int:
  """Steps of the run: given, or from a budget of tokens, or from epochs."""
  pretrain = config.pretrain
  if pretrain.steps:
    return pretrain.steps
  if pretrain.tokens:
    return math.ceil(pretrain.tokens / np.mean([batches.tokens(step) for step in range(_BUDGET_SAMPLE)]))
  return math.ceil(pretrain.epochs * batches.steps_per_epoch)


def _stores(config: ConfigDict, layout: Layout, backbone: Backbone) -> list[TokenStore]:
  """A token store with words for each corpus; what is there is not written again."""
  stores = []
  for number, corpus in enumerate(corpora.open_corpora(config, layout)):
    path = layout.pretrain / "tokens" / str(number)
    options = {"max_tokens": config.pretrain.max_stored_tokens, "words": True}
    with hosts.first_goes_first(f"tokens of {corpus.name}"):
      store = write_token_store(corpus.texts, corpus.count(), backbone.tokenizer, path, **options)
    if (cut := _truncated(store)) and hosts.is_main():
      _log.warning("%s: %d of %d passages have %d tokens or more; spans come from the first so many alone "
                   "(pretrain.max_stored_tokens)", corpus.name, cut, len(store), store.max_tokens)  # fmt: skip
    stores.append(store)
  return stores


def _truncated(store: TokenStore) -> int:
  """How many passages have as many tokens as are stored at most: they were cut there, or are exactly as long."""
  return int(np.count_nonzero(store.lengths == store.max_tokens))


def _export(
  config: ConfigDict, layout: Layout, loop: PretrainLoop, stores: list[TokenStore], batches: SpanBatches
) -> None:
  """Writes the backbone, with its language-model head if it has one, and what it was made from."""
  trained = hosts.fetch(loop.state.trainable)
  if not hosts.is_main():
    return
  parent = loop.backbone
  with files.atomic_directory(layout.pretrained) as partial:
    head = trained.get("mlm_head", loop.head)
    made = backbones.export(partial, trained["backbone"], parent.config, parent.tokenizer, head)
    kinds = batches.counts()
    about = {
      "hash": made,
      "parent": {"path": parent.path, "hash": parent.hash},
      "tokenizer": parent.tokenizer.hash,
      "seed": config.seed,
      "steps": loop.steps,
      "spans": config.pretrain.spans,
      "tokens": loop.tokens,
      "corpora": [
        {"name": name, "sha256": _hash(store), "passages": kind, "truncated": _truncated(store), **position}
        for name, store, kind, position in zip(
          config.pretrain.corpora, stores, kinds, batches.position(loop.steps), strict=True
        )
      ],
    }
    files.write_json(partial / "manifest.json", about)


def _head(backbone: Backbone, tensors: dict, needed: bool) -> Any | None:
  """The checkpoint's language-model head; None where it has none, or one that we cannot train and `needed` is False."""
  try:
    return mlm.head_from_huggingface(tensors, backbone.config, backbone.path)
  except InputError:
    if needed:
      raise
    return None


def _hash(store: TokenStore) -> str:
  """SHA-256 over a corpus as it was read: its tokens, and where passages and words begin."""
  parts = (files.sha256(store.path / name) for name in ("tokens.bin", "offsets.npy", "words.bin"))
  return hashlib.sha256("".join(parts).encode()).hexdigest()


class PretrainLoop(Loop):
  """The whole backbone by spans, full parameters, sharded.

  Attributes:
    tokens: trained on in the steps done so far, special ones included, padding not.
  """

  temperature = "pretrain.temperature"

  def __init__(
    self,
    config: ConfigDict,
    backbone: Backbone,
    head: Any | None,
    num_steps: int,
    batches: SpanBatches,
    trial: DevTrial | None,
  ):
    """Makes the jitted step and the first state, sharded over the mesh; `head`: the checkpoint's, None for a fresh one.

    Without masked language modelling the head is not trained; what the checkpoint had is kept beside for the export.
    """
    pretrain = config.pretrain
    self.backbone, self.head = backbone, head
    self._config, self._trial, self._batches = config, trial, batches
    model = steps.pretrain_model(config, backbone.config)
    self._mesh = meshes.make_mesh(fsdp=pretrain.fsdp)
    optimizer = steps.optimizer(pretrain, num_steps)

    def first_state(params):
      return init_state(model.init_trainable(jax.random.key(config.seed), params, head), optimizer)

    abstract = jax.eval_shape(first_state, backbone.params)
    self._step, shardings = steps.pretrain_step(config, model, optimizer, abstract, self._mesh)
    params = meshes.place(backbone.params, shardings.trainable["backbone"])
    state = jax.jit(first_state, out_shardings=shardings)(params)
    super().__init__("pretrain", pretrain, num_steps, state, trial is not None)
    self.tries_first = self.tries  # what pretraining gives shows beside what was there
    self.tokens = 0
    self._seen, self._clock = 0, None  # tokens since the clock was started, after a step: the first one compiles

  def step(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    self.state, metrics = self._step(self.state, meshes.put_batch(batch, self._mesh, whole=("groups",)))
    return metrics

  def candidate(self) -> Retriever:
    return self.retriever()

  def attempt(self, step: int, candidate: Retriever) -> Mapping[str, float]:
    figures = self._trial.evaluate(candidate)
    self._seen, self._clock = 0, None
    return figures

  def metadata(self, step: int) -> dict:
    return {"corpora": self._batches.position(step), "tokens": self.tokens}

  def restored(self, metadata: Mapping[str, Any]) -> None:
    here = self._batches.position(int(self.state.step))
    if metadata["corpora"] != here:
      raise InputError("a checkpoint stands at another place of the corpora than its step does in this version",
                       value=(metadata["corpora"], here), fix="Remove the run's pretrain/checkpoints")  # fmt: skip
    self.tokens = metadata["tokens"]

  def figures(self, metrics: Mapping[str, float], written: bool) -> dict[str, float]:
    found = dict(metrics)
    tokens = int(found.pop("tokens"))
    self.tokens += tokens
    now = time.monotonic()
    if self._clock is None:
      self._clock = now
      return found
    self._seen += tokens
    if written:
      found["tokens_per_second"] = self._seen / max(now - self._clock, 1e-9)
      self._seen, self._clock = 0, now
    return found

  def retriever(self) -> Retriever:
    """The backbone as it is, untuned."""
    compute = dataclasses.replace(self.backbone, compute_dtype=backbones.resolve_dtype(self._config.compute_dtype))
    params = hosts.fetch(self.state.trainable["backbone"])
    return Retriever.untuned(compute.with_params(params), **self._config.vector, **self._config.text)
