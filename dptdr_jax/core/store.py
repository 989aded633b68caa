"""Artefacts: directories that one function makes from declared inputs, found again by a key over these inputs.

  STORE/dptdr.json               says that the directory is ours.
  STORE/KIND/KEY/                finished: its files, and artefact.json (inputs, seconds, sizes, SHA-256).
  STORE/KIND/KEY.partial/        an unfinished one: begun.json, and what the next attempt resumes from (checkpoints/).
  STORE/KIND/KEY.lock            held (flock) by the process that makes it.
  STORE/roots/                   which artefacts each run reaches: what `prune` keeps.

A build function gets its inputs and nothing else: a field that is not declared there cannot be read, so it cannot be
missing in the key. Fields that are declared neutral (they change rounding or speed) stay out of the key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import pydantic

from dptdr_jax.core import files, lock, marks
from dptdr_jax.core.errors import DptdrError, InputError, RetryableError
from dptdr_jax.core.team import SOLO, Team

_log = logging.getLogger(__name__)

ABOUT, BEGUN = "artefact.json", "begun.json"
_CHECKPOINTS = "checkpoints"  # and checkpoints.damaged: not of the finished artefact
MARK = "dptdr_jax store"  # the kind in dptdr.json
_PARTIAL = ".partial"
_ARTEFACT = re.compile(r"[a-z0-9_]+/[0-9a-f]{20}(?=/|$)")
_LOOK_S = 2.0  # between two attempts to take a lock that another process holds
_VERSIONS = ("dptdr_jax", "jax", "flax", "optax", "faiss-cpu", "numpy")


class Inputs(pydantic.BaseModel):
  """What one artefact is made from: plain values, settings, `Ref`s of other artefacts, hashes of files."""

  model_config = pydantic.ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


def neutral(default: Any = ...) -> Any:
  """Declares a field that cannot change a result but for rounding: it stays out of the key."""
  return pydantic.Field(default, json_schema_extra={"neutral": True})


class Ref(NamedTuple):
  """Names an artefact; `str(ref)` is its path in the store."""

  kind: str
  key: str

  def __str__(self) -> str:
    return f"{self.kind}/{self.key}"


@dataclasses.dataclass(frozen=True)
class Kind:
  """How one kind of artefact is made.

  Attributes:
    name: of its directory in the store.
    format: of its files; a higher number makes all of them again.
    build: (inputs, making) → None: writes the files into making.directory, or goes on with what is there.
    together: all processes of the run call `build`; else the first one alone does, and the others wait.
    chosen: training chose it on the way, so that a damaged one is an error instead of hours of work again.
  """

  name: str
  format: int
  build: Callable[[Any, Making], None]
  together: bool = True
  chosen: bool = False

  def ref(self, inputs: Inputs) -> Ref:
    """The artefact that these inputs give."""
    text = json.dumps([self.name, self.format, described(inputs)], sort_keys=True, ensure_ascii=False)
    return Ref(self.name, hashlib.sha256(text.encode()).hexdigest()[:20])


@dataclasses.dataclass(frozen=True)
class Making:
  """What a build function works with.

  Attributes:
    directory: where its files go; what a killed attempt left is there.
    team: the processes that call it.
    checkpoint: tells the remote copy that what is in `directory` is a state to resume from.
  """

  directory: pathlib.Path
  team: Team
  checkpoint: Callable[[], None]
  _store: Store
  _allowed: frozenset[Ref]

  def path(self, ref: Ref) -> pathlib.Path:
    """The directory of an artefact that the inputs name.

    Raises:
      DptdrError: the inputs do not name it.
    """
    if ref not in self._allowed:
      raise DptdrError(f"a build read {ref}, which its inputs do not declare")
    return self._store.path(ref)


class Store:
  """The artefacts of one or several runs in one directory."""

  def __init__(self, root: files.Path, *, team: Team = SOLO, remote: Any = None, verify: bool = False):
    """Opens the directory, or makes it.

    Args:
      team: the processes of the run; the first one alone writes outside of what is being built.
      remote: a `core.remote_store.RemoteStore`, in the first process; None: no remote copy.
      verify: compare the checksum of every file where otherwise its size decides.

    Raises:
      InputError: there is something else in the directory.
    """
    self.root, self.team, self.verify = pathlib.Path(root), team, verify
    self.remote = remote if team.is_main else None
    if team.is_main:
      with lock.held(self.root / "lock"):  # several runs may begin it at the same time
        marks.claim(self.root, MARK)
    self._whole: set[Ref] = set()  # looked at already in this process

  def path(self, ref: Ref) -> pathlib.Path:
    """The directory of a finished artefact."""
    return self.root / ref.kind / ref.key

  def partial(self, ref: Ref) -> pathlib.Path:
    """The directory of an unfinished one."""
    return self.root / ref.kind / f"{ref.key}{_PARTIAL}"

  def about(self, ref: Ref) -> dict[str, Any]:
    """What artefact.json says."""
    return read_about(self.path(ref))

  def has(self, kind: Kind, ref: Ref) -> bool:
    """Whether the artefact is finished and whole; a damaged one is removed, one that is only remote is fetched.

    Raises:
      DamagedError: it is damaged, and was chosen on the way (`Kind.chosen`).
    """
    if ref in self._whole:
      return True
    path = self.path(ref)
    if not path.exists():
      if self.remote is None or not self.remote.fetch(str(ref), path):
        return False
      _log.info("%s: fetched", ref)
    if reason := damage(path, self.verify):
      self._discard(ref, reason, kind.chosen)
      return self.remote is not None and self.has(kind, ref)
    if self.remote is not None:
      self.remote.upload(str(ref), path)
    self._whole.add(ref)
    return True

  def _discard(self, ref: Ref, reason: str, chosen: bool) -> None:
    path = self.path(ref)
    if chosen:
      raise DamagedError(f"{reason}: training chose it on the way, and it is not made again by itself", path=path,
                           fix="Remove this directory to train it again")  # fmt: skip
    _log.warning("%s: %s; it is made again", path, reason)
    self._whole.discard(ref)
    files.remove(path)

  def get(self, kind: Kind, inputs: Inputs) -> Ref:
    """Makes an artefact, unless it is there; every process of the run calls it.

    Raises:
      InputError, Preempted, …: as the build function.
      RetryableError: another artefact was damaged; the next start makes it again.
    """
    ref = kind.ref(inputs)
    if not self.team.first_says(lambda: self.has(kind, ref)):
      path, waiting = self.path(ref).with_name(f"{ref.key}.lock"), f"{ref} is being made by %s: waiting"
      alone = lock.held(path, wait_s=_LOOK_S, on_wait=functools.partial(_log.info, waiting))
      with alone if self.team.is_main else contextlib.nullcontext():
        if not self.team.first_says(lambda: self.has(kind, ref)):  # another run has made it meanwhile
          self._build(kind, ref, inputs)
    self._whole.add(ref)
    return ref

  def _build(self, kind: Kind, ref: Ref, inputs: Inputs) -> None:
    directory, started = self.partial(ref), time.monotonic()
    whole = self.team.first_says(lambda: self._begin(kind, ref, inputs))
    before = float(files.fields_in(directory / BEGUN).get("seconds", 0.0))  # of earlier attempts

    def build() -> None:
      checkpoint = functools.partial(self.remote.snapshot, str(ref), directory) if self.remote else lambda: None
      making = Making(directory, self.team, checkpoint, self, frozenset(refs_of(inputs)))
      try:
        kind.build(inputs, making)
      except BaseException as error:
        if self.team.is_main:
          with contextlib.suppress(OSError, DptdrError):  # a full disk refuses this too
            seconds = before + time.monotonic() - started
            files.write_json(directory / BEGUN, _record(kind, ref, inputs, seconds))
        files.raise_if_full(error, directory)
        if isinstance(error, InputError):
          self._repair(error)
        raise

    if not whole:
      build() if kind.together else self.team.first_says(build)
      self.team.barrier(f"{ref} is built")
    self.team.first_says(lambda: self._finish(kind, ref, inputs, before + time.monotonic() - started))

  def _begin(self, kind: Kind, ref: Ref, inputs: Inputs) -> bool:
    """Makes or fetches the directory; True: a killed attempt has left nothing to do but to rename it."""
    directory = self.partial(ref)
    if self.remote is not None and not directory.exists() and self.remote.fetch_partial(str(ref), directory):
      _log.info("%s: its newest checkpoint is fetched", ref)
    whole = (directory / ABOUT).is_file()
    if whole or (directory / BEGUN).is_file():
      _log.info("%s: goes on", ref)
    else:
      files.remove(directory)
      directory.mkdir(parents=True)
      files.write_json(directory / BEGUN, _record(kind, ref, inputs, 0.0))
    return whole

  def _finish(self, kind: Kind, ref: Ref, inputs: Inputs, seconds: float) -> None:
    # Killed before artefact.json is there, the next attempt still has the checkpoints; afterwards it needs none.
    directory = self.partial(ref)
    if not (directory / ABOUT).is_file():
      listed = files.listing(directory, skips=_is_scratch)
      for name in listed:
        files.sync(directory / name)
      versions = {name: importlib.metadata.version(name) for name in _VERSIONS}
      about = _record(kind, ref, inputs, seconds) | {"versions": versions, "chosen": kind.chosen, "files": listed}
      files.write_json(directory / ABOUT, about)
    for path in filter(_is_scratch, directory.iterdir()):
      files.remove(path)
    files.rename(directory, self.path(ref))
    if self.remote is not None:
      self.remote.upload(str(ref), self.path(ref))

  def _repair(self, error: InputError) -> None:
    """Removes the artefact whose file an error names, if its bytes are not those that were written.

    Raises:
      RetryableError: in place of the error; the next start makes it again.
    """
    place = os.path.relpath(os.path.realpath(error.path or self.root), self.root.resolve())
    if not (owner := _ARTEFACT.match(place)):
      return
    ref = Ref(*owner[0].split("/"))
    if reason := damage(self.path(ref), verify=True):
      if self.team.is_main and (about := files.fields_in(self.path(ref) / ABOUT)):  # else the next start knows its kind
        self._discard(ref, reason, bool(about.get("chosen")))
      raise RetryableError(f"{str(error).rstrip('.')}. The next start makes {ref} again") from error

  def root_of(self, name: str, workdir: files.Path, reached: Collection[Ref]) -> None:
    """Notes what a run reaches, so that `prune` in another run of this store keeps it."""
    about = {"workdir": str(pathlib.Path(workdir).resolve()), "artefacts": sorted(map(str, reached))}
    files.write_json(self.root / "roots" / f"{name}.json", about)

  def prune(self) -> tuple[int, int]:
    """Removes what no run of this store reaches any more; returns how many artefacts and bytes.

    A run counts as long as its working directory is there. Nothing is removed that is not an artefact.
    """
    reached: set[str] = set()
    for path in sorted((self.root / "roots").glob("*.json")):
      about = files.read_json(path)
      with files.fields_of(path):
        workdir, artefacts = pathlib.Path(about["workdir"]), set(about["artefacts"])
      if workdir.is_dir():
        reached |= artefacts
      else:
        files.remove(path)
    removed, size = [], 0
    for path in sorted(self.root.glob("*/*")):
      name = f"{path.parent.name}/{path.name.removesuffix(_PARTIAL)}"
      if _ARTEFACT.fullmatch(name) and path.is_dir() and name not in reached:
        size += sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
        files.remove(path)
        removed.append(name)
    if self.remote is not None:  # what other machines made there stays
      self.remote.remove(set(removed) & self.remote.names())
    return len(removed), size


class DamagedError(InputError):
  """An artefact is damaged that is not made again by itself."""


def described(value: Any) -> Any:
  """Inputs as JSON has them, without neutral fields."""
  if isinstance(value, pydantic.BaseModel):
    fields = type(value).model_fields
    return {name: described(getattr(value, name)) for name in fields if not is_neutral(fields[name])}
  if isinstance(value, Ref):
    return str(value)
  if isinstance(value, dict):
    return {str(name): described(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [described(item) for item in value]
  return value.value if isinstance(value, enum.Enum) else value


def is_neutral(field: pydantic.fields.FieldInfo) -> bool:
  """Whether a field of a model is declared neutral."""
  extra = field.json_schema_extra
  return isinstance(extra, dict) and bool(extra.get("neutral"))


def refs_of(value: Any) -> Iterator[Ref]:
  """The artefacts that inputs name."""
  if isinstance(value, Ref):
    yield value
  elif isinstance(value, pydantic.BaseModel):
    for name in type(value).model_fields:
      yield from refs_of(getattr(value, name))
  elif isinstance(value, dict | list | tuple):
    for item in value.values() if isinstance(value, dict) else value:
      yield from refs_of(item)


def read_about(directory: pathlib.Path) -> dict[str, Any]:
  """artefact.json of a directory.

  Raises:
    InputError: it is missing or not of its form.
  """
  about = files.read_json(directory / ABOUT)
  kinds = {"files": dict, "key": str, "seconds": int | float}
  well_formed = isinstance(about, dict) and all(isinstance(about.get(name), kind) for name, kind in kinds.items())
  if not well_formed or not all(isinstance(row, list) and len(row) == 2 for row in about["files"].values()):
    raise InputError("not of an artefact's form", path=directory / ABOUT)
  return about


def damage(directory: pathlib.Path, verify: bool) -> str:
  """What is wrong with a finished artefact, '' where nothing is: sizes are compared, with `verify` checksums too."""
  try:
    about = read_about(directory)
  except InputError as error:
    return str(error)
  if about["key"] != directory.name:
    return f"{ABOUT} is of another artefact"
  return files.difference(directory, about["files"], verify)


def _is_scratch(path: pathlib.Path) -> bool:
  """Whether something in the directory of an unfinished artefact is no part of the finished one."""
  return path.name == BEGUN or path.name.partition(".")[0] == _CHECKPOINTS


def _record(kind: Kind, ref: Ref, inputs: Inputs, seconds: float) -> dict[str, Any]:
  about = {"kind": kind.name, "format": kind.format, "key": ref.key, "inputs": described(inputs)}
  return about | {"seconds": round(seconds, 1)}
