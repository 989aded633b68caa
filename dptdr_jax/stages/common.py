"""What several stages make of the config in the same way."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dptdr_jax import backbone as backbones
from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError, PassingError
from dptdr_jax.data.batches import TrainBatches
from dptdr_jax.data.groups import Negatives, Sampling, TrainGroups
from dptdr_jax.data.prepare import PreparedData, PreparedSplit
from dptdr_jax.data.store import TokenStore
from dptdr_jax.models import convert
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.encoder import REMAT
from dptdr_jax.models.prompts import PromptSpec, check_lengths, check_words
from dptdr_jax.retrieval import measures
from dptdr_jax.retrieval.bm25 import Bm25
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retriever import Retriever, VectorSettings
from dptdr_jax.runtime import hosts
from dptdr_jax.runtime import mesh as meshes
from dptdr_jax.stages import ranges, scratch, steps
from dptdr_jax.stages.layout import Layout

POOLINGS = ("first", "mean")
NEGATIVES = ("source", "bm25", "random")
_SPECIAL = 2  # tokens around a text, which are not stored
CHOICES = {
  "vector.pooling": POOLINGS, "train.negatives": NEGATIVES, "train.positive": ("rotate", "first"),
  "train.remat": REMAT, "pretrain.remat": REMAT, "encode.dtype": ("float32", "float16"),
}  # fmt: skip


def check(config: ConfigDict) -> None:
  """Raises InputError for what can be known to fail before any work is done: ranges, lengths, names, measures."""
  ranges.check(config)
  if config.pretrain.tokenizer == "train" and not config.pretrain.enabled:
    raise InputError("pretrain.tokenizer is train, and nothing is pretrained", fix="Set pretrain.enabled to True")
  if not (has_queries(config) or config.pretrain.enabled):
    raise InputError("data.source text has no queries, and all that it is for is pretraining",
                     fix="Set pretrain.enabled to True")  # fmt: skip
  for field, known in CHOICES.items():
    value = functools.reduce(getattr, field.split("."), config)
    if value not in known:
      raise InputError(f"unknown {field}", value=value, fix=f"Use {', '.join(known)}")
  settings = vector_settings(config)
  if config.backbone.sha256 and not scratch.is_wanted(config):
    backbones.check_sha256(backbones.locate(config.backbone.path), config.backbone.sha256)
  encoder = encoder_config(config)
  backbones.resolve_dtype(config.compute_dtype)
  spec = steps.prompt_spec(config) if trains(config) else PromptSpec(kind="none")
  check_lengths(encoder, spec, max(settings.query_length, settings.passage_length))
  for side in ("query", "passage") if has_queries(config) else ():
    wanted = settings.limit(side)
    if wanted - _SPECIAL > config.data.max_stored_tokens:
      what = f"text.{side}_length is beyond the {config.data.max_stored_tokens} tokens that are stored"
      raise InputError(what, value=wanted, fix="Raise data.max_stored_tokens")
  meshes.make_mesh(fsdp=config.fsdp)
  if has_queries(config) and not config.evaluate.measures:
    raise InputError("evaluate.measures names no measure", fix="Name some: ('RR@10', 'R@100')")
  measures.check((*config.evaluate.measures, config.train.select_by))
  for measure in config.evaluate.measures:
    if measures.cutoff(measure) > config.evaluate.depth:
      raise InputError(f"evaluate.measures looks deeper than evaluate.depth, {config.evaluate.depth}", value=measure)
  if trains(config):
    _check_training(config, spec, encoder)


def _check_training(config: ConfigDict, spec: PromptSpec, encoder: EncoderConfig) -> None:
  check_words(spec, encoder)
  if not (config.train.steps or config.train.epochs):
    raise InputError("training has no steps", fix="Set train.steps or train.epochs above 0")
  steps.check_optimizer(config.train)
  sampling(config)
  if config.train.evaluate_every and config.data.dev_split and config.data.dev_split == config.data.train_split:
    raise InputError("the dev split is the training split", value=config.data.dev_split, fix="Name another, or ''")


def has_queries(config: ConfigDict) -> bool:
  """Whether there is something to train on and to measure; else a run pretrains a backbone and ends."""
  return config.data.source != "text"


def trains(config: ConfigDict) -> bool:
  """Whether prompts are trained; else what is trained already is measured, or a backbone pretrained."""
  return has_queries(config) and config.rounds > 0


def measured_by_answers(config: ConfigDict) -> list[str]:
  """The measures that are taken by answers, not by judgements: Success@k, where the config says so."""
  return [name for name in config.evaluate.measures if config.evaluate.answers and name.startswith("Success@")]


def encoder_config(config: ConfigDict) -> EncoderConfig:
  """The backbone's shape, of which config.json alone is read."""
  if scratch.is_wanted(config):
    return scratch.shape(config, config.pretrain.vocabulary)
  return EncoderConfig.from_file(backbones.locate(config.backbone.path) / "config.json")


