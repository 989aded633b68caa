"""Rules that concern several settings, the data, or the devices: what can be known to fail fails before any work."""

from __future__ import annotations

import pathlib

import jax
import numpy as np

from dptdr_jax import backbone as backbones
from dptdr_jax import retriever as retrievers
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.formats import Format
from dptdr_jax.data.masking import Masking
from dptdr_jax.data.spans import SpanLengths
from dptdr_jax.data.tokenizer import Tokenizer
from dptdr_jax.data.vocabulary import LEAST
from dptdr_jax.models import convert
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.prompts import PromptSpec, check_lengths, check_words
from dptdr_jax.pipeline import encode, evaluate, prepare, sources
from dptdr_jax.pipeline.graph import draws_from_bm25, mines_first
from dptdr_jax.pipeline.systems import systems
from dptdr_jax.retrieval import measures
from dptdr_jax.retrieval.candidates import MAX_DEPTH, MAX_SOURCES
from dptdr_jax.retrieval.index import Index
from dptdr_jax.runtime import hosts
from dptdr_jax.runtime import mesh as meshes
from dptdr_jax.runtime.shardings import by_rules
from dptdr_jax.settings import Optimization, Settings
from dptdr_jax.training import steps
from dptdr_jax.training.chunks import chunk_count

_SPECIAL = 2  # tokens around a text, which are not stored


def check(settings: Settings, *, here: bool = True) -> None:
  """Raises InputError for what the settings alone show to fail.

  Args:
    here: the run is for this machine: its devices and weights are looked at, too.
  """
  _check_run(settings)
  encoder = encoder_of(settings)
  if here:
    if settings.backbone.sha256 and not starts_from_nothing(settings):
      backbones.check_sha256(backbones.locate(settings.backbone.path), settings.backbone.sha256)
    meshes.make_mesh(fsdp=settings.fsdp)
  if settings.pretrain.enabled:
    _check_pretraining(settings, encoder)
  if settings.data.format == "text":
    return
  _check_lengths(settings, encoder)
  _check_measures(settings)
  _check_systems(settings)
  _check_index(settings, encoder)
  if settings.rounds:
    _check_training(settings, encoder)
    _check_mining(settings)
  if settings.cross.enabled:
    _check_cross(settings, encoder)


def starts_from_nothing(settings: Settings) -> bool:
  """Whether the run makes its own tokenizer and a random backbone."""
  return settings.pretrain.enabled and settings.pretrain.tokenizer == "train"


def encoder_of(settings: Settings) -> EncoderConfig:
  """The backbone's architecture; config.json alone is read."""
  if starts_from_nothing(settings):
    return prepare.scratch_encoder(settings.pretrain.shape, settings.pretrain.vocabulary)
  return EncoderConfig.from_file(backbones.locate(settings.backbone.path) / "config.json")


def _check_run(settings: Settings) -> None:
  if settings.pretrain.tokenizer == "train" and not settings.pretrain.enabled:
    raise InputError("pretrain.tokenizer is train, and nothing is pretrained", fix="Set pretrain.enabled to True")
  if settings.data.format == "text" and not settings.pretrain.enabled:
    raise InputError("data.format text has no queries: it is for pretraining", fix="Set pretrain.enabled to True")
  if settings.cross.enabled and not settings.rounds:
    raise InputError("the cross-encoder reranks what the last round's retriever ranks, and rounds is 0",
                     fix="Set cross.enabled to False")  # fmt: skip


def _check_lengths(settings: Settings, encoder: EncoderConfig) -> None:
  spec = steps.prompt_spec(settings.prompt) if settings.rounds else PromptSpec(kind="none")
  lengths = {"query": settings.text.query_length, "passage": settings.text.passage_length}
  check_lengths(encoder, spec, max(lengths.values()))
  stored = settings.data.max_stored_tokens
  for side, length in lengths.items():
    if length - _SPECIAL > stored:
      raise InputError(f"text.{side}_length is beyond the {stored} tokens that are stored", value=length,
                       fix="Raise data.max_stored_tokens")  # fmt: skip


