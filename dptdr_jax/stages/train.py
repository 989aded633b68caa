"""train: prompts (or all weights) by contrast, resumed from the newest checkpoint, the best on dev kept."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files, preemption, progress
from dptdr_jax.core.errors import DptdrError
from dptdr_jax.data.batches import TrainBatches
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.retriever import Retriever
from dptdr_jax.runtime import mesh as meshes
from dptdr_jax.runtime.checkpoints import Checkpoints
from dptdr_jax.runtime.metrics import MetricWriter
from dptdr_jax.stages import common
from dptdr_jax.stages.layout import Layout
from dptdr_jax.stages.trial import DevTrial
from dptdr_jax.training.contrastive import make_train_step
from dptdr_jax.training.optimizer import make_optimizer, make_schedule
from dptdr_jax.training.state import TrainState, init_state
from dptdr_jax.training.towers import TowerModel

_log = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: files.Path, number: int = 1) -> None:
  """Trains round `number` and writes DIR/trainN/retriever, metrics.jsonl and checkpoints."""
  layout = Layout.of(workdir)
  directory = layout.train(number)
  data = PreparedData(layout.prepared)
  backbone = common.load_backbone(config, layout)
  batches = common.train_batches(config, layout, data, number)
  steps = config.train.steps or math.ceil(config.train.epochs * batches.steps_per_epoch)
  loop = Loop.build(config, backbone, steps, common.frequent_tokens(config, layout))
  checkpoints = Checkpoints(directory / "checkpoints", keep=config.train.keep_checkpoints)
  trial = DevTrial.build(config, layout, data, config.train.evaluate_every)
  try:
    loop.train(batches, checkpoints, trial, directory)
  finally:
    checkpoints.close()


@dataclasses.dataclass
class Loop:
  """One training run: its step function, its state, and what it writes as it goes."""

  config: ConfigDict
  backbone: Backbone
  model: TowerModel
  mesh: jax.sharding.Mesh
  step_function: Any
  state: TrainState
  steps: int

  @classmethod
  def build(cls, config: ConfigDict, backbone: Backbone, steps: int, word_ids: np.ndarray | None) -> Loop:
    """Makes the jitted step and the first state, replicated on the mesh; prompts may start from `word_ids`."""
    train = config.train
    model = TowerModel(
      backbone.config, common.prompt_spec(config), config.vector.pooling, config.vector.normalize,
      compute_dtype=backbone.compute_dtype, dropout=common.backbone_dropout(config),
    )  # fmt: skip
    mesh = meshes.make_mesh()
    optimizer = make_optimizer(
      make_schedule(train.learning_rate, steps, warmup=train.warmup, decay=train.schedule),
      clip=train.clip, weight_decay=train.weight_decay,
    )  # fmt: skip
    step_function = make_train_step(
      model, optimizer, seed=config.seed, query_chunk=train.query_chunk, passage_chunk=train.passage_chunk,
      temperature=config.vector.temperature, both_directions=train.both_directions, mesh=mesh,
    )  # fmt: skip
    key = jax.random.key(config.seed)
    tied = config.prompt.tied or config.prompt.kind == "none"
    trainable = model.init_trainable(key, backbone.params, tied=tied, word_ids=word_ids)
    state = jax.device_put(init_state(trainable, optimizer), meshes.replicated(mesh))
    return cls(config, backbone, model, mesh, step_function, state, steps)

  def train(self, batches: TrainBatches, checkpoints: Checkpoints, trial: DevTrial | None, directory) -> None:
    """Runs from the newest checkpoint to the last step, then writes the retriever that is kept."""
    train = self.config.train
    first = checkpoints.latest() or 0
    best = {"step": 0, "value": -math.inf}
    if first:
      self.state, best = checkpoints.restore(first, self.state)
      _log.info("training goes on after step %d", first)
    writer = MetricWriter(directory, first)
    waiting: collections.deque = collections.deque()  # metrics are fetched one step behind, so the devices never wait

    with progress.bar("train", self.steps, "step", initial=first) as shown:
      for step, batch in enumerate(batches.load(first, self.steps, train.loader_workers), first + 1):
        self.state, metrics = self.step_function(self.state, self.backbone.params, meshes.put_batch(batch, self.mesh))
        waiting.append((step, metrics))
        if len(waiting) > 1:
          self._record(writer, shown, *waiting.popleft())
        shown.advance()
        tried = trial is not None and (step % train.evaluate_every == 0 or step == self.steps)
        saved = step % train.checkpoint_every == 0 or step == self.steps or preemption.asked()
        if tried or saved:
          while waiting:  # nothing that is not finite is ever kept
            self._record(writer, shown, *waiting.popleft())
        if tried:
          best = self._try(trial, writer, step, best, directory)
        if saved:
          checkpoints.save(step, self.state, best)
        if preemption.asked():
          checkpoints.wait()
          preemption.check(f"training stands at step {step} of {self.steps}")
    checkpoints.wait()
    writer.close()
    if trial is None:
      self.retriever().save(directory / "retriever")

  def retriever(self) -> Retriever:
    """The retriever of the state as it is."""
    trainable = jax.tree.map(np.asarray, self.state.trainable)
    return common.make_retriever(self.config, self.backbone, self.model.prompt, trainable)

  def _try(self, trial: DevTrial, writer: MetricWriter, step: int, best: dict, directory) -> dict:
    """Evaluates on dev and keeps the retriever if it is the best so far. Repeated after a kill, it does the same."""
    retriever = self.retriever()
    figures = trial.evaluate(retriever)
    writer.write(step, {f"dev/{name}": value for name, value in figures.items()})
    value = figures[self.config.train.select_by]
    if value > best["value"]:
      retriever.save(directory / "retriever")
      return {"step": step, "value": value}
    return best

  def _record(self, writer: MetricWriter, shown: progress.Bar, step: int, metrics: dict) -> None:
    figures = {name: float(value) for name, value in metrics.items()}
    if not math.isfinite(figures["loss"]) or not math.isfinite(figures["gradient_norm"]):
      raise DptdrError(
        f"step {step}: loss {figures['loss']:g}, gradient norm {figures['gradient_norm']:g}. The last checkpoint is "
        "whole. Try a lower train.learning_rate, a longer train.warmup, a higher vector.temperature or float32"
      )
    if step % self.config.train.log_every == 0 or step == self.steps:
      writer.write(step, figures)
      shown.note(loss=f"{figures['loss']:.3f}", accuracy=f"{figures['accuracy']:.3f}")