def base_directory(config: ConfigDict, layout: Layout) -> pathlib.Path:
  """Where the backbone is that the run starts from: the one the config names, or the random one that prepare made."""
  return layout.scratch if scratch.is_wanted(config) else backbones.locate(config.backbone.path)


def base_backbone(config: ConfigDict, layout: Layout) -> Backbone:
  """The backbone that the run starts from, in the config's compute_dtype."""
  if scratch.is_wanted(config):
    return Backbone.load(layout.scratch, compute_dtype=config.compute_dtype, fsdp=config.fsdp)
  named = config.backbone
  return Backbone.load(named.path, compute_dtype=config.compute_dtype, sha256=named.sha256, fsdp=config.fsdp)


def load_backbone(config: ConfigDict, layout: Layout) -> Backbone:
  """The backbone that prompts are trained on: after pretraining, where the config has it."""
  if config.pretrain.enabled:
    return Backbone.load(layout.pretrained.resolve(), compute_dtype=config.compute_dtype, fsdp=config.fsdp)
  return base_backbone(config, layout)


def exact_weights(config: ConfigDict, layout: Layout) -> Any:
  """The weights of `load_backbone`, on the host and in float32: what training of all of them starts from."""
  directory = layout.pretrained.resolve() if config.pretrain.enabled else base_directory(config, layout)
  tensors = convert.load_backbone_tensors(directory)
  return Backbone.from_tensors(str(directory), directory, tensors, "float32", on_host=True).params


def origin(config: ConfigDict, layout: Layout) -> str:
  """The backbone, and what pretraining made of it."""
  named = f"backbone {'from nothing' if scratch.is_wanted(config) else config.backbone.path}"
  if not config.pretrain.enabled:
    return named
  about = files.read_json(layout.pretrained / "manifest.json")
  kinds = "; ".join(
    f"{corpus['name']}: {corpus['passages']}, {corpus['truncated']} as long as is stored or longer"
    for corpus in about["corpora"]
  )
  trained = f"{about['steps']} steps of {about['spans']} spans, {about['tokens']:,} tokens"
  return f"{named} after {trained} (passages by what they gave: {kinds})"


def vector_settings(config: ConfigDict) -> VectorSettings:
  """What vectors depend on besides weights and prompts."""
  return VectorSettings(**config.vector, **config.text)


def make_retriever(config: ConfigDict, backbone: Backbone, spec: PromptSpec, trainable: dict[str, Any]) -> Retriever:
  """A retriever of what training has made: prompts on the frozen backbone, or a backbone of its own."""
  settings = vector_settings(config)
  if "backbone" in trainable:
    tuned = backbone.with_params(trainable["backbone"])
    return Retriever(tuned, spec, {"query": {}, "passage": {}}, settings)
  sides = {side: trainable.get("prompt", trainable.get(side)) for side in ("query", "passage")}
  return Retriever(backbone, spec, sides, settings)


def trained(config: ConfigDict, layout: Layout, number: int, shared: Backbone | None = None) -> Retriever:
  """The retriever that round `number` of training chose, on the shared backbone unless its weights are tuned."""
  tuned = config.prompt.kind == "none"
  return load_retriever(config, layout.retriever(number), None if tuned else shared or load_backbone(config, layout))


def load_retriever(config: ConfigDict, directory: files.Path, shared: Backbone | None) -> Retriever:
  """A saved retriever, on the shared backbone; None: it has weights of its own, or the backbone that it names."""
  return Retriever.load(directory, shared, compute_dtype=config.compute_dtype, fsdp=config.fsdp)


def train_batches(
  config: ConfigDict, layout: Layout, data: PreparedData, number: int, groups: Any | None = None
) -> TrainBatches:
  """The batches of a round of training: a function of (seed, round, step).

  Args:
    groups: what draws their passages, see `data.batches.GroupBatches`; default: `train_groups`.
  """
  train, name = config.train, config.data.train_split
  split = data.splits[name]
  trainable = np.array([row for row in range(len(split)) if len(split.positives(row))])
  return TrainBatches(
    TokenStore(layout.store(name)), TokenStore(layout.store("corpus")), trainable,
    groups or train_groups(config, layout, data, number), batch_size=train.queries,
    query_tokens=config.text.query_length, passage_tokens=config.text.passage_length, seed=config.seed,
    stage=f"train{number}", **hosts.share(),
  )  # fmt: skip