def _check_measures(settings: Settings) -> None:
  wanted = settings.evaluate
  if not wanted.measures:
    raise InputError("evaluate.measures names no measure", fix="Name some: ('RR@10', 'R@100')")
  if not wanted.splits:
    raise InputError("evaluate.splits names no split", fix="Name one; --stages may end before it is measured")
  measures.check(wanted.measures)
  for measure in wanted.measures:
    if measures.cutoff(measure) > wanted.depth:
      raise InputError(f"evaluate.measures looks deeper than evaluate.depth, {wanted.depth}", value=measure)


def _check_systems(settings: Settings) -> None:
  listed = systems(settings)
  if not listed:
    raise InputError("nothing to evaluate: rounds is 0, and there is no baseline", fix="Name evaluate.retrievers")
  if settings.vector.pooling in settings.evaluate.other_poolings:
    raise InputError("evaluate.other_poolings holds vector.pooling's own", value=settings.vector.pooling)
  for system in listed:
    if system.kind == "saved":
      retrievers.check_saved(system.directory)


def _check_index(settings: Settings, encoder: EncoderConfig) -> None:
  index = settings.index
  wanted = encode.parameters(index.search_parameters)
  if index.backend == "devices" and index.factory != "Flat":
    raise InputError("search on the devices is exact: index.factory is FAISS's", value=index.factory, fix="Use Flat")
  if wanted and index.factory == "Flat":
    raise InputError("index.search_parameters belong to an index, and search is exact", value=index.search_parameters,
                     fix="Set index.factory, or leave them out")  # fmt: skip
  if index.backend == "faiss":
    Index.check(encoder.hidden_size, index.factory, wanted)


def _check_optimization(settings: Optimization, name: str) -> None:
  if not (settings.steps or settings.epochs):
    raise InputError(f"{name} has no steps", fix=f"Set {name}.steps or {name}.epochs above 0")
  try:
    steps.check_optimizer(settings)
  except InputError as error:
    raise InputError(f"{name}: {error}") from error


def _check_training(settings: Settings, encoder: EncoderConfig) -> None:
  check_words(steps.prompt_spec(settings.prompt), encoder)
  _check_optimization(settings.train, "train")
  data = settings.data
  if settings.train.evaluate_every and data.dev_split and data.dev_split == data.train_split:
    raise InputError("the dev split is the training split", value=data.dev_split, fix="Name another, or ''")
  if settings.prompt.kind == "none" and not settings.prompt.tied:
    raise InputError("only prompts can be untied: all weights are tuned for both sides", fix="Set prompt.tied to True")


def _check_pretraining(settings: Settings, encoder: EncoderConfig) -> None:
  pretraining = settings.pretrain
  check_lengths(encoder, PromptSpec(kind="none"), pretraining.span_tokens)
  steps.pretrain_model(
    encoder, settings.vector, pretraining, dropout=settings.backbone.dropout, compute_dtype="float32"
  )
  _check_optimization(pretraining, "pretrain")
  if starts_from_nothing(settings) and pretraining.vocabulary < LEAST:
    raise InputError(f"a byte-level pretrain.vocabulary has at least {LEAST} ids", value=pretraining.vocabulary)
  if not pretraining.corpora:
    raise InputError("pretrain.corpora is empty", fix="Name 'data' (this run's own), files, or other runs")
  special = _SPECIAL
  if not starts_from_nothing(settings):
    tokenizer = Tokenizer(backbones.locate(settings.backbone.path))
    special = len(tokenizer.prefix) + len(tokenizer.suffix)
    if pretraining.mlm_weight:
      Masking.of(tokenizer)
  SpanLengths(pretraining.span_tokens, pretraining.short_share, pretraining.overlap).text(special)


