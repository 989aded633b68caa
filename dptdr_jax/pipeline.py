"""The stages of a run in order: which are done, what each reads, and what a change makes stale.

A stage is done when its manifest carries the key that its config fields, the stages before it and the files from
outside give today. A stage that was begun under another key is cleared first, but for parts of it that depend on
less and on nothing that has changed: nothing of two configs is ever mixed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from dptdr_jax.core import files, lock, manifest, progress, remote
from dptdr_jax.core.errors import DptdrError, InputError, PassingError
from dptdr_jax.core.mirror import Mirror
from dptdr_jax.runtime import hosts
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
  train,
)
from dptdr_jax.stages.layout import Layout

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage.

  Attributes:
    run: its function (config, workdir).
    fields: the config fields it reads.
    inputs: the stages whose files it reads.
    files: the files from outside that it depends on, in groups by name, which may nest.
    splits: those whose queries it reads of what is prepared; the corpus it may always read.
    together: all processes of the run work in it; else the first one alone, and the others wait.
    beside: what it writes outside of its own directory, by path from the run's.
    kept: parts of its directory that do not depend on what `after` names, and are not made again for it.
    after: fields ('config.a.b'), inputs ('stages.a'; 'stages': all) and groups of files ('files.a').
    repair: how a file that broke after the end is made again: with the 'part' of the directory that it is in, as a
      'file' of its own (the stage looks for what is not whole), or '' not at all (it was chosen on the way to the end).
  """

  name: str
  run: Callable[[ConfigDict, files.Path], None]
  fields: tuple[str, ...]
  inputs: tuple[str, ...] = ()
  files: Callable[[ConfigDict], Mapping[str, Any]] = lambda config: {}
  splits: tuple[str, ...] = ()
  together: bool = True
  beside: tuple[str, ...] = ()
  kept: tuple[str, ...] = ()
  after: frozenset[str] = frozenset()
  repair: Literal["part", "file", ""] = "part"

  def has_kept_of(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether there are kept parts, and made from this or from that they are the same."""
    return bool(self.kept) and not manifest.differences(*(manifest.without(each, self.after) for each in (one, other)))


# Fields of a stage that cannot change what it makes, but for the order in which sums are rounded, as the number of
# devices does too; they stay out of its key.
NEUTRAL = (
  "train.query_chunk", "train.passage_chunk", "train.remat", "cross.chunk",
  "pretrain.chunk", "pretrain.remat", "pretrain.fsdp",
  "train.loader_workers", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints",
  "encode.batch_tokens", "index.device_bytes",
  "data.dir", "data.download", "backbone.path", "backbone.sha256",  # their files are hashed
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
    kept=prepare.OF_CORPUS, after=frozenset({"files.splits"}),
  )  # fmt: skip
  pretrained = []
  if config.pretrain.enabled:
    fields = ("seed", "pretrain", "compute_dtype", "backbone", "text.separator", "vector.pooling")
    beside = (*(f"pretrain.{name}" for name in config.pretrain if name not in pretrain.OF_TOKENS), "vector.pooling")
    tokens = {"kept": ("tokens",), "after": frozenset(f"config.{name}" for name in ("seed", "compute_dtype", *beside))}
    pretrained = [Stage("pretrain", pretrain.run, fields, ("prepare",), files=_corpora, **tokens)]
  rounds = list(_rounds(config, ("prepare", *(stage.name for stage in pretrained)), model))
  names = ("prepare", *(stage.name for stage in rounds))
  judged = tuple(config.evaluate.splits)
  return [
    prepared,
    *pretrained,
    *rounds,
    Stage(
      "encode", encode.run, ("encode", "rounds", "evaluate.splits", *baselines, *model), names, splits=judged,
      kept=tuple(f"{system}/corpus" for system in common.dense_systems(config)), after=encode.BESIDE_CORPUS,
      repair="file",
    ),
    Stage(
      "evaluate",
      evaluate.run,
      ("evaluate", "index", "rounds", "cross.enabled", "cross.rerank"),
      (*names, "encode"),
      splits=judged,
      together=False,
      beside=("results.json",),
    ),
    Stage("report", report.run, (), (*names, "evaluate"), splits=judged, together=False, beside=("report.html",)),
  ]  # fmt: skip


def _corpora(config: ConfigDict) -> dict[str, Any]:
  return {"corpora": corpora.outside_files(config)}


def _runs(config: ConfigDict) -> dict[str, Any]:
  return {"runs": mine.outside_files(config)}


def _rounds(config: ConfigDict, before: tuple[str, ...], model: tuple[str, ...]) -> Iterator[Stage]:
  """Training, and before each round (but the first, unless it wants BM25's negatives) mining; the cross-encoder."""
  inputs, learned = before, (config.data.train_split,)
  tried = (*learned, config.data.dev_split)
  for number in range(1, config.rounds + 1):
    if number > 1 or common.mines_first(config):
      fields = ("mine", "encode", "index", "cross.depth", *model) if number > 1 else MINED_FIRST
      fields += ("data.train_split",)
      mined = functools.partial(mine.run, number=number - 1)
      parts = {"kept": mine.SEARCHED, "after": mine.AFTER_SEARCH}
      yield Stage(f"mine{number - 1}", mined, fields, inputs, _runs, learned, **parts)
      inputs = (*inputs, f"mine{number - 1}")
    if number == 1 and config.cross.enabled:
      fields = ("seed", "cross", "data.train_split", "data.dev_split", *model)
      crossed = Stage("cross", cross.run, fields, inputs, splits=tried, repair="")
    early = number == 1 and config.cross.enabled and config.mine.cross_encoder and bool(config.train.refresh_every)
    if early:  # it denoises what is mined while round 1 trains
      yield crossed
      inputs = (*inputs, "cross")
    fields = ("seed", "train", "prompt", "mine.pseudo_positives", *model)
    fields += ("mine", "encode", "index", "cross.depth") if config.train.refresh_every else ()
    outside = {"files": _runs} if config.train.refresh_every else {}
    trained = functools.partial(train.run, number=number)
    yield Stage(f"train{number}", trained, fields, inputs, splits=tried, repair="", **outside)
    inputs = (*inputs, f"train{number}")
    if number == 1 and config.cross.enabled and not early:
      yield crossed
      inputs = (*inputs, "cross") if config.mine.cross_encoder else inputs


def run(
  config: ConfigDict, workdir: files.Path, only: Sequence[str] = (), verify: bool = False, url: str | None = None
) -> None:
  """Runs what is not yet done.

  Args:
    config: see configs/base.py.
    workdir: directory of the run.
    only: names of stages to run ('train' means all of its rounds); empty: all.
    verify: hash the files from outside again instead of trusting their size and time.
    url: remote directory of the run's safe copy, see `core.mirror`; None: there is none.

  Raises:
    InputError: another run is at work in the directory, or what can be known to fail before any work is done.
  """
  if remote.is_remote(workdir):
    raise InputError("a run works on local files", path=workdir, fix="Name a local --workdir and --remote=URL")
  hosts.be_patient(config.wait_seconds)
  with lock.exclusive(workdir) if hosts.is_main() else contextlib.nullcontext():
    mirror = Mirror(url, workdir) if url and hosts.is_main() else None  # the first process alone moves files
    _run(config, Layout.of(workdir), only, verify, mirror)


def _run(config: ConfigDict, layout: Layout, only: Sequence[str], verify: bool, mirror: Mirror | None) -> None:
  if not hosts.is_main():
    check(config)

  def made_from() -> list:  # the first process alone hashes the files from outside
    planned = plan(config, layout, verify)
    for item in planned if mirror else ():
      mirror.fetch(item.stage.name, item.key, item.made_from, item.stage.beside)
    return [[item.made_from, item.key] for item in planned]

  planned = [Planned(stage, *said) for stage, said in zip(stages(config), hosts.first_says(made_from), strict=True)]
  chosen = _choose([item.stage.name for item in planned], only)
  for item in planned:
    stage = item.stage
    done = _is_done(layout, stage, item.key)
    hosts.barrier(f"before {stage.name}")  # nobody begins while another one looks
    if stage.name not in chosen:
      if not done and any(stage.name in later.stage.inputs for later in planned if later.stage.name in chosen):
        raise DptdrError(f"stage {stage.name} is not done, and {', '.join(chosen)} needs it; add it to --stages")
    elif done:
      _log.info("%s: done before", stage.name)
    else:
      _execute(stage, config, layout, item.made_from, item.key, mirror)
      done = True
    if done and mirror:
      mirror.keep(stage.name, item.key)
  measured = next(item for item in planned if item.stage.name == "evaluate")
  if hosts.is_main() and _is_done(layout, measured.stage, measured.key):
    progress.say(report.table(layout, seconds(layout, config)))


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
    homes: directories whose files are named from there, by their own names.
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
  for part in (common, mine, search):
    part.check(config)
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
  outside = Outside(manifest.Fingerprints(layout.root / "inputs.json", verify), prepare.homes(config))
  planned: list[Planned] = []
  for stage in stages(config):
    made_from = _describe(stage, config, planned, outside)
    planned.append(Planned(stage, made_from, manifest.key_of(made_from)))
  return planned


def share(config: ConfigDict, workdir: files.Path, others: Sequence[files.Path]) -> list[str]:
  """Links the stages that other runs have done and this one would do the same; returns their names.

  A stage whose key is that of another run's has the same files, whatever the rest of the two configs says; and so have
  the kept parts of one where these agree.
  """
  layout, shared = Layout.of(workdir), []
  for item in plan(config, layout):
    stage, directory = item.stage, layout.stage(item.stage.name)
    if stage.beside or _is_done(layout, stage, item.key):
      continue
    theirs = [Layout.of(other).stage(stage.name) for other in others]
    made = {source: found for source in theirs if (found := manifest.read(source / manifest.NAME)) is not None}
    same = [source for source in made if made[source]["key"] == item.key]
    alike = [source for source in made if stage.has_kept_of(made[source]["made_from"], item.made_from)]
    if same:
      files.link_tree(same[0], directory)
      shared.append(stage.name)
    elif alike and not directory.exists():
      parts = _link_kept(item, alike[0], directory)
      shared.append(f"{' and '.join(parts)} of {stage.name}")
  return shared


def _link_kept(item: Planned, source: pathlib.Path, directory: pathlib.Path) -> list[str]:
  """Begins a stage with what it keeps of another run's; returns the names of these parts."""
  parts = [part for part in item.stage.kept if (source / part).exists()]
  with files.atomic_directory(directory) as partial:
    for part in parts:
      files.link_tree(source / part, partial / part)
    files.write_json(partial / manifest.BEGUN, _record(item.stage, item.key, item.made_from, 0.0))
  return parts


def seconds(layout: Layout, config: ConfigDict) -> dict[str, float]:
  """Returns the time that each finished stage took, in seconds, over all its attempts."""
  found = {}
  for stage in stages(config):
    if (made := manifest.read(layout.stage(stage.name) / manifest.NAME)) is not None:
      found[stage.name] = made["seconds"]
  return found


def _choose(names: list[str], only: Sequence[str]) -> list[str]:
  if not only:
    return names
  chosen = []
  for wanted in only:
    matching = [name for name in names if name == wanted or name.rstrip("0123456789") == wanted]
    if not matching:
      raise DptdrError(f"no stage is named {wanted!r}; this run has {', '.join(names)}")
    chosen += matching
  return [name for name in names if name in chosen]


def _describe(stage: Stage, config: ConfigDict, before: Sequence[Planned], outside: Outside) -> dict[str, Any]:
  plain, unread = config.to_dict(), {*NEUTRAL, *_overruled(config)}
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
    found["corpus"] = manifest.key_of(_part(prepared, ()))
    keys["prepare"] = manifest.key_of(_part(prepared, stage.splits))
  return found | {"stages": keys}


def _part(prepared: Mapping[str, Any], splits: Sequence[str]) -> dict[str, Any]:
  """What the corpus and some splits are made from."""
  outside = prepared["files"]
  kept = {name: outside["splits"][name] for name in splits if name in outside["splits"]}
  return {**prepared, "files": {**outside, "splits": kept}}


def _overruled(config: ConfigDict) -> Iterator[str]:
  """Fields that others keep from being read."""
  for section in ("train", "cross", "pretrain"):
    if config[section].steps:
      yield from (f"{section}.epochs", f"{section}.tokens")
  if config.pretrain.tokens:
    yield "pretrain.epochs"
  if config.data.source != "beir":
    yield "data.empty_text"
  if not scratch.is_wanted(config):
    yield from ("pretrain.vocabulary", "pretrain.shape")


def _is_done(layout: Layout, stage: Stage, key: str) -> bool:
  found = manifest.read(layout.stage(stage.name) / manifest.NAME)
  return found is not None and found["key"] == key


def _execute(
  stage: Stage, config: ConfigDict, layout: Layout, description: dict, key: str, mirror: Mirror | None
) -> None:
  if hosts.is_main():
    _execute_first(stage, config, layout, description, key, mirror)
  else:
    hosts.barrier(f"{stage.name} is begun")
    if stage.together:
      try:
        stage.run(config, layout.root)
      except InputError as error:
        _set_back(error, stage, config, layout)
        raise
  hosts.barrier(f"after {stage.name}", whom="the others" if stage.together else "process 0")


def _record(stage: Stage, key: str, made_from: Mapping[str, Any], spent: float) -> dict:
  return {"stage": stage.name, "key": key, "made_from": made_from, "seconds": spent}


def _execute_first(
  stage: Stage, config: ConfigDict, layout: Layout, description: dict, key: str, mirror: Mirror | None
) -> None:
  """The first process runs a stage, with the others where it is for all, and keeps the books."""
  directory = layout.stage(stage.name)
  begun = directory / manifest.BEGUN
  spent = 0.0
  if begun.exists():
    before = files.read_json(begun)
    if before["key"] != key:
      changes = manifest.differences(before["made_from"], description)
      same = stage.has_kept_of(before["made_from"], description)
      kept = [part for part in stage.kept if same and (directory / part).exists()]
      _log.info("%s: done anew%s, because of %s", stage.name, f" but for {', '.join(kept)}" if kept else "",
                "; ".join(changes) or "a newer layout")  # fmt: skip
      manifest.clear(directory, kept)
      for name in stage.beside:
        files.remove(layout.root / name)
    else:
      _log.info("%s: goes on", stage.name)
      spent = before["seconds"]
  else:
    files.remove(directory)  # a directory without begun.json is nobody's
  directory.mkdir(parents=True, exist_ok=True)
  record = _record(stage, key, description, spent)
  (directory / manifest.NAME).unlink(missing_ok=True)
  files.write_json(begun, record)
  hosts.barrier(f"{stage.name} is begun")
  started = time.monotonic()
  with mirror.follow(stage.name, key) if mirror else contextlib.nullcontext():
    try:
      stage.run(config, layout.root)
    except BaseException as error:
      with contextlib.suppress(OSError, DptdrError):  # where the disk is full this cannot be written either
        files.write_json(begun, record | {"seconds": spent + time.monotonic() - started})
      files.raise_if_full(error, directory)
      if isinstance(error, InputError):
        _set_back(error, stage, config, layout)
      raise
  spent = round(spent + time.monotonic() - started, 1)
  record |= {"seconds": spent, "versions": _versions(), "sizes": manifest.sizes(directory)}
  files.write_json(directory / manifest.NAME, record)


def _set_back(error: InputError, reader: Stage, config: ConfigDict, layout: Layout) -> None:
  """Makes a stage unfinished where what a later one cannot read is gone, or not of the size it was.

  Raises:
    PassingError: the next start makes them again; another process may have set the stage back.
  """
  if error.path is None:
    return
  path = pathlib.Path(error.path).resolve()
  for stage in itertools.takewhile(lambda stage: stage.name != reader.name, stages(config)):
    directory = layout.stage(stage.name).resolve()
    if not stage.repair or not path.is_relative_to(directory):
      continue
    made = manifest.read(directory / manifest.NAME)
    if made is not None:
      here, below = manifest.sizes(directory), path.relative_to(directory)
      broken = [name for name, size in made["sizes"].items()
                if here.get(name) != size and pathlib.PurePath(name).is_relative_to(below)]  # fmt: skip
      if not broken:
        return
      files.remove(directory / manifest.NAME)
      for part in {name.partition("/")[0] for name in broken if stage.repair == "part"}:
        files.remove(directory / part)
    raise PassingError(f"{error}. The next start makes it again, in stage {stage.name}") from error


def _versions() -> dict[str, str]:
  return {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "faiss-cpu", "numpy")}