def train_groups(
  config: ConfigDict, layout: Layout, data: PreparedData, number: int, negatives: Negatives | None = None
) -> TrainGroups:
  """What draws the passages of a round's batches, from `negatives` or from the round's own."""
  train, split = config.train, data.splits[config.data.train_split]
  negatives = negatives or _negatives(config, layout, data, number)
  positives = split.relevant
  if config.mine.pseudo_positives and isinstance(negatives, PoolNegatives):
    positives = functools.partial(_with_pseudo_positives, split.relevant, negatives)
  return TrainGroups(
    positives, negatives, num_passages=len(data.ids), group_size=train.passages, seed=config.seed,
    stage=f"train{number}", positive=train.positive, sampling=sampling(config),
  )  # fmt: skip


def _with_pseudo_positives(positives: Callable, negatives: PoolNegatives, query_row: int) -> np.ndarray:
  """What is relevant to a query, then what the cross-encoder takes for some."""
  return np.concatenate([positives(query_row), negatives.pseudo_positives(query_row)]).astype(np.int64)


def sampling(config: ConfigDict) -> Sampling:
  """How negatives are drawn from what there is for a query."""
  train = config.train
  return Sampling(train.sampling, train.sample_first, train.sample_last or None, train.simans_a, train.simans_b)


def _negatives(config: ConfigDict, layout: Layout, data: PreparedData, number: int) -> Negatives | None:
  """What round `number` draws from: from the second on, what the round before mined."""
  if number > 1 or draws_from_bm25(config):
    return pool_negatives(config, Pool.open(layout.pool(number - 1)))
  return data.splits[config.data.train_split].negatives if config.train.negatives == "source" else None


def mines_first(config: ConfigDict) -> bool:
  """Whether there is a pool before round 1: BM25's negatives, for the retriever or for the cross-encoder."""
  return draws_from_bm25(config) or (trains(config) and config.cross.enabled and config.cross.negatives == "bm25")


def draws_from_bm25(config: ConfigDict) -> bool:
  """Whether round 1 takes negatives that BM25 has found; with one passage a query it takes none."""
  return trains(config) and config.train.negatives == "bm25" and config.train.passages > 1


def pool_negatives(config: ConfigDict, pool: Pool) -> PoolNegatives:
  """A pool as training draws from it, with scores where it has those of train.simans_source."""
  source = config.train.simans_source
  return ScoredPoolNegatives(pool, source) if source in pool.names else PoolNegatives(pool)


class PoolNegatives:
  """A pool of mined candidates as the negatives that training groups draw from."""

  def __init__(self, pool: Pool):
    self._pool = pool

  def rows(self, query_row: int) -> np.ndarray:
    """Passage rows of a query, best first."""
    return np.asarray(self._pool.candidates(query_row))

  def pseudo_positives(self, query_row: int) -> np.ndarray:
    """Passage rows that denoising took for positives."""
    return np.asarray(self._pool.pseudo_positives(query_row))


class ScoredPoolNegatives(PoolNegatives):
  """The same with the scores of one source, which SimANS draws by."""

  def __init__(self, pool: Pool, source: str):
    super().__init__(pool)
    self._source = source

  def scores(self, query_row: int) -> tuple[np.ndarray, float]:
    """The source's scores of `rows(query_row)`, and of the query's best positive."""
    return self._pool.candidate_scores(query_row, self._source)


def frequent_tokens(config: ConfigDict, layout: Layout) -> np.ndarray | None:
  """The P token ids that are most frequent in the corpus, most frequent first: what init 'words' starts from."""
  if config.prompt.init != "words":
    return None
  counts = TokenStore(layout.store("corpus")).token_counts()
  return np.argsort(-counts, kind="stable")[: config.prompt.length]


def qrels(split: PreparedSplit) -> Qrels:
  """A split's judgements as the measures take them."""
  return Qrels.from_triples(*split.judgements.flat(), len(split))


def barred(split: PreparedSplit) -> Qrels:
  """What must not become a query's negative: the judgements, and what is relevant to another query of its text."""
  lists = [one.flat() for one in (split.judgements, split.shared) if one is not None]
  return Qrels.from_triples(*(np.concatenate(part) for part in zip(*lists, strict=True)), len(split))


def bm25(layout: Layout, data: PreparedData) -> Bm25:
  """The BM25 index of the corpus, title and text joined by a space; built by the first stage that asks for it."""
  if not (layout.bm25 / "manifest.json").exists():
    Bm25.build((f"{p.title} {p.text}".strip() for p in data.passages.read()), layout.bm25)
  with built_again(layout.bm25):
    return Bm25(layout.bm25)


@contextlib.contextmanager
def built_again(index: pathlib.Path) -> Iterator[None]:
  """Removes an index that the `with` block cannot read, so that it is built by whoever asks next.

  Raises:
    PassingError: in place of the InputError.
  """
  try:
    yield
  except InputError as error:
    with contextlib.suppress(FileNotFoundError):  # another process was first
      files.remove(index)
    raise PassingError(f"{error} It is removed, and the next start does so") from error
