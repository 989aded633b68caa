"""Files that are whole or absent: everything is written beside its target and renamed."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from dptdr_jax.core.errors import DptdrError, InputError

Path = str | os.PathLike

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The same as libraries put it that lose the number; the last is numpy's way.
_FULL_WORDS = re.compile(r"No space left on device|Disk quota exceeded|File too large|requested and \d+ written")


def open_text(path: Path) -> TextIO:
  """Opens a UTF-8 text file for reading; gzip is recognised by its first two bytes, whatever the name."""
  if not os.path.isfile(path):
    raise InputError("no such file", path=path)
  with open(path, "rb") as raw:
    packed = raw.read(2) == b"\x1f\x8b"
  if packed:
    return gzip.open(path, "rt", encoding="utf-8")
  return open(path, encoding="utf-8")


def find_file(directory: Path, *names: str) -> pathlib.Path:
  """Returns the first of `names` (each as it is or with .gz behind) that exists in `directory`."""
  for name in names:
    for candidate in (pathlib.Path(directory, name), pathlib.Path(directory, name + ".gz")):
      if candidate.is_file():
        return candidate
  raise InputError(f"none of {', '.join(names)} (or the same with .gz) is here", path=directory)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[pathlib.Path]:
  """Yields a path beside `path` for a file or directory; it replaces `path` at the end, and is removed after an error.

  Raises:
    InputError: the disk is full.
  """
  target = pathlib.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  partial, replaced = (target.with_name(f"{target.name}.{state}") for state in ("partial", "replaced"))
  remove(partial)
  try:
    yield partial
    for written in (partial, *partial.rglob("*")):
      if written.is_file():
        sync(written)
    if partial.is_dir() and target.exists():  # a directory cannot be renamed onto one that is not empty
      remove(replaced)
      rename(target, replaced)
      rename(partial, target)
      remove(replaced)
    else:
      rename(partial, target)
  except BaseException as error:
    remove(partial)
    raise_if_full(error, target)
    raise


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[pathlib.Path]:
  """As `atomic_path`, with a directory that is there and empty."""
  with atomic_path(path) as partial:
    partial.mkdir()
    yield partial


def raise_if_full(error: BaseException, path: Path) -> None:
  """Raises an InputError that names `path` if `error`, or what caused it, came of a full disk.

  Libraries say it in many ways. An error that a user can read already is left alone.
  """
  causes = itertools.takewhile(lambda cause: not isinstance(cause, DptdrError), _causes(error))
  if any(map(_says_full, causes)):
    fix = "Free some and run the same command again: what is made already stays"
    raise InputError("no space left on the disk", path=path, fix=fix) from error


def is_full(error: BaseException) -> bool:
  """Whether an error, or what caused it, came of a full disk."""
  return any(map(_says_full, _causes(error)))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def _says_full(error: BaseException) -> bool:
  return getattr(error, "errno", None) in _FULL or bool(_FULL_WORDS.search(str(error)))


def is_input(error: OSError) -> bool:
  """Whether the system refuses a file for a reason that a restart does not change: no permission, a read-only disk."""
  return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def rename(source: Path, target: Path) -> None:
  """The one place where something finished takes its name. Tests of sudden death interrupt here."""
  os.replace(source, target)


def remove(path: Path) -> None:
  """Removes a file or a directory tree, if it is there; a tree is renamed first, then deleted.

  A kill in between leaves the renamed tree, which the next call deletes.
  """
  path = pathlib.Path(path)
  aside = path.with_name(f"{path.name}.removed")
  _delete(aside)
  if path.is_dir() and not path.is_symlink():
    path.rename(aside)
    _delete(aside)
  else:
    path.unlink(missing_ok=True)


def _delete(tree: pathlib.Path) -> None:
  """Deletes a tree in which another thread may still delete, as orbax does with old checkpoints."""
  while os.path.lexists(tree):
    with contextlib.suppress(FileNotFoundError):
      shutil.rmtree(tree)


def write_json(path: Path, value: Any) -> None:
  """Writes `value` as indented JSON, atomically."""
  with atomic_path(path) as partial:
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
  """Reads a JSON file; a broken one, or one that is not UTF-8, is an InputError that names file and line."""
  with open_text(path) as stream:
    try:
      return json.load(stream)
    except json.JSONDecodeError as error:
      raise InputError(f"broken JSON ({error.msg})", path=path, line=error.lineno) from error
    except UnicodeDecodeError as error:
      line = 1 + error.object.count(b"\n", 0, error.start)
      raise InputError("not UTF-8", path=path, line=line, value=error.object[error.start : error.start + 8]) from error
    except RecursionError as error:
      raise InputError("nested too deep", path=path) from error


def fields_in(path: Path) -> dict[str, Any]:
  """The fields of a JSON object; none where the file is missing, broken, or holds something else."""
  with contextlib.suppress(InputError):
    fields = read_json(path)
    return fields if isinstance(fields, dict) else {}
  return {}


@contextlib.contextmanager
def fields_of(path: Path) -> Iterator[None]:
  """Turns an error about a field that is missing, or unknown, into an InputError that names the JSON file."""
  try:
    yield
  except (KeyError, TypeError, AttributeError) as error:
    raise InputError(f"a field is missing, unknown or of another kind ({error})", path=path) from error


def sha256(path: Path) -> str:
  """SHA-256 of a file's bytes, in hexadecimal."""
  with open(path, "rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


def listing(directory: pathlib.Path, skips: Callable[[pathlib.Path], bool] = lambda child: False) -> dict[str, list]:
  """{name: [size, SHA-256]} of the files below a directory, without links and without the children that it skips."""
  children = [child for child in sorted(directory.iterdir()) if not skips(child)]
  paths = [path for child in children for path in (child, *sorted(child.rglob("*")))]
  return {
    path.relative_to(directory).as_posix(): [path.stat().st_size, sha256(path)]
    for path in paths
    if path.is_file() and not path.is_symlink()
  }


def difference(directory: pathlib.Path, listed: Mapping[str, Sequence], verify: bool = True) -> str:
  """How files differ from what `listing` said, '' where they don't: in size, with `verify` in their bytes too."""
  for name, (size, checksum) in listed.items():
    path = directory / name
    if not path.is_file():
      return f"{name} is lost"
    if path.stat().st_size != size:
      return f"{name} has {path.stat().st_size} bytes, {size} were written"
    if verify and sha256(path) != checksum:
      return f"the bytes of {name} have changed"
  return ""


def sha256_of(content: bytes) -> str:
  """SHA-256 of bytes, in hexadecimal."""
  return hashlib.sha256(content).hexdigest()


def sync(path: Path) -> None:
  """Forces a file's bytes to the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
