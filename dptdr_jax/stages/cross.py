"""cross: a cross-encoder by prompts on the same frozen backbone, the best on dev kept; and what it scores."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files, preemption, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.groups import Negatives, Sampling, TrainGroups
from dptdr_jax.data.pairs import PairBatches, PairFormat
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.data.store import TokenStore
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.cross import HEADS
from dptdr_jax.models.prompts import PromptSpec, check_lengths, check_words
from dptdr_jax.reranker import CrossEncoder, PairSettings, probabilities
from dptdr_jax.retrieval.candidates import Pool, query_blocks
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.runtime import hosts, shardings
from dptdr_jax.runtime import mesh as meshes
from dptdr_jax.runtime.checkpoints import Checkpoints
from dptdr_jax.stages import common, steps
from dptdr_jax.stages.layout import Layout
from dptdr_jax.stages.loop import Loop
from dptdr_jax.stages.pair_trial import PairTrial
from dptdr_jax.training.cross_encoder import CrossModel, make_cross_step
from dptdr_jax.training.state import init_state

_SHARD_PAIRS = 8192  # pairs a shard of scores, which a kill may cost: seconds on an accelerator, minutes on a CPU


def directory_of(layout: Layout) -> pathlib.Path:
  """The stage's directory."""
  return layout.stage("cross")


def model_of(layout: Layout) -> pathlib.Path:
  """The cross-encoder that training chose; see `CrossEncoder.load`."""
  return directory_of(layout) / "model"


def check(config: ConfigDict, encoder: EncoderConfig) -> None:
  """Raises InputError for what can be known to fail before any work is done."""
  cross = config.cross
  if cross.negatives not in common.NEGATIVES:
    fix = f"Use {', '.join(common.NEGATIVES)}"
    raise InputError("unknown cross.negatives", value=cross.negatives, fix=fix)
  if cross.head not in HEADS:
    raise InputError("unknown cross.head", value=cross.head, fix=f"Use {', '.join(HEADS)}")
  if not (cross.steps or cross.epochs):
    raise InputError("a cross-encoder's training has no steps", fix="Set cross.steps or cross.epochs above 0")
  if cross.passages < 2 or cross.evaluate_passages < 2:
    fix = "Set cross.passages and cross.evaluate_passages to 2 at least"
    raise InputError("a cross-encoder learns and is tried on a positive and others beside it", fix=fix)
  if cross.pair_length > config.data.max_stored_tokens:
    what = f"cross.pair_length is beyond the {config.data.max_stored_tokens} tokens that are stored"
    raise InputError(what, value=cross.pair_length, fix="Raise data.max_stored_tokens")
  if cross.pair_length <= config.text.query_length + 1:
    what = f"cross.pair_length leaves no room beside queries of {config.text.query_length} tokens"
    raise InputError(what, value=cross.pair_length)
  check_lengths(encoder, prompt_spec(config), cross.pair_length)
  check_words(prompt_spec(config), encoder)
  steps.check_optimizer(cross)


def check_devices(config: ConfigDict) -> None:
  """Raises InputError where the devices that are here cannot share a batch in chunks."""
  steps.check_chunk(config, "cross.chunk", config.cross.queries * config.cross.passages)


def prompt_spec(config: ConfigDict) -> PromptSpec:
  """The cross-encoder's prompt: deep, the tokens at the positions that the backbone knows."""
  # No position shift: there is nothing of the original's to be equal to, and pairs need the positions.
  return PromptSpec("deep", length=config.cross.length, init=config.cross.init)


def run(config: ConfigDict, workdir: files.Path) -> None:
  """Trains and writes DIR/cross/model, metrics.jsonl and checkpoints."""
  layout = Layout.of(workdir)
  directory, cross = directory_of(layout), config.cross
  data = PreparedData(layout.prepared)
  backbone = common.load_backbone(config, layout)
  batches = make_batches(config, layout, data, backbone)
  num_steps = cross.steps or math.ceil(cross.epochs * batches.steps_per_epoch)
  trial = PairTrial.build(config, layout, data)
  loop = CrossLoop(config, backbone, num_steps, _words(config, layout), trial, directory)
  checkpoints = Checkpoints(directory / "checkpoints", keep=cross.keep_checkpoints)
  try:
    loop.run(batches, checkpoints, directory)
  finally:
    checkpoints.close()
  if trial is None and hosts.is_main():
    loop.encoder().save(model_of(layout))


def make_batches(config: ConfigDict, layout: Layout, data: PreparedData, backbone: Backbone) -> PairBatches:
  """The batches of training: a function of (seed, step)."""
  cross, name = config.cross, config.data.train_split
  split = data.splits[name]
  groups = TrainGroups(
    split.relevant, _negatives(config, layout, data), num_passages=len(data.ids), group_size=cross.passages,
    seed=config.seed, stage="cross", sampling=Sampling(last=cross.sample_last or None),
  )  # fmt: skip
  trainable = np.array([row for row in range(len(split)) if len(split.positives(row))])
  form = PairFormat.of(backbone.tokenizer, config.text.query_length, cross.pair_length)
  return PairBatches(
    TokenStore(layout.store(name)), TokenStore(layout.store("corpus")), trainable, groups, form,
    batch_size=cross.queries, seed=config.seed, stage="cross", **hosts.share(),
  )  # fmt: skip