def _check_cross(settings: Settings, encoder: EncoderConfig) -> None:
  cross, stored = settings.cross, settings.data.max_stored_tokens
  if cross.pair_length > stored:
    raise InputError(f"cross.pair_length is beyond the {stored} tokens that are stored", value=cross.pair_length,
                     fix="Raise data.max_stored_tokens")  # fmt: skip
  if cross.pair_length <= settings.text.query_length + 1:
    raise InputError(f"cross.pair_length leaves no room beside queries of {settings.text.query_length} tokens",
                     value=cross.pair_length)  # fmt: skip
  spec = steps.cross_spec(cross, settings.prompt)
  check_lengths(encoder, spec, cross.pair_length)
  check_words(spec, encoder)
  _check_optimization(cross, "cross")


def _check_mining(settings: Settings) -> None:
  mine, train = settings.mine, settings.train
  if draws_from_bm25(settings) and not mine.bm25.depth:
    raise InputError("train.negatives is bm25, and mine.bm25.depth is 0")
  if settings.cross.enabled and settings.cross.negatives == "bm25" and not mine.bm25.depth:
    raise InputError("cross.negatives is bm25, and mine.bm25.depth is 0")
  if sources.mines_with_retriever(settings) and train.passages == 1 and not mine.pseudo_positives:
    raise InputError("mining needs train.passages ≥ 2", value=train.passages)
  if mine.negative_below > mine.positive_above:
    raise InputError("mine.negative_below is above mine.positive_above",
                     value=(mine.negative_below, mine.positive_above))  # fmt: skip
  if train.refresh_every and not (mine.dense.depth and sources.DENSE in mine.sources):
    raise InputError("train.refresh_every mines with the retriever as it trains", fix="Set mine.dense.depth above 0")
  _check_denoising(settings)
  _check_sources(settings)
  if train.sampling == "simans" and train.simans_source not in (known := sources.scored(settings)):
    raise InputError("unknown train.simans_source", value=train.simans_source, fix=f"Use {', '.join(known)}")


def _check_denoising(settings: Settings) -> None:
  mine = settings.mine
  if mine.cross_encoder and not settings.cross.enabled:
    raise InputError("mine.cross_encoder needs a cross-encoder", fix="Set cross.enabled to True")
  if mine.pseudo_positives and not mine.cross_encoder:
    raise InputError("mine.pseudo_positives are the cross-encoder's", fix="Set mine.cross_encoder to True")
  if mine.cross_encoder and not sources.mines_with_retriever(settings):
    raise InputError("mine.cross_encoder denoises what is mined with a retriever, and nothing is",
                     fix="Set rounds to 2, or train.refresh_every above 0")  # fmt: skip
  if mine.pseudo_positives and settings.train.positive == "first":
    raise InputError("mine.pseudo_positives are never the first positive", fix="Set train.positive to rotate")


def _check_sources(settings: Settings) -> None:
  mine = settings.mine
  windows = {"mine.bm25.": (mine.bm25.depth, mine.bm25.first), "mine.dense.": (mine.dense.depth, mine.dense.first),
             "mine.runs_": (mine.runs_depth, mine.runs_first)}  # fmt: skip
  for name, (depth, first) in windows.items():
    if depth and first >= depth:
      raise InputError(f"{name}first must be below {name}depth", value=(first, depth))
    if depth > MAX_DEPTH:
      raise InputError(f"{name}depth is beyond the {MAX_DEPTH:,} ranks that a pool holds", value=depth)
  numbers = (0, settings.rounds)
  if sources.mines_with_retriever(settings) and not sources.sources_of(settings, settings.rounds):
    raise InputError("nothing to mine from: each of mine.sources has a depth of 0 or no files", value=mine.sources)
  if (most := max(len(sources.sources_of(settings, number)) for number in numbers)) > MAX_SOURCES:
    raise InputError(f"a pool takes {MAX_SOURCES} sources at most", value=most, fix="Name fewer mine.runs")
  if mine.runs and not (mines_first(settings) or sources.mines_with_retriever(settings)):
    raise InputError("mine.runs, and nothing is mined", value=mine.runs,
                     fix="Set train.negatives to bm25 and train.passages to 2 or more, or rounds to 2")  # fmt: skip
  taken = {"bm25", sources.DENSE}
  for path in mine.runs:
    name = pathlib.Path(path).name
    if not pathlib.Path(path).is_file():
      raise InputError("no such run file", path=path)
    if name in taken:
      raise InputError("two sources of one name", path=path, fix="Give the run file a name of its own")
    taken.add(name)


