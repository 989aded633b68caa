"""pretrain: the whole backbone by contrast between spans and masked language modelling, before it is frozen."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import math
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dptdr_jax import backbone as backbones
from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files, preemption, progress
from dptdr_jax.core.errors import DptdrError
from dptdr_jax.data.masking import Masking
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.data.spans import SpanBatches, SpanLengths
from dptdr_jax.data.store import TokenStore, write_token_store
from dptdr_jax.models import convert, mlm
from dptdr_jax.retriever import Retriever
from dptdr_jax.runtime import mesh as meshes
from dptdr_jax.runtime.checkpoints import Checkpoints
from dptdr_jax.runtime.metrics import MetricWriter
from dptdr_jax.runtime.shardings import state_shardings
from dptdr_jax.stages import common, corpora
from dptdr_jax.stages.layout import Layout
from dptdr_jax.stages.trial import DevTrial
from dptdr_jax.training.optimizer import make_optimizer, make_schedule
from dptdr_jax.training.pretrain import make_pretrain_step
from dptdr_jax.training.state import TrainState, init_state

_log = logging.getLogger(__name__)

_BUDGET_SAMPLE = 8  # batches whose tokens say how many steps a token budget is


def run(config: ConfigDict, workdir: files.Path) -> None:
  """Writes DIR/pretrain/backbone (Hugging Face layout, manifest.json), metrics.jsonl and checkpoints."""
  layout = Layout.of(workdir)
  directory = common.base_directory(config, layout)
  tensors = convert.load_backbone_tensors(directory)
  named = config.backbone.path or str(layout.scratch)
  backbone = Backbone.from_tensors(named, directory, tensors, "float32")
  # On the host: the state is a copy that is sharded, and a whole one beside it might not fit the devices.
  backbone = dataclasses.replace(backbone, params=jax.device_get(backbone.params))
  stores = _stores(config, layout, backbone)
  batches = make_batches(config, stores, backbone)
  loop = Loop.build(config, backbone, tensors, steps_of(config, batches))
  trial = DevTrial.build(config, layout, PreparedData(layout.prepared), config.pretrain.evaluate_every)
  checkpoints = Checkpoints(layout.pretrain / "checkpoints", keep=config.pretrain.keep_checkpoints)
  try:
    loop.train(batches, checkpoints, trial, layout.pretrain)
  finally:
    checkpoints.close()
  _export(config, layout, loop, stores, batches)


def make_batches(config: ConfigDict, stores: list[TokenStore], backbone: Backbone) -> SpanBatches:
  """The batches of spans: a function of (seed, step)."""
  pretrain = config.pretrain
  masking = Masking.of(backbone.tokenizer, pretrain.mask_rate) if pretrain.mlm_weight else None
  lengths = SpanLengths(pretrain.span_tokens, pretrain.shortest, pretrain.short_share)
  return SpanBatches(stores, pretrain.weights, lengths, masking, batch_size=pretrain.spans, seed=config.seed)


def steps_of(config: ConfigDict, batches: SpanBatches) -> int:
  """Steps of the run: given, or from a budget of tokens, or from epochs."""
  pretrain = config.pretrain
  if pretrain.steps:
    return pretrain.steps
  if pretrain.tokens:
    return math.ceil(pretrain.tokens / np.mean([batches[step]["lengths"].sum() for step in range(_BUDGET_SAMPLE)]))
  return math.ceil(pretrain.epochs * batches.steps_per_epoch)


def _stores(config: ConfigDict, layout: Layout, backbone: Backbone) -> list[TokenStore]:
  """A token store with words for each corpus; what is there is not written again."""
  stores = []
  for number, corpus in enumerate(corpora.open_corpora(config, layout)):
    path = layout.pretrain / "tokens" / str(number)
    options = {"max_tokens": config.pretrain.max_stored_tokens, "words": True}
    stores.append(write_token_store(corpus.texts, corpus.count(), backbone.tokenizer, path, **options))
  return stores


def _export(config: ConfigDict, layout: Layout, loop: Loop, stores: list[TokenStore], batches: SpanBatches) -> None:
  """Writes the backbone, with its language-model head if it has one, and what it was made from."""
  trained = jax.device_get(loop.state.trainable)
  parent = loop.backbone
  with files.atomic_directory(layout.pretrained) as partial:
    made = backbones.export(partial, trained["backbone"], parent.config, parent.tokenizer, trained.get("mlm_head"))
    kinds = batches.counts()
    about = {
      "hash": made,
      "parent": {"path": parent.path, "hash": parent.hash},
      "tokenizer": parent.tokenizer.hash,
      "seed": config.seed,
      "steps": loop.steps,
      "spans": config.pretrain.spans,
      "corpora": [
        {"name": name, "sha256": _hash(store), "passages": kind, **position}
        for name, store, kind, position in zip(
          config.pretrain.corpora, stores, kinds, batches.position(loop.steps), strict=True
        )
      ],
    }
    files.write_json(partial / "manifest.json", about)


def _hash(store: TokenStore) -> str:
  """SHA-256 over a corpus as it was read: its tokens, and where passages and words begin."""
  parts = (files.sha256(store.path / name) for name in ("tokens.bin", "offsets.npy", "words.bin"))
  return hashlib.sha256("".join(parts).encode()).hexdigest()


@dataclasses.dataclass
class Loop:
  """One run of pretraining: its step function, its state, and what it writes as it goes."""

  config: ConfigDict
  backbone: Backbone
  mesh: jax.sharding.Mesh
  step_function: Any
  state: TrainState
  steps: int
  seen: float = 0.0  # tokens since the clock was started
  clock: float = 0.0

  @classmethod
  def build(cls, config: ConfigDict, backbone: Backbone, tensors: dict, steps: int) -> Loop:
    """Makes the jitted step and the first state, sharded over the mesh; the head is the checkpoint's or a fresh one."""
    pretrain = config.pretrain
    model = common.pretrain_model(config, backbone.config)
    mesh = meshes.make_mesh(fsdp=pretrain.fsdp)
    optimizer = make_optimizer(
      make_schedule(pretrain.learning_rate, steps, warmup=pretrain.warmup, decay=pretrain.schedule),
      clip=pretrain.clip, weight_decay=pretrain.weight_decay,
    )  # fmt: skip
    head = mlm.head_from_huggingface(tensors, backbone.config, backbone.path) if pretrain.mlm_weight else None
    state = init_state(model.init_trainable(jax.random.key(config.seed), backbone.params, head), optimizer)
    shardings = state_shardings(state, mesh)
    options = {"seed": config.seed, "chunk": pretrain.chunk, "mesh": mesh, "shardings": shardings}
    return cls(
      config, backbone, mesh, make_pretrain_step(model, optimizer, **options), jax.device_put(state, shardings), steps
    )

  def train(self, batches: SpanBatches, checkpoints: Checkpoints, trial: DevTrial | None, directory) -> None:
    """Runs from the newest checkpoint to the last step."""
    pretrain = self.config.pretrain
    first = checkpoints.latest() or 0
    if first:
      self.state, _ = checkpoints.restore(first, self.state)
      _log.info("pretraining goes on after step %d", first)
    writer = MetricWriter(directory, first)
    waiting: collections.deque = collections.deque()  # metrics are fetched one step behind, so the devices never wait
    self.clock = time.monotonic()
    with progress.bar("pretrain", self.steps, "step", initial=first) as shown:
      for step, batch in enumerate(batches.load(first, self.steps, pretrain.loader_workers), first + 1):
        self.state, metrics = self.step_function(self.state, meshes.put_batch(batch, self.mesh, whole=("groups",)))
        waiting.append((step, metrics))
        if len(waiting) > 1:
          self._record(writer, shown, *waiting.popleft())
        shown.advance()
        tried = trial is not None and (step % pretrain.evaluate_every == 0 or step == self.steps)
        saved = step % pretrain.checkpoint_every == 0 or step == self.steps or preemption.asked()
        if tried or saved:
          while waiting:  # nothing that is not finite is ever kept
            self._record(writer, shown, *waiting.popleft())
        if tried:
          figures = trial.evaluate(self.retriever())
          writer.write(step, {f"dev/{name}": value for name, value in figures.items()})
          self.seen, self.clock = 0.0, time.monotonic()
        if saved:
          checkpoints.save(step, self.state, {"corpora": batches.position(step)})
        if preemption.asked():
          checkpoints.wait()
          preemption.check(f"pretraining stands at step {step} of {self.steps}")
    checkpoints.wait()
    writer.close()

  def retriever(self) -> Retriever:
    """The backbone as it is, untuned."""
    compute = dataclasses.replace(self.backbone, compute_dtype=backbones.resolve_dtype(self.config.compute_dtype))
    params = jax.tree.map(np.asarray, self.state.trainable["backbone"])
    return Retriever.untuned(compute.with_params(params), **self.config.vector, **self.config.text)

  def _record(self, writer: MetricWriter, shown: progress.Bar, step: int, metrics: dict) -> None:
    figures = {name: float(value) for name, value in metrics.items()}
    if not math.isfinite(figures["loss"]) or not math.isfinite(figures["gradient_norm"]):
      raise DptdrError(
        f"step {step}: loss {figures['loss']:g}, gradient norm {figures['gradient_norm']:g}. The last checkpoint is "
        "whole. Try a lower pretrain.learning_rate, a longer pretrain.warmup, a higher pretrain.temperature or float32"
      )
    self.seen += figures.pop("tokens")
    if step % self.config.pretrain.log_every == 0 or step == self.steps:
      now = time.monotonic()
      figures["tokens_per_second"] = self.seen / max(now - self.clock, 1e-9)
      self.seen, self.clock = 0.0, now
      writer.write(step, figures)
      shown.note(loss=f"{figures['loss']:.3f}", accuracy=f"{figures['accuracy']:.3f}")
