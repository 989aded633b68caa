"""Which tasks a server has: a manifest, and copies of their retrievers, checked before use.

In a state directory STATE/tasks.json is the manifest, written as a whole; `postgres_catalog` has it in a database.
retrievers/CONTENT holds the files of a retriever, CONTENT being their hash. A name in the manifest is never a path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pathlib
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files, remote
from dptdr_jax.core.errors import InputError
from dptdr_jax.reranker import CrossEncoder
from dptdr_jax.retriever import Retriever

log = logging.getLogger(__name__)

_FORMAT = 1
_NAME = re.compile(r"[a-z0-9_-]{1,64}")
_SUFFIXES = ("-query", "-passage")  # /v1/embeddings gives these a meaning
_MB = 1 << 20
MOST_BYTES = {  # of the files of a task; all that is read of a directory
  "retriever.json": _MB // 8, "prompts.safetensors": 512 * _MB, "search.json": _MB // 64,
  "cross_encoder/cross_encoder.json": _MB // 8, "cross_encoder/prompts.safetensors": 512 * _MB,
}  # fmt: skip
_NEEDED = ("retriever.json", "prompts.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib")
_LARGEST_HEADER = _MB  # of a safetensors file


@dataclasses.dataclass(frozen=True)
class Entry:
  """A task of the manifest.

  Attributes:
    content: hash over its retriever's files.
    collection: name of its documents, chosen by the server.
    approximate: vectors are searched in a graph.
    imported: what was imported as a whole into its documents: the corpus of a run.
  """

  name: str
  content: str
  collection: str
  approximate: bool = False
  imported: str = ""

  def fields(self) -> dict[str, Any]:
    """All but the name, as the manifest has them."""
    return {field: value for field, value in dataclasses.asdict(self).items() if field != "name"}


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A task whose files are read.

  Attributes:
    weight: of the vectors' scores in a fused ranking; None: fused by reciprocal rank.
  """

  entry: Entry
  retriever: Retriever
  cross_encoder: CrossEncoder | None
  weight: float | None


class Catalog:
  """The tasks of a server, and the files of their retrievers in a local directory. Not thread-safe.

  Where the manifest is, and whether other servers change it, a subclass says.

  Attributes:
    shared: other servers change it as well.
  """

  shared = False

  def __init__(self, home: pathlib.Path, backbone: Backbone):
    self._home, self._backbone = home, backbone
    self._entries: dict[str, Entry] = {}

  def __iter__(self) -> Iterator[Entry]:
    return iter(tuple(self._entries.values()))

  def get(self, name: str) -> Entry | None:
    """The task of a name."""
    return self._entries.get(name)

  def version(self) -> int:
    """A number that another server's change makes larger."""
    return 0

  def refresh(self) -> int:
    """Reads what other servers changed; returns the version that was read."""
    return 0

  def changing(self) -> contextlib.AbstractContextManager[None]:
    """While inside, no other server changes tasks or follows changes. `put` and `remove` are called inside."""
    return contextlib.nullcontext()

  def reading(self) -> contextlib.AbstractContextManager[None]:
    """While inside, no other server changes tasks."""
    return contextlib.nullcontext()

  def _write(self, entries: Mapping[str, Entry]) -> None:
    """Writes the manifest."""
    raise NotImplementedError

  def _fetch(self, content: str, directory: pathlib.Path) -> None:
    """Writes the files of a retriever, which are not here yet, into a directory."""
    raise InputError("the files of a task are missing", path=self._home / content, fix="Put the task again")

  def load(self, entry: Entry) -> Loaded:
    """Reads the files of a task.

    Raises:
      InputError: they are missing or damaged.
    """
    home = self._home / entry.content
    if not home.is_dir():
      with files.atomic_directory(home) as partial:
        self._fetch(entry.content, partial)
    weight = _weight(home / "search.json") if (home / "search.json").exists() else None
    cross = None
    if (home / "cross_encoder").is_dir():
      _check_description(home / "cross_encoder" / "cross_encoder.json", self._backbone)
      cross = CrossEncoder.load(home / "cross_encoder", self._backbone)
    _check_description(home / "retriever.json", self._backbone)
    return Loaded(entry, Retriever.load(home, self._backbone), cross, weight)

  def prepare(self, name: str, given: Mapping[str, pathlib.Path], approximate: bool) -> Loaded:
    """Copies and loads the files of a task that is added or replaced; the manifest does not have it yet.

    Args:
      given: files by their names in MOST_BYTES.

    Raises:
      InputError: a file is missing, too large, no safetensors, or of another backbone; nothing is kept.
    """
    content = check_files(given)
    home, former = self._home / content, self._entries.get(name)
    if not home.is_dir():
      with files.atomic_directory(home) as partial:
        for inside, path in given.items():
          (partial / inside).parent.mkdir(exist_ok=True)
          shutil.copyfile(path, partial / inside)
    collection = former.collection if former else uuid.uuid4().hex
    entry = Entry(check_name(name), content, collection, approximate, former.imported if former else "")
    try:
      return self.load(entry)
    except BaseException as error:
      self.sweep()
      if isinstance(error, InputError):  # a client reads it: where the state lies is not its business
        raise InputError(str(error).replace(f"{home}/", "")) from error
      raise

  def put(self, entry: Entry) -> None:
    """Writes the manifest with a task added or replaced."""
    entries = {**self._entries, entry.name: entry}
    self._write(entries)
    self._entries = entries

  def remove(self, name: str) -> None:
    """Writes the manifest without a task."""
    entries = {other: entry for other, entry in self._entries.items() if other != name}
    self._write(entries)
    self._entries = entries

  def sweep(self) -> None:
    """Removes local files of retrievers that no task has."""
    needed = {entry.content for entry in self._entries.values()}
    for path in self._home.glob("*") if self._home.is_dir() else ():
      if path.name not in needed:
        files.remove(path)


