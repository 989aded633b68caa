"""The stages of a run in order: what each reads, and the key that this gives it.

A stage's key is a hash of its config fields, of the keys of the stages before it and of the files from outside, by
their contents: equal keys, equal files.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from dptdr_jax.core import files, manifest, remote
from dptdr_jax.stages import (
  common,
  corpora,
  cross,
  encode,
  evaluate,
  mine,
  prepare,
  pretrain,
  report,
  scratch,
  search,
  sources,
  systems,
  train,
)
from dptdr_jax.stages.layout import Layout


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage.

  Attributes:
    run: its function (config, workdir).
    fields: the config fields it reads.
    unread: of a section that it reads, the fields that it does not.
    inputs: the stages whose files it reads.
    files: the files from outside that it depends on, in groups by name, which may nest.
    splits: those whose queries it reads of what is prepared; the corpus it may always read.
    text_alone: what it makes depends on the text that is prepared and not on its token stores: templates do not count.
    together: all processes of the run work in it; else the first one alone, and the others wait.
    beside: what it writes outside of its own directory, by path from the run's.
    kept: parts of its directory, as patterns, that are not made again where nothing else has changed than what stands
      beside each: fields ('config.a.b'), inputs ('stages.a'; 'stages': all) and groups of files ('files.a').
    fits: raises InputError where the devices that are here cannot do it; what is done needs none of them.
    repair: how a file that broke after the end is made again: with the 'part' of the directory that it is in, as a
      'file' of its own (the stage looks for what is not whole), or '' not at all (it was chosen on the way to the end).
  """

  name: str
  run: Callable[[ConfigDict, files.Path], None]
  fields: tuple[str, ...]
  unread: tuple[str, ...] = ()
  inputs: tuple[str, ...] = ()
  files: Callable[[ConfigDict], Mapping[str, Any]] = lambda config: {}
  splits: tuple[str, ...] = ()
  text_alone: bool = False
  together: bool = True
  beside: tuple[str, ...] = ()
  kept: Mapping[str, Collection[str]] = dataclasses.field(default_factory=dict)
  fits: Callable[[ConfigDict], None] = lambda config: None
  repair: Literal["part", "file", ""] = "part"

  def kept_of(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Its kept parts that are the same, made from this or from that."""
    return [part for part, beside in self.kept.items()
            if not manifest.differences(*(manifest.without(each, beside) for each in (one, other)))]  # fmt: skip


# Fields of a stage that cannot change what it makes, but for the order in which sums are rounded, as the number of
# devices does too; they stay out of its key.
NEUTRAL = (
  "train.query_chunk", "train.passage_chunk", "train.remat", "cross.chunk",
  "pretrain.chunk", "pretrain.remat", "pretrain.fsdp",
  "train.loader_workers", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints",
  "encode.batch_tokens", "encode.shard_passages", "index.device_bytes",
  "data.dir", "data.download", "backbone.path", "backbone.sha256",  # their files are hashed
  "evaluate.retrievers",  # and theirs, by their names
  "data.train_split", "data.dev_split",  # of what learns from them, which names them
  "cross.depth", "cross.rerank",  # of what uses it, not of its training
  "cross.loader_workers", "cross.log_every", "cross.checkpoint_every", "cross.keep_checkpoints",
  "pretrain.loader_workers", "pretrain.log_every", "pretrain.checkpoint_every", "pretrain.keep_checkpoints",
  "pretrain.evaluate_every",
)  # fmt: skip

# What mine0 reads of `mine`: there is no retriever yet, and no cross-encoder. Another margin of the retriever's is no
# reason to train round 1 anew.
MINED_FIRST = (
  "mine.bm25", "mine.outside", "mine.runs", "mine.same_text", "mine.near_duplicate", "mine.width",
)  # fmt: skip

# What `prepare` reads for its token stores alone.
OF_TOKENS = ("config.text.query_template", "config.text.passage_template", "config.data.max_stored_tokens")

MANY_FILES = 16  # more are told by one hash over all


def stages(config: ConfigDict) -> list[Stage]:
  """Returns the stages of a run, in order."""
  texts = ("text.separator", "text.query_template", "text.passage_template")
  model = ("compute_dtype", "backbone", "text", "vector")
  wanted = ("pretrain.tokenizer", "pretrain.vocabulary", "pretrain.shape", "pretrain.corpora", "seed")
  baselines = ("evaluate.backbone", "evaluate.other_poolings")
  made = wanted if scratch.is_wanted(config) else ()  # then prepare trains the tokenizer
  prepared = Stage(
    "prepare", prepare.run, ("data", "backbone", *texts, *made), files=prepare.outside_files, together=False,
    kept=dict.fromkeys(prepare.OF_CORPUS, ("files.splits",)),
  )  # fmt: skip
  first = [prepared]
  if config.pretrain.enabled:
    fields = ("seed", "pretrain", "compute_dtype", "backbone", "text.separator", "vector.pooling")
    beside = (*(f"pretrain.{name}" for name in config.pretrain if name not in pretrain.OF_TOKENS), "vector.pooling")
    tokens = {"tokens": [f"config.{name}" for name in ("seed", "compute_dtype", *beside)]}
    first.append(
      Stage(
        "pretrain", pretrain.run, fields, inputs=("prepare",), files=_corpora, text_alone=True,
        fits=pretrain.check_devices, kept=tokens,
      )
    )  # fmt: skip
  names = tuple(stage.name for stage in first)
  if not common.has_queries(config):
    return [*first, Stage("report", report.run, (), inputs=names, together=False, beside=("report.html",))]
  rounds = list(_rounds(config, names, model))
  names = ("prepare", *(stage.name for stage in rounds))
  trained = ("prepare", *(name for name in names if name.startswith("train")))
  encoded = (*trained, "pretrain") if config.pretrain.enabled and not config.rounds else trained
  judged = tuple(config.evaluate.splits)
  return [
    *first,
    *rounds,
    Stage(
      "encode", encode.run, ("encode", "rounds", "evaluate.splits", *baselines, *model), inputs=encoded,
      files=_retrievers, splits=judged, repair="file",
      kept={f"{system}/corpus": encode.BESIDE_CORPUS for system in systems.dense(config)},
    ),
    Stage(
      "evaluate",
      evaluate.run,
      ("evaluate", "index", "rounds", "cross.enabled", "cross.rerank"),
      inputs=(*trained, *(["cross"] if config.cross.enabled else []), "encode"),
      splits=judged,
      together=False,
      beside=("results.json",),
      kept=dict.fromkeys(evaluate.FOUND, ("config", "corpus", "files", "stages")),
    ),
    Stage(
      "report", report.run, (), inputs=(*names, "evaluate"), splits=judged, together=False, beside=("report.html",)
    ),
  ]  # fmt: skip


def _corpora(config: ConfigDict) -> dict[str, Any]:
  return {"corpora": corpora.outside_files(config)}


def _runs(config: ConfigDict) -> dict[str, Any]:
  return {"runs": mine.outside_files(config)}


def _retrievers(config: ConfigDict) -> dict[str, Any]:
  return {"retrievers": systems.outside_files(config)}


def _rounds(config: ConfigDict, before: tuple[str, ...], model: tuple[str, ...]) -> Iterator[Stage]:
  """Training, and before each round (but the first, unless it wants BM25's negatives) mining; the cross-encoder."""
  inputs, learned = before, (config.data.train_split,)
  tried = (*learned, config.data.dev_split)
  refreshed = config.train.refresh_every > 0
  scored = ("cross.depth",) if config.mine.cross_encoder else ()
  for number in range(1, config.rounds + 1):
    if number > 1 or common.mines_first(config):
      fields = ("mine", "encode", "index", *scored, *model) if number > 1 else MINED_FIRST
      fields += ("data.train_split",)
      mined = functools.partial(mine.run, number=number - 1)
      kept = sources.kept(config, number - 1)
      yield Stage(f"mine{number - 1}", mined, fields, inputs=inputs, files=_runs, splits=learned, kept=kept)
      inputs = (*inputs, f"mine{number - 1}")
    if number == 1 and config.cross.enabled:
      fields = ("seed", "cross", "data.train_split", "data.dev_split", *(name for name in model if name != "vector"))
      drawn = inputs if config.cross.negatives == "bm25" else before
      crossed = Stage("cross", cross.run, fields, inputs=drawn, splits=tried, fits=cross.check_devices, repair="")
    early = number == 1 and config.cross.enabled and config.mine.cross_encoder and refreshed
    if early:  # it denoises what is mined while round 1 trains
      yield crossed
      inputs = (*inputs, "cross")
    fields = ("seed", "train", "prompt", "data.train_split", "data.dev_split", *model)
    fields += ("mine", "encode", "index", *scored) if refreshed else ()
    first = number == 1 and not refreshed  # before anything is mined by a retriever
    fields += () if first else ("mine.pseudo_positives",)
    yield Stage(
      f"train{number}", functools.partial(train.run, number=number), fields,
      unread=("train.restart",) if number == 1 else (),
      inputs=inputs if not first or common.draws_from_bm25(config) else before,
      files=_runs if refreshed else lambda config: {}, splits=tried, fits=train.check_devices, repair="",
    )  # fmt: skip
    inputs = (*inputs, f"train{number}")
    if number == 1 and config.cross.enabled and not early:
      yield crossed
      inputs = (*inputs, "cross") if config.mine.cross_encoder else inputs


class Planned(NamedTuple):
  """A stage, what it will be made from, and the key that this gives: equal keys, equal files."""

  stage: Stage
  made_from: dict
  key: str


@dataclasses.dataclass(frozen=True)
class Outside:
  """The files from outside, by name and contents.

  Attributes:
    fingerprints: their hashes.
    homes: directories whose files are named from there, by their own names, the first that a file is in.
  """

  fingerprints: manifest.Fingerprints
  homes: Mapping[str, pathlib.Path]

  def hashes(self, found: Mapping[str, Any] | Sequence[files.Path]) -> dict[str, Any]:
    """{name: SHA-256} of files, in the groups they come in; of many one hash over all."""
    if isinstance(found, Mapping):
      return {name: self.hashes(group) for name, group in found.items()}
    named = {self._name(path): sha256 for path, sha256 in self.fingerprints.of(found).items()}
    return {f"{len(named)} files": manifest.key_of(named)} if len(named) > MANY_FILES else named

  def _name(self, path: files.Path) -> str:
    """From the directory of the data or the backbone on; else the URL it was fetched from, or its path."""
    for name, home in self.homes.items():
      if pathlib.Path(path).is_relative_to(home):
        return f"{name}/{pathlib.Path(path).relative_to(home).as_posix()}"
    return remote.origin(path)


def check(config: ConfigDict) -> None:
  """Raises InputError for what a config alone shows to fail."""
  common.check(config)
  systems.check(config)
  if common.trains(config):
    mine.check(config)
  search.check(config, common.encoder_config(config).hidden_size)
  if config.pretrain.enabled:
    pretrain.check(config)
  if config.cross.enabled:
    cross.check(config, common.encoder_config(config))


def plan(config: ConfigDict, layout: Layout, verify: bool = False) -> list[Planned]:
  """Checks the config and says what its stages will be made from.

  Raises:
    InputError: whatever can be known to fail before any work is done.
  """
  check(config)
  homes = {**prepare.homes(config), **systems.homes(config)}
  outside = Outside(manifest.Fingerprints(layout.root / "inputs.json", verify), homes)
  planned: list[Planned] = []
  for stage in stages(config):
    made_from = _describe(stage, config, planned, outside)
    planned.append(Planned(stage, made_from, manifest.key_of(made_from)))
  return planned


def _describe(stage: Stage, config: ConfigDict, before: Sequence[Planned], outside: Outside) -> dict[str, Any]:
  plain, unread = config.to_dict(), {*NEUTRAL, *_overruled(config), *stage.unread}
  fields = {}
  for name in stage.fields:
    value = functools.reduce(lambda at, part: at[part], name.split("."), plain)
    if isinstance(value, dict):
      value = {key: item for key, item in value.items() if f"{name}.{key}" not in unread}
    fields[name] = value
  found = {"config": fields, "files": outside.hashes(stage.files(config))}
  keys = {item.stage.name: item.key for item in before if item.stage.name in stage.inputs}
  if "prepare" in keys:  # of which it reads the corpus, and some of the splits
    prepared = before[0].made_from
    found["corpus"] = manifest.key_of(_part(prepared, (), stage.text_alone))
    keys["prepare"] = manifest.key_of(_part(prepared, stage.splits, stage.text_alone))
  return found | {"stages": keys}


def _part(prepared: Mapping[str, Any], splits: Sequence[str], text_alone: bool) -> dict[str, Any]:
  """What the corpus and some splits are made from, or their text alone."""
  return manifest.without(prepare.part_of(prepared, splits), OF_TOKENS if text_alone else ())


def _overruled(config: ConfigDict) -> Iterator[str]:
  """Fields that others keep from being read."""
  for section in ("train", "cross", "pretrain"):
    if config[section].steps:
      yield from (f"{section}.epochs", f"{section}.tokens")
  if config.pretrain.tokens:
    yield "pretrain.epochs"
  if config.train.sampling != "simans":
    yield from ("train.simans_source", "train.simans_a", "train.simans_b")
  if not config.mine.cross_encoder:
    yield from ("mine.negative_below", "mine.positive_above")
  if config.data.source != "beir":
    yield "data.empty_text"
  if not scratch.is_wanted(config):
    yield from ("pretrain.vocabulary", "pretrain.shape")
