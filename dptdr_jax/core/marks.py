"""Directories that are ours: nothing is written, replaced or removed in one that is not."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError

NAME = "dptdr.json"
FORMAT = 1


def claim(directory: files.Path, kind: str) -> None:
  """Makes a directory ours, or accepts one that is: it carries dptdr.json of this kind, or is empty or absent.

  Raises:
    InputError: it holds something else, which stays untouched, or cannot be written.
  """
  path = pathlib.Path(directory)
  if has(path, kind):
    return
  try:
    path.mkdir(parents=True, exist_ok=True)
    inside = [name for name in os.listdir(path) if name not in ("lock", f"{NAME}.partial")]
    if inside:
      raise InputError(f"the directory is not empty and not a {kind} of ours", path=path, value=sorted(inside)[:3],
                       fix="Name an empty or a new directory")  # fmt: skip
    files.write_json(path / NAME, {"kind": kind, "format": FORMAT})
  except OSError as error:
    raise InputError(f"the directory cannot be written ({error.strerror})", path=path) from error


def has(directory: files.Path, kind: str) -> bool:
  """Whether a directory carries our mark of this kind."""
  return files.fields_in(pathlib.Path(directory, NAME)).get("kind") == kind


def check_replaceable(directory: files.Path, is_ours: Callable[[pathlib.Path], bool]) -> None:
  """Raises InputError unless a directory is absent, empty, or what the caller wrote there before."""
  path = pathlib.Path(directory)
  if path.is_dir() and any(path.iterdir()) and not is_ours(path):
    raise InputError("the directory holds something else, which would be replaced", path=path,
                     fix="Name an empty or a new directory")  # fmt: skip
  if path.exists() and not path.is_dir():
    raise InputError("a file is in the way of a directory", path=path)
