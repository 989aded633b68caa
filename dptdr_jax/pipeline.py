"""Runs the stages of a run that are not yet done, and clears what a change has made stale.

A stage is done when its manifest carries the key that it has today (see `stages.order`). A stage that was begun under
another key is cleared first, but for parts of it that depend on less and on nothing that has changed: nothing of two
configs is ever mixed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import logging
import pathlib
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from dptdr_jax.core import files, lock, manifest, progress, remote
from dptdr_jax.core.errors import DptdrError, InputError, PassingError
from dptdr_jax.core.mirror import Mirror
from dptdr_jax.runtime import hosts
from dptdr_jax.stages import order, report
from dptdr_jax.stages.layout import Layout
from dptdr_jax.stages.order import Planned, Stage

_log = logging.getLogger(__name__)

_SEEN_WITHIN_S = 90  # what one process writes by all others; NFS looks up what it knows of a directory once a minute


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
    order.check(config)

  def made_from() -> list:  # the first process alone hashes the files from outside
    planned = order.plan(config, layout, verify)
    for item in planned if mirror else ():
      mirror.fetch(item.stage.name, item.key, item.made_from, item.stage.beside)
    return [[item.made_from, item.key] for item in planned]

  said = hosts.first_says(made_from)
  _agree_on_directory(config, layout)
  planned = [Planned(stage, *named) for stage, named in zip(order.stages(config), said, strict=True)]
  chosen = _choose([item.stage.name for item in planned], only)
  todo = [item.stage for item in planned if not _is_done(layout, item.stage, item.key)]
  wanted = [stage for stage in todo if stage.name in chosen]
  _check_inputs(wanted, [stage.name for stage in todo if stage not in wanted])
  for stage in wanted:
    stage.fits(config)
  for item in planned:
    stage = item.stage
    done = _is_done(layout, stage, item.key)
    hosts.barrier(f"before {stage.name}")  # nobody begins while another one looks
    if stage.name in chosen and done:
      _log.info("%s: done before", stage.name)
    elif stage.name in chosen:
      _execute(stage, config, layout, item.made_from, item.key, mirror)
      done = True
    if done and mirror:
      mirror.keep(stage.name, item.key)
  last = planned[-2]  # before the report
  if hosts.is_main() and _is_done(layout, last.stage, last.key):
    progress.say(report.table(config, layout, seconds(layout, config)))


def _check_inputs(wanted: Sequence[Stage], missing: Sequence[str]) -> None:
  """Raises DptdrError where stages that are to run read one of those that are neither done nor chosen."""
  for name in missing:
    if readers := [stage.name for stage in wanted if name in stage.inputs]:
      needs = f"{', '.join(readers)} need{'s' * (len(readers) == 1)} it"
      raise DptdrError(f"stage {name} is not done, and {needs}; add it to --stages")


def _agree_on_directory(config: ConfigDict, layout: Layout) -> None:
  """Writes DIR/run.json: the whole config of the latest start, and where it ran.

  Raises:
    InputError: what the first process writes is not what this one finds there.
  """
  start, path = uuid.uuid4().hex, layout.root / "run.json"

  def written() -> str:
    where = {"processes": hosts.process_count(), "devices": jax.device_count(), "kind": jax.devices()[0].device_kind}
    about = {"start": start, "versions": _versions(), **where, "command": sys.argv, "config": config.to_dict()}
    files.write_json(path, about)
    return start

  said, deadline = hosts.first_says(written), time.monotonic() + _SEEN_WITHIN_S
  while not (seen := path.is_file() and files.read_json(path)["start"] == said) and time.monotonic() < deadline:
    time.sleep(0.5)
  if not seen:
    raise InputError(f"process {hosts.process_index()} does not see the first one's --workdir", path=layout.root,
                     fix="Name one directory that all processes share")  # fmt: skip


def share(config: ConfigDict, workdir: files.Path, others: Sequence[files.Path]) -> list[str]:
  """Links the stages that other runs have done and this one would do the same; returns their names.

  A stage whose key is that of another run's has the same files, whatever the rest of the two configs says; and so have
  the kept parts of one where these agree.
  """
  layout, shared = Layout.of(workdir), []
  for item in order.plan(config, layout):
    stage, directory = item.stage, layout.stage(item.stage.name)
    if stage.beside or _is_done(layout, stage, item.key):
      continue
    theirs = [Layout.of(other).stage(stage.name) for other in others]
    made = {source: found for source in theirs if (found := manifest.read(source / manifest.NAME)) is not None}
    same = [source for source in made if made[source]["key"] == item.key]
    if same:
      files.link_tree(same[0], directory)
      shared.append(stage.name)
    elif not directory.exists() and (found := _kept_elsewhere(item, made)):
      _link_kept(item, found, directory)
      shared.append(f"{' and '.join(found)} of {stage.name}")
  return shared


def _kept_elsewhere(item: Planned, made: Mapping[pathlib.Path, Mapping[str, Any]]) -> dict[str, pathlib.Path]:
  """Where each part is that a stage keeps; what a stage of its name made (train1/corpus), where that has the same key,
  and what a saved retriever did, where its files are the same.

  Args:
    made: manifests of the same stage, by directory.
  """
  found: dict[str, pathlib.Path] = {}
  ours = item.made_from
  alike = {source: item.stage.kept_of(about["made_from"], ours) for source, about in made.items()}
  for part, source in ((part, source) for source, parts in alike.items() for part in parts):
    maker = part.partition("/")[0]
    theirs = made[source]["made_from"]
    same = [of["stages"].get(maker) or of["files"].get("retrievers", {}).get(maker) for of in (ours, theirs)]
    if (source / part).exists() and same[0] == same[1]:
      found.setdefault(part, source)
  return found


def _link_kept(item: Planned, found: Mapping[str, pathlib.Path], directory: pathlib.Path) -> None:
  """Begins a stage with the parts that it keeps, each of the directory of another run's."""
  with files.atomic_directory(directory) as partial:
    for part, source in found.items():
      files.link_tree(source / part, partial / part)
    files.write_json(partial / manifest.BEGUN, _record(item.stage, item.key, item.made_from, 0.0))


def seconds(layout: Layout, config: ConfigDict) -> dict[str, float]:
  """Returns the time that each finished stage took, in seconds, over all its attempts."""
  found = {}
  for stage in order.stages(config):
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
      patterns = stage.kept_of(before["made_from"], description)
      kept = [found.relative_to(directory).as_posix() for part in patterns for found in directory.glob(part)]
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
  for stage in itertools.takewhile(lambda stage: stage.name != reader.name, order.stages(config)):
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
  return {
    name: importlib.metadata.version(name) for name in ("dptdr_jax", "jax", "flax", "optax", "faiss-cpu", "numpy")
  }
