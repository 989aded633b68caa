"""train: prompts (or all weights) by contrast, resumed from the newest checkpoint, the best on dev kept."""

from __future__ import annotations

import logging
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.retriever import Retriever
from dptdr_jax.runtime import hosts
from dptdr_jax.runtime import mesh as meshes
from dptdr_jax.runtime.checkpoints import Checkpoints
from dptdr_jax.stages import common, steps
from dptdr_jax.stages.generations import Generations
from dptdr_jax.stages.layout import Layout
from dptdr_jax.stages.loop import Loop
from dptdr_jax.stages.trial import DevTrial
from dptdr_jax.training.state import init_state

_log = logging.getLogger(__name__)


def check_devices(config: ConfigDict) -> None:
  """Raises InputError where the devices that are here cannot share a batch in chunks."""
  train = config.train
  steps.check_chunk(config, "train.query_chunk", train.queries)
  steps.check_chunk(config, "train.passage_chunk", train.queries * train.passages)


def run(config: ConfigDict, workdir: files.Path, number: int = 1) -> None:
  """Trains round `number` and writes DIR/trainN/retriever, metrics.jsonl and checkpoints."""
  layout = Layout.of(workdir)
  directory = layout.train(number)
  data = PreparedData(layout.prepared)
  backbone = common.load_backbone(config, layout)
  groups = generations = None
  if config.train.refresh_every:
    groups = generations = Generations(config, layout, data, number, backbone)
  batches = common.train_batches(config, layout, data, number, groups)
  num_steps = config.train.steps or math.ceil(config.train.epochs * batches.steps_per_epoch)
  if config.train.refresh_every >= num_steps:
    _log.warning("train.refresh_every is %d, and there are %d steps: no generation takes effect",
                 config.train.refresh_every, num_steps)  # fmt: skip
  trial = DevTrial.build(config, layout, data, config.train.evaluate_every)
  before = None
  if number > 1 and not config.train.restart:
    before = common.trained(config, layout, number - 1, backbone)
  words = common.frequent_tokens(config, layout)
  weights = None
  if config.prompt.kind == "none" and backbone.compute_dtype != "float32":
    weights = common.exact_weights(config, layout)
  loop = TrainLoop(config, backbone, num_steps, words, trial, directory, before, generations, weights)
  checkpoints = Checkpoints(directory / "checkpoints", keep=config.train.keep_checkpoints)
  try:
    loop.run(batches, checkpoints, directory)
  finally:
    if generations is not None:
      generations.close()
    checkpoints.close()
  if trial is None:
    last = loop.retriever()  # of all processes, where weights are divided
    if hosts.is_main():
      last.save(directory / "retriever")


class TrainLoop(Loop):
  """Prompts (or all weights) by contrast; the retriever that is best on dev is kept."""

  temperature = "vector.temperature"

  def __init__(
    self, config: ConfigDict, backbone: Backbone, num_steps: int, word_ids: np.ndarray | None, trial: DevTrial | None,
    directory: pathlib.Path, before: Retriever | None = None, generations: Generations | None = None,
    weights: Any = None,
  ):  # fmt: skip
    """Makes the jitted step and the first state, on the mesh.

    Prompts may start from `word_ids`, or from those of the retriever `before`; `generations` of negatives are mined as
    training goes on. Where all weights are trained they start from `weights`, if the backbone's have been rounded.
    """
    train = config.train
    self._config, self._backbone, self._trial, self._directory = config, backbone, trial, directory
    self._generations = generations
    self._best = {"step": 0, "value": -math.inf}
    self._model = steps.tower_model(config, backbone.config, backbone.compute_dtype)
    self._mesh = meshes.make_mesh(fsdp=config.fsdp)
    optimizer = steps.optimizer(train, num_steps)
    tied = config.prompt.tied or config.prompt.kind == "none"
    if before is None:
      first = backbone.params if weights is None else weights
      trainable = self._model.init_trainable(jax.random.key(config.seed), first, tied=tied, word_ids=word_ids)
    else:
      trainable = _trainable_of(before, tied)
    state, frozen = init_state(trainable, optimizer), {} if "backbone" in trainable else backbone.params
    self._step, *shardings = steps.train_step(config, self._model, optimizer, state, frozen, self._mesh)
    state, self._frozen = (meshes.place(*pair) for pair in zip((state, frozen), shardings, strict=True))
    super().__init__("train", train, num_steps, state, trial is not None)

  def step(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    self.state, metrics = self._step(self.state, self._frozen, meshes.put_batch(batch, self._mesh))
    return metrics

  def candidate(self) -> Retriever:
    return self.retriever()

  def attempt(self, step: int, candidate: Retriever) -> Mapping[str, float]:
    figures = self._trial.evaluate(candidate)
    value = figures[self.settings.select_by]
    if value > self._best["value"]:
      candidate.save(self._directory / "retriever")
      self._best = {"step": step, "value": value}
    return figures

  def begin(self, step: int) -> None:
    if self._generations is not None and step:
      self._generations.resume(step)
    elif self.is_marked(0):
      self.mark(0)

  def wait_for(self, step: int) -> None:
    if self._generations is not None:
      self._generations.wait_for(step)

  def is_marked(self, step: int) -> bool:
    return self._generations is not None and self._generations.is_begun_at(step, self.steps)

  def mark(self, step: int) -> None:
    self._generations.begin(step, self.retriever())

  def metadata(self, step: int) -> dict:
    return self._best

  def restored(self, metadata: Mapping[str, Any]) -> None:
    self._best = dict(metadata)

  def retriever(self) -> Retriever:
    """The retriever of the state as it is."""
    trainable = hosts.fetch(self.state.trainable)
    return common.make_retriever(self._config, self._backbone, self._model.prompt, trainable)


def _trainable_of(retriever: Retriever, tied: bool) -> dict[str, Any]:
  """What training goes on with: a retriever's prompts, or the weights where all are tuned; float32 copies."""
  if retriever.spec.kind == "none":
    found = {"backbone": retriever.backbone.params}
  else:
    found = {"prompt": retriever.prompts["query"]} if tied else retriever.prompts
  return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), found)