class DirectoryCatalog(Catalog):
  """The tasks in a state directory."""

  def __init__(self, state: files.Path, backbone: Backbone):
    """Reads the manifest.

    Raises:
      InputError: it is damaged, or its tasks are on another backbone.
    """
    super().__init__(pathlib.Path(state, "retrievers"), backbone)
    self._path = pathlib.Path(state, "tasks.json")
    if self._path.exists():
      about = files.read_json(self._path)
      with files.fields_of(self._path):
        if about["format"] != _FORMAT:
          raise InputError("tasks of another version", path=self._path, fix="Name another --state")
        if about["backbone"] != backbone.hash:
          raise InputError(f"its tasks are on another backbone than {backbone.path}", path=self._path,
                           fix="Name their backbone, or another --state")  # fmt: skip
        self._entries = {name: Entry(check_name(name), **fields) for name, fields in about["tasks"].items()}

  def _write(self, entries: Mapping[str, Entry]) -> None:
    listed = {name: entry.fields() for name, entry in sorted(entries.items())}
    files.write_json(self._path, {"format": _FORMAT, "backbone": self._backbone.hash, "tasks": listed})


def check_name(name: str) -> str:
  """Returns a valid name of a task.

  Raises:
    InputError: another one.
  """
  if not _NAME.fullmatch(name) or name.endswith(_SUFFIXES):
    raise InputError("not a name of a task", value=name,
                     fix="Use 1 to 64 of a-z, 0-9, - and _, and no -query or -passage at its end")  # fmt: skip
  return name


def files_of(directory: pathlib.Path, cross: pathlib.Path | None = None) -> dict[str, pathlib.Path]:
  """The files of a task in a retriever's directory, and in one of a cross-encoder.

  Raises:
    InputError: there is no retriever, or a pickle lies beside it.
  """
  if pickles := sorted(path.name for path in directory.glob("*") if path.suffix in _PICKLES):
    raise InputError("a file that may run code when it is loaded lies here", path=directory / pickles[0],
                     fix="Save the retriever again with Retriever.save, into a directory of its own")  # fmt: skip
  if not all((directory / name).is_file() for name in _NEEDED):
    raise InputError(f"no retriever here: {' and '.join(_NEEDED)} are needed", path=directory)
  cross = cross or directory / "cross_encoder"
  given = {name: directory / name for name in ("retriever.json", "prompts.safetensors", "search.json")}
  if cross.is_dir():
    given |= {f"cross_encoder/{name}": cross / name for name in ("cross_encoder.json", "prompts.safetensors")}
  return {name: path for name, path in given.items() if path.is_file()}


