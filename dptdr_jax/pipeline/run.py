"""Runs a config: plans its artefacts, makes those that are missing, and links what people look for."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from dptdr_jax import backbone as backbones
from dptdr_jax.core import files, lock, marks, progress, remote
from dptdr_jax.core.errors import DptdrError, InputError
from dptdr_jax.core.fingerprints import Fingerprints
from dptdr_jax.core.remote_store import RemoteStore
from dptdr_jax.core.store import MARK, Store, refs_of
from dptdr_jax.pipeline import rules
from dptdr_jax.pipeline.foundations import Foundations
from dptdr_jax.pipeline.graph import Graph, Node
from dptdr_jax.pipeline.outside import Outside
from dptdr_jax.reporting import tables
from dptdr_jax.runtime import hosts
from dptdr_jax.settings import Settings

_log = logging.getLogger(__name__)

RUN = "run.json"  # in the working directory: says that it is ours, and how the run was last started
_FORMAT = 2
_LAST_S = 15.0  # for what is on its way to the remote when a run ends
_SEEN_WITHIN_S = 90  # what one process writes by all others; NFS looks up what it knows of a directory once a minute


def run(
  config: ConfigDict, workdir: files.Path, only: Sequence[str] = (), *, store: files.Path | None = None,
  verify: bool = False, url: str | None = None, prune: bool = False,
) -> Graph:  # fmt: skip
  """Makes what is not there yet, and prints a table.

  Args:
    config: see docs/configuration.md.
    workdir: directory of the run.
    only: names of stages ('train' means all rounds); empty: all.
    store: directory of the artefacts, which several runs may share; default: WORKDIR/store.
    verify: compare checksums of files from outside and of artefacts, where otherwise size and time decide.
    url: remote directory of the store's copy.
    prune: afterwards remove the artefacts that no run of the store reaches.

  Raises:
    InputError: another run is at work in the directory, the directory is somebody else's, or what can be known to fail
      before any work.
  """
  settings = Settings.of(config)
  if not str(workdir):
    raise InputError("--workdir is empty", fix="Name a directory")
  if remote.is_remote(workdir):
    raise InputError("a run works on local files", path=workdir, fix="Name a local --workdir and --remote=URL")
  hosts.TEAM.patience_s = settings.wait_seconds
  workdir = pathlib.Path(workdir).expanduser()
  place = pathlib.Path(store).expanduser() if store else workdir / "store"
  if hosts.TEAM.is_main:
    _claim(workdir)
  with lock.exclusive(workdir) if hosts.TEAM.is_main else contextlib.nullcontext():
    copy = RemoteStore(url, place / "aside" / _name_of(workdir)) if url and hosts.TEAM.is_main else None
    opened = Store(place, team=hosts.TEAM, remote=copy, verify=verify)
    try:
      return _run(settings, workdir, opened, only, prune)
    finally:
      if copy is not None:
        copy.last(_LAST_S)


def _run(settings: Settings, workdir: pathlib.Path, store: Store, only: Sequence[str], prune: bool) -> Graph:
  graph = plan(settings, store)
  _agree_on_directory(settings, workdir)
  chosen = _choose(graph.stages, only)
  if store.team.is_main:
    store.root_of(_name_of(workdir), workdir, list(graph.nodes))
  todo = set(
    store.team.first_says(lambda: [str(ref) for ref, node in graph.nodes.items() if not store.has(node.kind, ref)])
  )
  wanted = [node for node in graph.nodes.values() if node.stage in chosen and str(node.ref) in todo]
  _check_reachable(graph, wanted, chosen, todo)
  rules.check_devices(settings, {node.stage for node in wanted})
  for stage in chosen:
    nodes = [node for node in graph.nodes.values() if node.stage == stage]
    if all(str(node.ref) not in todo for node in nodes):
      _log.info("%s: done before", stage)
    for node in nodes:
      _make(store, node, workdir)
  if store.team.is_main:
    if all(store.has(node.kind, ref) for ref, node in graph.nodes.items()):
      _say(graph, store, workdir)
    if prune:
      count, size = store.prune()
      progress.say(f"pruned: {count} artefacts, {size / 1e6:,.1f} MB")
  return graph


def _name_of(workdir: pathlib.Path) -> str:
  """What a run is called in a store that several share."""
  return files.sha256_of(str(workdir.resolve()).encode())[:16]


def plan(settings: Settings, store: Store) -> Graph:
  """Checks the settings, and says which artefacts the run has; the first process alone reads files from outside."""
  if not store.team.is_main:
    rules.check(settings)

  def known() -> dict[str, str]:
    rules.check(settings)
    outside = Outside(Fingerprints(store.root / "inputs.json", store.verify))
    rules.check_data(settings, Foundations(settings, outside).format)
    _warn_of_vectors(settings)
    Graph(settings, outside)
    return outside.known

  return Graph(settings, Outside(known=store.team.first_says(known)))


def _warn_of_vectors(settings: Settings) -> None:
  """Warns where the backbone was published with another pooling or normalisation."""
  if not rules.starts_from_nothing(settings):
    published = backbones.published_vectors(backbones.locate(settings.backbone.path))
    if other := {name: value for name, value in published.items() if value != settings.get(f"vector.{name}")}:
      flags = " ".join(f"--config.vector.{name}={value}" for name, value in other.items())
      _log.warning("this backbone was published with other vectors: %s", flags)


def _claim(workdir: pathlib.Path) -> None:
  """Accepts a directory that is empty, or that a run has made; one that holds something else stays untouched."""
  path = workdir / RUN
  about = _read(path)
  if about is None:
    inside = [name for name in (os.listdir(workdir) if workdir.is_dir() else []) if name not in ("lock", "logs")]
    if inside and not marks.has(workdir / "store", MARK):  # whose run.json is lost
      raise InputError("the directory is not empty and not a run's", path=workdir, value=sorted(inside)[:3],
                       fix="Name an empty or a new --workdir")  # fmt: skip
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      files.write_json(path, {"kind": "dptdr_jax run", "format": _FORMAT})
    except OSError as error:
      raise InputError(f"the directory cannot be written ({error.strerror})", path=workdir) from error
  elif "format" not in about:
    _log.warning("%s is of an earlier version, whose files are not read: the run begins anew in %s/store", workdir,
                 workdir)  # fmt: skip


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  """run.json of ours, of this version or an earlier one; None: it is not."""
  with contextlib.suppress(InputError):
    about = files.read_json(path) if path.is_file() else None
    if isinstance(about, dict) and (about.get("kind") == "dptdr_jax run" or {"start", "versions"} <= about.keys()):
      return about
  return None


def _agree_on_directory(settings: Settings, workdir: pathlib.Path) -> None:
  """Writes DIR/run.json, all settings of the latest start and where it ran, and checks that every process sees it."""
  start, path = uuid.uuid4().hex, workdir / RUN

  def written() -> str:
    where = {
      "processes": hosts.TEAM.count,
      "devices": jax.device_count(),
      "kind_of_device": jax.devices()[0].device_kind,
    }
    names = ("dptdr_jax", "jax", "flax", "optax", "faiss-cpu", "numpy")
    about = {"kind": "dptdr_jax run", "format": _FORMAT, "start": start, **where, "command": sys.argv}
    about |= {"versions": {name: importlib.metadata.version(name) for name in names}, "config": settings.model_dump()}
    files.write_json(path, about)
    return start

  said, deadline = hosts.TEAM.first_says(written), time.monotonic() + _SEEN_WITHIN_S
  while not (seen := (_read(path) or {}).get("start") == said) and time.monotonic() < deadline:
    time.sleep(0.5)
  if not seen:
    raise InputError(f"process {hosts.TEAM.index} does not see the first one's --workdir", path=workdir,
                     fix="Name one directory that all processes share")  # fmt: skip


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


def _check_reachable(graph: Graph, wanted: Iterable[Node], chosen: Sequence[str], todo: set[str]) -> None:
  """Raises DptdrError where a stage reads an artefact that is neither there nor made by a chosen stage."""
  for node in wanted:
    for ref in refs_of(node.inputs):
      if str(ref) in todo and graph.nodes[ref].stage not in chosen:
        raise DptdrError(f"stage {graph.nodes[ref].stage} is not done, and {node.stage} needs it; add it to --stages")


def _make(store: Store, node: Node, workdir: pathlib.Path) -> None:
  if store.team.is_main and any(not inside for inside in node.links.values()) and not store.has(node.kind, node.ref):
    _link(store, node, workdir, store.partial(node.ref))  # curves can be read as they grow
  store.get(node.kind, node.inputs)
  if store.team.is_main:
    _link(store, node, workdir, store.path(node.ref))


def _link(store: Store, node: Node, workdir: pathlib.Path, target: pathlib.Path) -> None:
  """Points the links of an artefact to where it is; what is not a link of ours stays, with a warning."""
  for name, inside in node.links.items():
    link, to = workdir / name, target / inside if inside else target
    if inside and not to.exists():
      continue
    if os.path.lexists(link) and not _is_ours(link):
      _log.warning("%s is not a link of this run and stays; the new one is %s", link, to)
      continue
    wanted = os.path.relpath(to.resolve(), link.parent.resolve())
    if link.is_symlink() and os.readlink(link) == wanted:
      continue
    link.parent.mkdir(parents=True, exist_ok=True)
    partial = link.with_name(f".{link.name}.link")
    partial.unlink(missing_ok=True)
    partial.symlink_to(wanted)
    partial.replace(link)


def _is_ours(link: pathlib.Path) -> bool:
  """Whether a path is a link into a store: any other file or link is somebody else's."""
  return link.is_symlink() and any(marks.has(parent, MARK) for parent in link.resolve().parents)


