"""train: prompts (or all weights) by contrast, resumed from the newest checkpoint, the best on dev kept."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files
from dptdr_jax.core.store import Inputs, Kind, Making, Ref, neutral
from dptdr_jax.data.batches import TrainBatches
from dptdr_jax.data.groups import TrainGroups
from dptdr_jax.data.prepare import Split
from dptdr_jax.data.store import TokenStore
from dptdr_jax.pipeline import models, pools, trials
from dptdr_jax.pipeline.generations import Generations, Refresh
from dptdr_jax.pipeline.models import BackboneInput, Compute
from dptdr_jax.pipeline.trials import DevInput, frequent_tokens, tokens_of
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.retriever import Retriever, VectorSettings
from dptdr_jax.runtime import hosts
from dptdr_jax.runtime import mesh as meshes
from dptdr_jax.settings import Prompt, Text, Train, Vector
from dptdr_jax.training import steps
from dptdr_jax.training.loop import Loop, Task
from dptdr_jax.training.state import TrainState, init_state

_log = logging.getLogger(__name__)

__all__ = ["TRAIN", "Refresh", "TrainInputs"]


class TrainInputs(Inputs):
  """Training of a round's retriever."""

  number: int
  seed: int
  train: Train
  prompt: Prompt
  vector: Vector
  text: Text
  compute: Compute
  dropout: float
  backbone: BackboneInput
  split: Ref
  split_name: str
  queries: Ref  # tokens
  corpus: Ref  # tokens
  pool: Ref | None  # of negatives; None: those of the data, or random ones
  pseudo_positives: bool
  dev: DevInput | None
  refresh: Refresh | None
  log_every: int = neutral(10)


def build_trained(inputs: TrainInputs, making: Making) -> None:
  """Trains, and writes retriever/, metrics.jsonl and facts.json."""
  split = Split(making.path(inputs.split), inputs.split_name)
  split.check_trainable()
  backbone = models.load_backbone(inputs.backbone, making, inputs.compute)
  queries, corpus = tokens_of(inputs.queries, making), tokens_of(inputs.corpus, making)
  groups: Any = _groups(inputs, making, split, len(corpus))
  generations = None
  if inputs.refresh is not None:
    groups = generations = Generations(inputs, making, split, groups)
  batches = TrainBatches(
    queries, corpus, split.trainable, groups, batch_size=inputs.train.queries, query_tokens=inputs.text.query_length,
    passage_tokens=inputs.text.passage_length, seed=inputs.seed, stage=f"train{inputs.number}",
    host=making.team.index, num_hosts=making.team.count, devices=jax.device_count(),
  )  # fmt: skip
  loop = _loop(inputs, making, backbone, corpus, batches, generations)
  if inputs.train.refresh_every >= loop.steps:
    _log.warning("train.refresh_every is %d, and there are %d steps: no generation takes effect",
                 inputs.train.refresh_every, loop.steps)  # fmt: skip
  with contextlib.closing(generations) if generations else contextlib.nullcontext():
    loop.run()
  if making.team.is_main:
    tunes_all = inputs.prompt.kind == "none"
    saved = Retriever.load(making.directory / "retriever", None if tunes_all else backbone)
    prompts = {id(tree): tree for tree in saved.prompts.values()}  # tied ones count once
    whole, count = saved.backbone.num_parameters, sum(leaf.size for leaf in jax.tree.leaves(prompts))
    files.write_json(making.directory / "facts.json", {"trained": whole if tunes_all else count, "backbone": whole})


TRAIN = Kind("train", 1, build_trained, chosen=True)


def _groups(inputs: TrainInputs, making: Making, split: Split, num_passages: int) -> TrainGroups:
  """What draws the passages of the batches, before others are mined during training."""
  negatives: Any = split.negatives if inputs.train.negatives == "source" and inputs.number == 1 else None
  if inputs.pool is not None:
    negatives = Pool.open(making.path(inputs.pool) / "pool")
  return pools.train_groups(inputs, split, negatives, num_passages)


def _retriever_of(inputs: TrainInputs, backbone: Backbone) -> Callable[[TrainState], Retriever]:
  """What turns a state into a retriever: prompts on the frozen backbone, or a backbone of its own."""
  spec = steps.prompt_spec(inputs.prompt)
  settings = VectorSettings(**inputs.vector.model_dump(), **inputs.text.model_dump())

  def retriever(state: TrainState) -> Retriever:
    trained = hosts.fetch(state.trainable)
    if "backbone" in trained:
      return Retriever(backbone.with_params(trained["backbone"]), spec, {"query": {}, "passage": {}}, settings)
    sides = {side: trained.get("prompt", trained.get(side)) for side in ("query", "passage")}
    return Retriever(backbone, spec, sides, settings)

  return retriever


def _loop(
  inputs: TrainInputs, making: Making, backbone: Backbone, corpus: TokenStore, batches: TrainBatches,
  generations: Generations | None,
) -> Loop:  # fmt: skip
  train, prompt = inputs.train, inputs.prompt
  model = steps.bi_encoder(backbone.config, prompt, inputs.vector, train, dropout=inputs.dropout,
                           compute_dtype=backbone.compute_dtype)  # fmt: skip
  mesh = meshes.make_mesh(fsdp=inputs.compute.fsdp)
  count = train.steps or math.ceil(train.epochs * batches.steps_per_epoch)
  optimizer = steps.optimizer(train, count)
  weights = backbone.params
  if prompt.kind == "none" and backbone.compute_dtype != "float32":
    weights = models.exact_weights(inputs.backbone, making)
  words = frequent_tokens(corpus, prompt.length) if prompt.init == "words" else None
  tied = prompt.tied or prompt.kind == "none"
  trainable = model.init_trainable(jax.random.key(inputs.seed), weights, tied=tied, word_ids=words)
  state, frozen = init_state(trainable, optimizer), {} if "backbone" in trainable else backbone.params
  step, *shardings = steps.train_step(
    model, optimizer, state, frozen, train=train, temperature=inputs.vector.temperature, seed=inputs.seed, mesh=mesh
  )
  state, frozen = (meshes.place(*pair) for pair in zip((state, frozen), shardings, strict=True))

  def one(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Mapping[str, Any]]:
    return step(state, frozen, meshes.put_batch(batch, mesh))

  task = Task(
    "train", one, _retriever_of(inputs, backbone),
    keep=lambda retriever: retriever.save(making.directory / "retriever"),
    attempt=trials.of_retriever(inputs.dev, making, inputs.seed), generations=generations,
  )  # fmt: skip
  return Loop(
    task, state, batches, making.directory, count, log_every=inputs.log_every,
    checkpoint_every=train.checkpoint_every, evaluate_every=train.evaluate_every,
    on_checkpoint=lambda step: making.checkpoint(),
  )  # fmt: skip