def files_at(place: str, allowed: Iterable[str]) -> dict[str, pathlib.Path]:
  """The files of a task in a directory or at a URL that a client names.

  Args:
    allowed: directories and URLs below which the operator allows that.

  Raises:
    InputError: it is not below one of them, or there is no retriever.
  """
  if remote.is_remote(place):
    if ".." in place.split("/") or not any(place.startswith(f"{one.rstrip('/')}/") for one in allowed):
      raise InputError("the operator of this server does not allow this URL", value=place, fix="See --allow")
    return files_of(remote.staged(place))
  resolved = pathlib.Path(place).resolve()
  roots = [pathlib.Path(one).resolve() for one in allowed if not remote.is_remote(one)]
  root = next((root for root in roots if resolved.is_relative_to(root)), None)
  if root is None:
    raise InputError("the operator of this server does not allow this directory", value=place, fix="See --allow")
  given = files_of(resolved)
  if outside := [path.name for path in given.values() if not path.resolve().is_relative_to(root)]:
    raise InputError("a link leads out of the directories that are allowed", value=outside[0])
  return given


def check_files(given: Mapping[str, pathlib.Path]) -> str:
  """Returns the hash over the files of a task, after a look at their sizes and headers.

  Raises:
    InputError: one is missing, too large, or no safetensors.
  """
  pairs = [("retriever.json", "prompts.safetensors")]
  if any(name.startswith("cross_encoder/") for name in given):
    pairs.append(("cross_encoder/cross_encoder.json", "cross_encoder/prompts.safetensors"))
  for name in (name for pair in pairs for name in pair):
    if name not in given:
      raise InputError("this file of the task is missing", value=name)
  for name, path in given.items():
    if (size := path.stat().st_size) > MOST_BYTES[name]:
      raise InputError(f"{size} bytes; at most {MOST_BYTES[name]} are accepted", value=name)
    if name.endswith(".safetensors"):
      _check_header(name, path, size)
  hashes = [(name, files.sha256(path)) for name, path in sorted(given.items())]
  return files.sha256_of(json.dumps(hashes).encode())[:32]


def _check_header(name: str, path: pathlib.Path, size: int) -> None:
  with open(path, "rb") as stream:
    length = int.from_bytes(stream.read(8), "little")
    first = stream.read(1)
  if size < 10 or first != b"{":
    raise InputError("not a safetensors file", value=name, fix="Save the retriever again with Retriever.save")
  if length > min(size - 8, _LARGEST_HEADER):
    raise InputError(f"not a safetensors file: a header of {length} bytes", value=name)


def _check_description(path: pathlib.Path, backbone: Backbone) -> None:
  """Raises InputError unless a retriever.json or cross_encoder.json names this backbone and no other one.

  It must not choose a directory that the server then loads.
  """
  about = files.read_json(path)
  named: Any = about.get("backbone") if isinstance(about, dict) else None
  if not isinstance(named, dict) or not isinstance(named.get("hash"), str) or not isinstance(named.get("path"), str):
    raise InputError("it does not name its backbone", value=path.name)
  if about.get("passage_backbone"):
    raise InputError("a retriever with two backbones cannot be served on one", value=path.name)
  if not backbone.is_named(named):
    raise InputError(
      f"trained on another backbone: {named['path'][:200]} with hash {named['hash'][:12]}…, and this server has "
      f"{backbone.hash[:12]}…", value=path.name,
    )  # fmt: skip


def _weight(path: pathlib.Path) -> float:
  about = files.read_json(path)
  weight = about.get("weight") if isinstance(about, dict) else None
  if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
    raise InputError('search.json has a "weight" from 0 to 1, the share of the vectors', value=weight)
  return float(weight)
