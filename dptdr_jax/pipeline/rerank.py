"""rerank: a cross-encoder by prompts on the frozen backbone; its scores of candidates and of runs."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import jax
import numpy as np

from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files, progress
from dptdr_jax.core.shards import Column, Shards, share_out
from dptdr_jax.core.store import Inputs, Kind, Making, Ref, neutral
from dptdr_jax.core.team import Team
from dptdr_jax.data.groups import Sampling, TrainGroups
from dptdr_jax.data.pairs import PairBatches, PairFormat
from dptdr_jax.data.prepare import Split
from dptdr_jax.data.store import TokenStore
from dptdr_jax.pipeline import pools, trials
from dptdr_jax.pipeline.encode import run_of
from dptdr_jax.pipeline.models import BackboneInput, Compute, load_backbone
from dptdr_jax.pipeline.trials import PairDevInput, frequent_tokens, tokens_of
from dptdr_jax.reranker import CrossEncoder, PairSettings, probabilities
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.runtime import hosts
from dptdr_jax.runtime import mesh as meshes
from dptdr_jax.settings import Cross, Prompt, Text
from dptdr_jax.training import steps
from dptdr_jax.training.loop import Loop, Task
from dptdr_jax.training.state import init_state

_SHARD_PAIRS = 8192  # pairs a shard, which a kill may cost: seconds on an accelerator, minutes on a CPU


class CrossInputs(Inputs):
  """Training of the cross-encoder."""

  seed: int
  cross: Cross
  prompt: Prompt
  text: Text
  compute: Compute
  dropout: float
  backbone: BackboneInput
  split: Ref
  split_name: str
  queries: Ref  # tokens
  corpus: Ref  # tokens
  pool: Ref | None  # of BM25's negatives
  dev: PairDevInput | None
  log_every: int = neutral(10)


class PairScoresInputs(Inputs):
  """The cross-encoder's logits of pairs: the best of a run, or a pool's first candidates that are still negatives."""

  cross: Ref
  backbone: BackboneInput
  compute: Compute
  queries: Ref  # tokens
  corpus: Ref  # tokens
  run: Ref | None
  candidates: Ref | None
  depth: int


class RerankedRunInputs(Inputs):
  """A run with its first passages in the order of the cross-encoder."""

  run: Ref
  scores: Ref


def build_cross(inputs: CrossInputs, making: Making) -> None:
  """Trains, and writes model/, metrics.jsonl and facts.json."""
  split = Split(making.path(inputs.split), inputs.split_name)
  split.check_trainable()
  backbone = load_backbone(inputs.backbone, making, inputs.compute)
  corpus = tokens_of(inputs.corpus, making)
  loop = _loop(inputs, making, backbone, corpus, _batches(inputs, making, split, backbone, corpus))
  loop.run()
  if making.team.is_main:
    trained = CrossEncoder.load(making.directory / "model", backbone).num_parameters
    files.write_json(making.directory / "facts.json", {"trained": trained, "backbone": backbone.num_parameters})


def _batches(inputs: CrossInputs, making: Making, split: Split, backbone: Backbone, corpus: TokenStore) -> PairBatches:
  cross, negatives = inputs.cross, split.negatives if inputs.cross.negatives == "source" else None
  if inputs.pool is not None:
    negatives = pools.PoolNegatives(Pool.open(making.path(inputs.pool) / "pool"))
  groups = TrainGroups(
    split.relevant, negatives, num_passages=len(corpus), group_size=cross.passages, seed=inputs.seed, stage="cross",
    sampling=Sampling(last=cross.sample_last or None),
  )  # fmt: skip
  form = PairFormat.of(backbone.tokenizer, inputs.text.query_length, cross.pair_length)
  return PairBatches(
    tokens_of(inputs.queries, making), corpus, split.trainable, groups, form, batch_size=cross.queries,
    seed=inputs.seed, stage="cross",
    host=making.team.index, num_hosts=making.team.count, devices=jax.device_count(),
  )  # fmt: skip


def _loop(inputs: CrossInputs, making: Making, backbone: Backbone, corpus: TokenStore, batches: PairBatches) -> Loop:
  cross, prompt = inputs.cross, inputs.prompt
  mesh = meshes.make_mesh(fsdp=inputs.compute.fsdp)
  model = steps.cross_model(
    backbone.config, cross, prompt, dropout=inputs.dropout, compute_dtype=backbone.compute_dtype
  )
  count = cross.steps or math.ceil(cross.epochs * batches.steps_per_epoch)
  optimizer = steps.optimizer(cross, count)
  words = frequent_tokens(corpus, cross.length) if prompt.init == "words" else None
  state = init_state(model.init_trainable(jax.random.key(inputs.seed), backbone.params, words), optimizer)
  options = {"chunk": cross.chunk, "seed": inputs.seed, "mesh": mesh}
  step, *shardings = steps.cross_step(model, optimizer, state, backbone.params, **options)
  state, frozen = (meshes.place(*pair) for pair in zip((state, backbone.params), shardings, strict=True))
  text = inputs.text
  settings = PairSettings(text.query_length, cross.pair_length, text.separator, text.query_template,
                          text.passage_template, cross.head)  # fmt: skip
  spec = steps.cross_spec(cross, prompt)
  task = Task(
    "cross", lambda state, batch: step(state, frozen, meshes.put_batch(batch, mesh)),
    lambda state: CrossEncoder(backbone, spec, hosts.fetch(state.trainable), settings),
    keep=lambda encoder: encoder.save(making.directory / "model"),
    attempt=trials.of_cross_encoder(inputs.dev, making, inputs.seed),
  )  # fmt: skip
  return Loop(
    task, state, batches, making.directory, count, log_every=inputs.log_every,
    checkpoint_every=cross.checkpoint_every, evaluate_every=cross.evaluate_every,
    on_checkpoint=lambda step: making.checkpoint(),
  )  # fmt: skip


def build_scores(inputs: PairScoresInputs, making: Making) -> None:
  """Scores the pairs by shards, the processes in turn."""
  backbone = load_backbone(inputs.backbone, making, inputs.compute)
  encoder = CrossEncoder.load(making.path(inputs.cross) / "model", backbone)
  if inputs.run is not None:
    rows: Any = np.ascontiguousarray(run_of(inputs.run, making).rows[:, : inputs.depth])
  else:
    rows = FirstKept(Pool.open(making.path(inputs.candidates) / "pool"), inputs.depth)
  stores = tokens_of(inputs.queries, making), tokens_of(inputs.corpus, making)
  score_rows(encoder, *stores, rows, making.directory / "scores", making.team)


def build_reranked(inputs: RerankedRunInputs, making: Making) -> None:
  """Ranks by logits; what was not scored stays below, in its order."""
  run, logits = run_of(inputs.run, making), logits_of(making.path(inputs.scores) / "scores")[:]
  floor = np.nanmin(logits, initial=0) - 1
  below = floor - np.arange(run.depth - logits.shape[1], dtype=np.float32)
  below = np.broadcast_to(below, (len(run), len(below)))
  scores = np.concatenate([np.nan_to_num(logits, nan=floor), below], axis=1)
  Run.ranked(np.asarray(run.rows), scores).save(making.directory / "run")


CROSS = Kind("cross", 1, build_cross, chosen=True)
PAIR_SCORES = Kind("pair_scores", 1, build_scores)
RERANKED = Kind("reranked_run", 1, build_reranked, together=False)


class FirstKept:
  """The first `depth` candidates of a pool that are still negatives, at their places."""

  def __init__(self, pool: Pool, depth: int):
    self.shape, self._pool, self._depth = pool.rows.shape, pool, depth

  def __getitem__(self, block: slice) -> np.ndarray:
    kept = self._pool.kept(block)
    return np.where(kept & (np.cumsum(kept, axis=1) <= self._depth), self._pool.rows[block], -1)


class Probabilities:
  """The probabilities [Q, K] that logits stand for, block by block; NaN where nothing was scored."""

  def __init__(self, logits: Column):
    self.shape, self._logits = logits.shape, logits

  def __getitem__(self, block: slice) -> np.ndarray:
    return probabilities(self._logits[block])


def logits_of(directory: pathlib.Path) -> Column:
  """What `score_rows` wrote: float32 [Q, K], NaN where nothing was scored."""
  return Shards.open(directory)["scores"]


def score_rows(
  encoder: CrossEncoder, queries: TokenStore, passages: TokenStore, rows: Any, directory: pathlib.Path, team: Team
) -> None:
  """Writes logits of passages for queries; a killed run goes on at the first missing shard.

  Args:
    queries: of Q rows.
    rows: passage rows [Q, K], negative where nothing is to be scored: an array, or what gives blocks of queries.
  """
  size = max(1, _SHARD_PAIRS // max(1, rows.shape[1]))

  with progress.bar("score pairs", None, "pair") as shown:

    def make(block: range) -> dict[str, np.ndarray]:
      part = rows[block.start : block.stop]
      query, place = np.nonzero(part >= 0)
      logits = np.full(part.shape, np.nan, np.float32)
      asked = block.start + query, part[query, place]
      logits[query, place] = encoder.logits_stored(queries, passages, *asked, advance=shown.advance)
      return {"scores": logits}

    arrays = {"scores": ("float32", (rows.shape[1],))}
    share_out(directory, rows.shape[0], size, arrays, make, team=team, what="score pairs")
