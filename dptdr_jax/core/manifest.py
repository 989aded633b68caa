"""What a finished stage was made from, and whether that is still so.

A stage's key is a hash over the config fields that it reads, the keys of the stages before it, and the contents of the
files from outside. Files are hashed once; afterwards their size and time decide, unless `verify` asks for the bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError

_log = logging.getLogger(__name__)

NAME = "manifest.json"
BEGUN = "begun.json"  # what a stage puts first into its directory: the same, of what is not finished yet


class Fingerprints:
  """SHA-256 of files from outside, remembered in one JSON file by path, size and modification time."""

  def __init__(self, path: files.Path, verify: bool = False):
    self._path, self._verify = pathlib.Path(path), verify
    self._known: dict[str, dict] = read(path) or {}
    self._seen: dict[str, str] = {}  # within one process a file is looked at once

  def of(self, paths: Iterable[files.Path]) -> dict[str, str]:
    """Returns {path: SHA-256} of `paths`; a file that is missing is an InputError."""
    found = {}
    changed = False
    for path in paths:
      name = os.fspath(path)
      if name not in self._seen:
        changed |= self._look(name)
      found[name] = self._seen[name]
    if changed:
      files.write_json(self._path, self._known)
    return found

  def _look(self, name: str) -> bool:
    try:
      state = os.stat(name)
    except OSError as error:
      raise InputError("no such file", path=name) from error
    known = self._known.get(name, {})
    if not self._verify and (known.get("size"), known.get("mtime_ns")) == (state.st_size, state.st_mtime_ns):
      self._seen[name] = known["sha256"]
      return False
    self._seen[name] = files.sha256(name)
    self._known[name] = {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": self._seen[name]}
    return True


def read(path: files.Path) -> dict[str, Any] | None:
  """What a manifest says; None where there is none, or one that cannot be read: the stage is then as if not done."""
  if not pathlib.Path(path).exists():
    return None
  try:
    return files.read_json(path)
  except InputError as error:
    _log.warning("%s; it counts as absent", error)
    return None


def sizes(directory: pathlib.Path) -> dict[str, int]:
  """Bytes of every file below a directory, by path from there."""
  found = {}
  for path in sorted(directory.rglob("*")):
    if path.is_file():
      found[path.relative_to(directory).as_posix()] = path.stat().st_size
  return found


def key_of(description: Mapping[str, Any]) -> str:
  """Returns a hash (16 hexadecimal digits) of a JSON-able description."""
  text = json.dumps(description, sort_keys=True, ensure_ascii=False)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def without(description: Mapping[str, Any], names: Collection[str], prefix: str = "") -> dict[str, Any]:
  """Returns a nested description without the entries of these names ('a.b')."""
  return {
    name: without(value, names, f"{prefix}{name}.") if isinstance(value, Mapping) else value
    for name, value in description.items()
    if f"{prefix}{name}" not in names
  }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
  """Returns one readable line for each leaf in which two nested descriptions differ: 'a.b: 1 → 2'."""
  lines = []
  for name in sorted({*old, *new}):
    before, after = old.get(name), new.get(name)
    if isinstance(before, Mapping) and isinstance(after, Mapping):
      lines += differences(before, after, f"{prefix}{name}.")
    elif json.dumps(before) != json.dumps(after):  # as stored: a tuple comes back as a list
      lines.append(f"{prefix}{name}: {before!r} → {after!r}")
  return lines


def clear(directory: pathlib.Path, kept: Collection[str] = ()) -> None:
  """Removes a stage's directory; where parts of it ('a', 'b/c') are kept, all but these and what says how it was begun.

  Killed meanwhile it leaves a stage that is not done, under its old key, so that the next call clears the rest.
  """
  if not kept:
    files.remove(directory)
    return
  files.remove(directory / NAME)
  _clear_beside(directory, {directory / part for part in (*kept, BEGUN)})


def _clear_beside(directory: pathlib.Path, kept: Collection[pathlib.Path]) -> None:
  for path in sorted(directory.iterdir()):
    if path in kept:
      continue
    if path.is_dir() and any(path in part.parents for part in kept):
      _clear_beside(path, kept)
    else:
      files.remove(path)