def check_data(settings: Settings, data: Format) -> None:
  """Raises InputError where the data lack a split, negatives, judgements or answers that the settings want."""
  if settings.data.format == "text":
    return
  _check_splits(settings, data.splits())
  if settings.rounds:
    _check_negatives(settings, data)
  answered = evaluate.answered(settings.evaluate.measures, settings.evaluate.answers)
  judged = [name for name in settings.evaluate.measures if name not in answered]
  for split in settings.evaluate.splits:
    if judged and next(iter(data.judgements(split)), None) is None:
      raise InputError(f"nothing is judged in split {split}, which {judged[0]} needs", path=settings.data.dir,
                       fix=f"Leave {split} out of evaluate.splits, or measure Success@k by answers")  # fmt: skip
    if answered and not any(query.answers for query in data.queries(split)):
      raise InputError(f"evaluate.answers is set, and no query of split {split} has one", path=settings.data.dir,
                       fix="Set evaluate.answers to False, or leave the split out")  # fmt: skip


def _check_splits(settings: Settings, known: tuple[str, ...]) -> None:
  data, trains = settings.data, settings.rounds > 0
  wanted = {"data.train_split": (data.train_split,)} if trains else {}
  wanted["evaluate.splits"] = settings.evaluate.splits
  pretraining, cross = settings.pretrain, settings.cross
  tries = [settings.train.evaluate_every if trains else 0, pretraining.enabled and pretraining.evaluate_every,
           cross.enabled and cross.evaluate_every]  # fmt: skip
  if any(tries) and data.dev_split:
    wanted["data.dev_split"] = (data.dev_split,)
  advice = {"data.dev_split": "; '' for none", "data.train_split": "; to train nothing, set rounds to 0"}
  for field, names in wanted.items():
    for name in names:
      if name not in known:
        raise InputError(f"{field} names a split that is not here", path=data.dir, value=name,
                         fix=f"There are {', '.join(known)}{advice.get(field, '')}")  # fmt: skip


def _check_negatives(settings: Settings, data: Format) -> None:
  asked = {"train.negatives": settings.train.negatives} if settings.train.passages > 1 else {}
  asked |= {"cross.negatives": settings.cross.negatives} if settings.cross.enabled else {}
  for field, named in asked.items():
    if named == "source" and next(iter(data.negatives(settings.data.train_split)), None) is None:
      raise InputError(f"{field} is 'source', and no negatives come with this data", path=settings.data.dir,
                       fix=f"Set {field} to bm25 or random; MS MARCO's are a file of their own")  # fmt: skip


def check_devices(settings: Settings, stages: set[str]) -> None:
  """Raises InputError where the devices that are here cannot share the weights or the batches of these stages."""
  train, cross, devices = settings.train, settings.cross, jax.device_count()
  if any(stage.startswith("train") for stage in stages):
    steps.check_chunk("train.query_chunk", train.query_chunk, train.queries)
    steps.check_chunk("train.passage_chunk", train.passage_chunk, train.queries * train.passages)
  if "cross" in stages:
    steps.check_chunk("cross.chunk", cross.chunk, cross.queries * cross.passages)
  if "pretrain" in stages:
    spans, processes = settings.pretrain.spans, hosts.TEAM.count
    by_rules(convert.abstract_params(encoder_of(settings), np.float32), meshes.make_mesh(fsdp=settings.fsdp))
    if spans < 4 or spans % (2 * processes) or spans % devices:
      raise InputError(f"pretrain.spans must be pairs that {processes} processes and {devices} devices share evenly",
                       value=spans)  # fmt: skip
    chunk_count(spans, devices, settings.pretrain.chunk, "span")