def _say(graph: Graph, store: Store, workdir: pathlib.Path) -> None:
  """Prints the table, and the time that each stage's artefacts took over all attempts."""
  seconds = dict.fromkeys(graph.stages, 0.0)
  for node in graph.nodes.values():
    seconds[node.stage] += store.about(node.ref)["seconds"]
  directory, results, summary = store.path(graph.report), None, None
  ended = [f"report: {workdir / 'report.html'}"]
  if (directory / "results.json").exists():
    results, summary = (files.read_json(directory / name) for name in ("results.json", "summary.json"))
  else:
    ended.insert(0, f"backbone: {workdir / 'pretrain' / 'backbone'}")
  progress.say(tables.results(results, summary, seconds, ended))


def opened(workdir: files.Path) -> tuple[Settings, pathlib.Path]:
  """The settings that a run was last started with, and its directory: for commands that read a run.

  Raises:
    InputError: no run of this version is there.
  """
  path = pathlib.Path(workdir).expanduser()
  about = _read(path / RUN)
  if about is None or "config" not in about or about.get("format") != _FORMAT:
    raise InputError("no run of this version here", path=path, fix="Run it first: python -m dptdr_jax.main")
  return Settings.model_validate(about["config"]), path


def artefact(workdir: files.Path, link: str) -> pathlib.Path:
  """Where a link of a run leads.

  Raises:
    InputError: nothing is there yet.
  """
  path = pathlib.Path(workdir).expanduser() / link
  if not path.exists():
    raise InputError("this run has not made it", path=path)
  return path.resolve()