def _negatives(config: ConfigDict, layout: Layout, data: PreparedData) -> Negatives | None:
  named = config.cross.negatives
  if named == "bm25":
    return common.PoolNegatives(Pool.open(layout.pool(0)))
  return data.splits[config.data.train_split].negatives if named == "source" else None


def _words(config: ConfigDict, layout: Layout) -> np.ndarray | None:
  """The token ids that init 'words' starts from: the most frequent of the corpus, as for retrievers."""
  if config.cross.init != "words":
    return None
  counts = TokenStore(layout.store("corpus")).token_counts()
  return np.argsort(-counts, kind="stable")[: config.cross.length]


class CrossLoop(Loop):
  """Prompt and head by binary cross-entropy; the cross-encoder that is best on dev is kept."""

  def __init__(
    self, config: ConfigDict, backbone: Backbone, num_steps: int, word_ids: np.ndarray | None, trial: PairTrial | None,
    directory: pathlib.Path,
  ):  # fmt: skip
    """Makes the jitted step and the first state, on the mesh."""
    cross, spec = config.cross, prompt_spec(config)
    self._config, self._backbone, self._trial, self._directory = config, backbone, trial, directory
    self._best = {"step": 0, "value": -math.inf}
    self._mesh = meshes.make_mesh(fsdp=config.fsdp)
    rates = steps.dropout(cross.backbone_dropout)
    model = CrossModel(backbone.config, spec, cross.head, compute_dtype=backbone.compute_dtype, dropout=rates)
    optimizer = steps.optimizer(cross, num_steps)
    frozen = shardings.by_rules(backbone.params, self._mesh)
    options = {"seed": config.seed, "chunk": cross.chunk, "mesh": self._mesh, "frozen": frozen}
    self._step = make_cross_step(model, optimizer, **options)
    trainable = model.init_trainable(jax.random.key(config.seed), backbone.params, word_ids)
    state = meshes.place(init_state(trainable, optimizer), meshes.replicated(self._mesh))
    self._frozen = meshes.place(backbone.params, frozen)
    super().__init__("cross", cross, num_steps, state, trial is not None)

  def step(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    self.state, metrics = self._step(self.state, self._frozen, meshes.put_batch(batch, self._mesh))
    return metrics

  def candidate(self) -> CrossEncoder:
    return self.encoder()

  def attempt(self, step: int, candidate: CrossEncoder) -> Mapping[str, float]:
    figures = self._trial.evaluate(candidate)
    if figures["RR@10"] > self._best["value"]:
      candidate.save(self._directory / "model")
      self._best = {"step": step, "value": figures["RR@10"]}
    return figures

  def metadata(self, step: int) -> dict:
    return self._best

  def restored(self, metadata: Mapping[str, Any]) -> None:
    self._best = dict(metadata)

  def encoder(self) -> CrossEncoder:
    """The cross-encoder of the state as it is."""
    config, text = self._config, self._config.text
    settings = PairSettings(
      text.query_length, config.cross.pair_length, text.separator, text.query_template, text.passage_template,
      config.cross.head,
    )  # fmt: skip
    trainable = hosts.fetch(self.state.trainable)
    return CrossEncoder(self._backbone, prompt_spec(config), trainable, settings)


class Rows(Protocol):
  """Passage rows [Q, K] by blocks of queries, negative where nothing is to be scored; an array is such a thing."""

  shape: tuple[int, int]

  def __getitem__(self, block: slice) -> np.ndarray: ...


class _FirstKept:
  """The first `depth` candidates of a pool that are still negatives, at their places."""

  def __init__(self, pool: Pool, depth: int):
    self.shape, self._pool, self._depth = pool.rows.shape, pool, depth

  def __getitem__(self, block: slice) -> np.ndarray:
    kept = self._pool.kept(block)
    return np.where(kept & (np.cumsum(kept, axis=1) <= self._depth), self._pool.rows[block], -1)


@dataclasses.dataclass(frozen=True)
class Scores:
  """Logits [Q, K] by shards on disk: scores[start:stop] is float32, NaN where nothing was scored."""

  shape: tuple[int, int]
  paths: Sequence[pathlib.Path]
  size: int  # queries a shard

  def __getitem__(self, block: slice) -> np.ndarray:
    start, stop, _ = block.indices(self.shape[0])
    first = start // self.size
    parts = [np.load(path, mmap_mode="r") for path in self.paths[first : -(-stop // self.size)]]
    found = np.concatenate(parts) if parts else np.empty((0, self.shape[1]), np.float32)
    return found[start - first * self.size : stop - first * self.size]


@dataclasses.dataclass(frozen=True)
class Probabilities:
  """The probabilities [Q, K] that logits stand for, block by block."""

  logits: Scores

  @property
  def shape(self) -> tuple[int, int]:
    """(Q, K)."""
    return self.logits.shape

  def __getitem__(self, block: slice) -> np.ndarray:
    return probabilities(self.logits[block])


def score_pool(
  config: ConfigDict, layout: Layout, pool: Pool, directory: files.Path, backbone: Backbone, together: bool = False
) -> Probabilities | None:
  """Probabilities of a pool's candidates for the training queries, NaN where not scored; `backbone` is the shared one.

  Scored are the first config.cross.depth candidates of a query that are still negatives; see `score_rows`.
  """
  encoder = CrossEncoder.load(model_of(layout), backbone)
  stores = TokenStore(layout.store(config.data.train_split)), TokenStore(layout.store("corpus"))
  scores = score_rows(encoder, *stores, _FirstKept(pool, config.cross.depth), directory, together)
  return None if scores is None else Probabilities(scores)


def rerank(config: ConfigDict, layout: Layout, found: Run, split: str) -> Run:
  """A split's run with its first config.cross.rerank passages by the cross-encoder's logits, the rest below."""
  encoder = CrossEncoder.load(model_of(layout), common.load_backbone(config, layout))
  top = np.ascontiguousarray(found.rows[:, : config.cross.rerank])
  stores = TokenStore(layout.store(split)), TokenStore(layout.store("corpus"))
  scores = score_rows(encoder, *stores, top, layout.stage("evaluate") / "scores" / split)[:]
  floor = np.nanmin(scores, initial=0) - 1
  below = floor - np.arange(found.depth - top.shape[1], dtype=np.float32)  # in their order
  below = np.broadcast_to(below, (len(found), len(below)))
  return Run.ranked(np.asarray(found.rows), np.concatenate([np.nan_to_num(scores, nan=floor), below], axis=1))


def score_rows(
  encoder: CrossEncoder, queries: TokenStore, passages: TokenStore, rows: Rows, directory: files.Path,
  together: bool = False,
) -> Scores | None:  # fmt: skip
  """Logits of passages for queries, by shards on disk: a killed run goes on at the first shard that is missing.

  Args:
    queries: of Q rows.
    rows: [Q, K].
    directory: where the shards are; those of another cross-encoder or of other candidates are removed.
    together: all processes take turns at the shards; else this one makes all, and waits for none.

  Returns:
    [Q, K], NaN where `rows` is negative; None where another process gets it, the first.
  """
  directory = pathlib.Path(directory)
  count, index = (hosts.process_count(), hosts.process_index()) if together else (1, 0)
  meet = hosts.barrier if together else lambda name: None
  count_of, digest = _look(rows)
  about = {
    "cross_encoder": encoder.hash, "compute_dtype": encoder.backbone.compute_dtype, "scores": "logits",
    "queries": queries.key, "passages": passages.key, "rows": digest,
  }  # fmt: skip
  begun = directory / "scores.json"
  if index == 0 and (not begun.is_file() or files.read_json(begun) != about):
    files.remove(directory)
    files.write_json(begun, about)
  meet("scores are begun")
  number = rows.shape[0]
  size = max(1, _SHARD_PAIRS // max(1, int(count_of.max(initial=1))))
  paths = {start: directory / f"scores-{start:09d}.npy" for start in range(0, number, size)}

  def not_there() -> list[int]:
    return [start for start, path in paths.items() if not path.exists()]

  missing = (hosts.first_says(not_there) if together else not_there())[index::count]
  pairs = sum(int(count_of[start : start + size].sum()) for start in missing)
  with progress.bar("score pairs", pairs, "pair") as shown:
    for start in missing:
      block = rows[start : start + size]
      query, place = np.nonzero(block >= 0)
      part = np.full(block.shape, np.nan, np.float32)
      there = start + query, block[query, place]
      part[query, place] = encoder.logits_stored(queries, passages, *there, advance=shown.advance)
      with files.atomic_path(paths[start]) as partial, open(partial, "wb") as stream:
        np.save(stream, part)
      preemption.check(f"scoring stands at query {min(start + size, number)} of {number}")
  meet("all shards of scores")
  return None if index else Scores(rows.shape, list(paths.values()), size)


def _look(rows: Rows) -> tuple[np.ndarray, str]:
  """How many are to be scored of each query, int64 [Q], and a hash of all of them."""
  digest, counts = hashlib.sha256(repr(tuple(rows.shape)).encode()), []
  for block in query_blocks(*rows.shape):
    part = np.ascontiguousarray(rows[block], np.int32)
    digest.update(part)
    counts.append((part >= 0).sum(1))
  return np.concatenate(counts) if counts else np.empty(0, np.int64), digest.hexdigest()
