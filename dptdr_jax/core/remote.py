"""Remote file systems (gs://, s3://, whatever fsspec knows): a directory there, and what is read from there.

Nothing here trusts a rename or a whole write on the other side: object stores have no renames, mounted ones may stop in
the middle of a file. What reads decides by what was written last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dptdr_jax.core import files, preemption, progress
from dptdr_jax.core.errors import DptdrError, InputError, OutageError

_log = logging.getLogger(__name__)
T = TypeVar("T")

_LATER = "Run it again when the remote can be reached"
PATIENCE_S = 300.0  # for how long what fails is tried again
_PART = 16  # files of one call: file systems that can move several at a time do
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
# What tells two contents apart, as file systems name it; the first that is there counts.
_CHECKSUMS = ("etag", "ETag", "md5Hash", "crc32c", "checksum")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
# What comes again however often it is tried.
_HOPELESS = (FileNotFoundError, PermissionError, NotADirectoryError, NotImplementedError)
# What is refused, wrongly named, or full, as object stores (by HTTP) and file systems number it.
_REFUSED = (400, 401, 403)
_UNFIT = (errno.EPERM, errno.EINVAL, errno.ENAMETOOLONG, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOOK_S = 1.0  # between two looks for a SIGTERM in a pause


def is_remote(path: files.Path) -> bool:
  """Whether a path is a URL, such as gs://BUCKET/DIR."""
  return re.match(r"[a-zA-Z][\w+.-]*(::[\w+.-]+)*://", os.fspath(path)) is not None


def join(url: str, *names: str) -> str:
  """A URL with names behind it."""
  return (url if url.endswith("/") else f"{url}/") + "/".join(names)


def _split(url: str) -> tuple[str, str]:
  """The directory of a URL, and the name in it; a bucket is in 'gs://'."""
  protocol, _, path = url.rstrip("/").partition("://")
  parent, _, name = path.rpartition("/")
  return f"{protocol}://{parent}", name


def is_file(url: str) -> bool:
  """Whether a URL is that of a file."""
  parent, name = _split(url)
  return bool(insist(lambda: RemoteDirectory(parent).find(name), f"looking at {url}"))


def open_file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
  """The file system of a URL, and the URL as a path there.

  Raises:
    InputError: nothing known reads such URLs; says what to install.
  """
  protocol = url.partition("://")[0]
  options = {"auto_mkdir": True} if protocol in ("file", "local") else {}
  try:
    return fsspec.core.url_to_fs(url, **options)
  except ImportError as error:
    extra = _EXTRAS.get(protocol)
    fix = f"pip install 'dptdr_jax[{extra}]'" if extra else str(error)
    raise InputError(f"{protocol}:// needs a package that is not installed", value=url, fix=fix) from error
  except ValueError as error:
    raise InputError(f"no such kind of remote path ({error})", value=url) from error


class RemoteDirectory:
  """A directory on a remote file system, by names relative to it. Failures are raised as they come: see `insist`."""

  def __init__(self, url: str):
    self.url = url if url.endswith("://") else url.rstrip("/")
    self._fs, self._path = open_file_system(self.url)

  def read(self, name: str) -> bytes | None:
    """A file's bytes; None where there is no such file."""
    self._fs.invalidate_cache()
    try:
      return self._fs.cat_file(self._at(name))
    except FileNotFoundError:
      return None

  def write(self, name: str, content: bytes) -> None:
    """Writes a small file, in one piece where the file system knows how."""
    self._fs.pipe_file(self._at(name), content)

  def put(self, pairs: Sequence[tuple[files.Path, str]]) -> None:
    """Copies local files up: (from, name)."""
    self._fs.put([os.fspath(local) for local, _ in pairs], [self._at(name) for _, name in pairs])

  def get(self, pairs: Sequence[tuple[str, files.Path]]) -> None:
    """Copies files down: (name, to)."""
    for _, local in pairs:
      os.makedirs(os.path.dirname(local), exist_ok=True)
    self._fs.get([self._at(name) for name, _ in pairs], [os.fspath(local) for _, local in pairs])

  def find(self, below: str = "") -> dict[str, dict[str, Any]]:
    """What is said of every file at or below a name, by name; empty where there is none."""
    self._fs.invalidate_cache()
    start = self._at(below) if below else self._path
    found = {name: about for name, about in self._fs.find(start, detail=True).items() if not name.endswith("/")}
    # Of a file that is looked for by its own name nothing is said.
    return {name.removeprefix(self._path).lstrip("/"): about or self._fs.info(name) for name, about in found.items()}

  def remove(self, names: Sequence[str]) -> None:
    """Removes files; those that are gone already are no error. Directories stay that are empty then, but local ones."""
    try:
      if names:
        self._fs.rm([self._at(name) for name in names])  # many in one request, where the file system can
    except FileNotFoundError:
      for name in names:
        with contextlib.suppress(FileNotFoundError):
          self._fs.rm_file(self._at(name))
    if isinstance(self._fs, LocalFileSystem):  # a mounted file system: elsewhere a directory is but a part of names
      for parent in {os.path.dirname(self._at(name)) for name in names}:
        with contextlib.suppress(OSError):
          os.removedirs(parent)

  def _at(self, name: str) -> str:
    return f"{self._path}/{name}" if self._path else name


def _wait(seconds: float) -> None:
  """A pause that SIGTERM ends."""
  end = time.monotonic() + seconds
  while not preemption.asked() and (left := end - time.monotonic()) > 0:
    time.sleep(min(left, _LOOK_S))


def insist(
  action: Callable[[], T], what: str, *, fix: str = _LATER, patience_s: float = PATIENCE_S,
  pause: Callable[[float], None] = _wait,
) -> T:  # fmt: skip
  """What `action` gives; tried again after 1, 2, 4 … seconds (a minute at most) until `patience_s` of pauses are spent.

  Raises:
    InputError: it failed for a reason that trying again does not mend (no permission, no such bucket, a full disk).
    OutageError: it failed every time.
    Preempted: SIGTERM came while it failed.
  """
  spent, wait = 0.0, 1.0
  while True:
    try:
      return action()
    except (DptdrError, preemption.Preempted):
      raise
    except Exception as error:  # each file system has its own kinds of errors
      told = f"{what} failed ({error or type(error).__name__})"
      if isinstance(error, _HOPELESS):
        raise InputError(told, fix=fix) from error
      if spent + wait > patience_s:
        told = f"{told}, tried again for {spent:g} s"
        raise (InputError(told, fix=fix) if _is_of_input(error) else OutageError(f"{told}. {fix}")) from error
      preemption.check(told)
      _log.warning("%s, again in %g s", told, wait)
      pause(wait)
      spent, wait = spent + wait, min(2 * wait, 60.0)


def _is_of_input(error: Exception) -> bool:
  """Whether the other side refuses, or cannot do what it is asked for; else it is not to be had."""
  if getattr(error, "code", None) in _REFUSED or getattr(error, "errno", None) in _UNFIT:
    return True
  # gcsfs says 403 and malformed requests in words alone; packages that sign in have errors of their own.
  return isinstance(error, ValueError) or str(error).startswith("Forbidden") or "Credentials" in type(error).__name__


def parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
  """Yields a few items at a time."""
  for start in range(0, len(items), _PART):
    yield items[start : start + _PART]


def staged(path: files.Path) -> pathlib.Path:
  """A local path as it is; of a URL (a file or a directory) the copy in the local cache, fetched if it is not there.

  The cache is $DPTDR_CACHE, by default ~/.cache/dptdr_jax. A copy is whole or absent and is found again by the URL and
  what the remote says of the content (checksums, or sizes and times), so that one that was replaced is fetched anew.

  Raises:
    InputError: nothing is there, or it cannot be read.
  """
  if not is_remote(path):
    return pathlib.Path(path)
  url = os.fspath(path).rstrip("/")
  parent, name = _split(url)
  directory = RemoteDirectory(parent)
  for _ in range(3):
    found = insist(lambda: directory.find(name), f"looking at {url}")
    if not found:
      raise InputError("nothing is there", path=url)
    place = _cache() / _version(url, found)
    fetched = _fetch(directory, url, found, place)
    if not fetched or place.name == _version(url, insist(lambda: directory.find(name), f"looking at {url}")):
      return place / name
    files.remove(place)
  raise InputError("it changes while it is read", path=url, fix="Wait until what writes there has ended")


@contextlib.contextmanager
def written(path: files.Path, last: str = "", whole: bool = False) -> Iterator[pathlib.Path]:
  """Yields where to write a file or a directory: a local path as it is; for a URL a place from which it then goes up.

  Of a directory that is written over, `last` goes first: killed at any moment it is the old one, the new one, or none.

  Args:
    last: the file of the directory that says that the others are there.
    whole: it takes the place of an older one (which has `last`) as a whole; what else lies there is removed in the end.

  Raises:
    InputError, OutageError: as `insist`.
  """
  if not is_remote(path):
    yield pathlib.Path(path)
    return
  parent, name = _split(os.fspath(path))
  with tempfile.TemporaryDirectory(prefix="dptdr-") as directory:
    local = pathlib.Path(directory, name)
    yield local
    there, mark = RemoteDirectory(parent), f"{name}/{last}"
    found = (child for child in (local.rglob("*") if local.is_dir() else [local]) if child.is_file())
    made = {child.relative_to(directory).as_posix(): child for child in sorted(found)}

    def firmly(action: Callable[[], T]) -> T:
      return insist(action, f"writing {path}")

    before = firmly(lambda: there.find(name))
    if mark in before:
      firmly(lambda: there.remove([mark]))
    for at in sorted(made, key=lambda at: at == mark):
      firmly(functools.partial(there.put, [(made[at], at)]))
    if whole and mark in before:
      firmly(lambda: there.remove([at for at in before if at not in made]))


def origin(path: files.Path) -> str:
  """The URL that a path in the cache was fetched from, also one beside what was fetched; any other path as it is."""
  path, cache = pathlib.Path(path), _cache()
  if cache not in path.parents:
    return os.fspath(path)
  place, *rest = path.relative_to(cache).parts
  base = _split(files.read_json(cache / place / "origin.json")["url"])[0]
  for name in rest:
    base = _split(base)[0] if name == ".." else join(base, name)
  return base


def _cache() -> pathlib.Path:
  named = os.environ.get("DPTDR_CACHE")
  return (pathlib.Path(named) if named else pathlib.Path.home() / ".cache" / "dptdr_jax").absolute() / "remote"


def _version(url: str, found: dict[str, dict[str, Any]]) -> str:
  known = []
  for name, about in sorted(found.items()):
    kinds = [[kind for kind in kinds if about.get(kind) is not None] for kinds in (_CHECKSUMS, _TIMES)]
    tells = (kinds[0] or kinds[1])[:1]
    known.append([name, about.get("size"), *(str(about[kind]) for kind in tells)])
  return hashlib.sha256(json.dumps([url, known]).encode()).hexdigest()[:32]


def _fetch(directory: RemoteDirectory, url: str, found: dict[str, dict[str, Any]], place: pathlib.Path) -> bool:
  """Copies files into `place`, which is whole or absent; False where that was done. One process at a time does it."""
  place.parent.mkdir(parents=True, exist_ok=True)
  with open(place.with_name(f"{place.name}.lock"), "w") as stream:
    try:
      fcntl.flock(stream, fcntl.LOCK_EX)
    except OSError as error:
      fix = "Set DPTDR_CACHE to a directory on a local disk"
      raise InputError("the cache's file system has no locks", path=place.parent, fix=fix) from error
    if place.exists():
      return False
    with files.atomic_directory(place) as partial:
      download(directory, {name: (partial / name, about.get("size")) for name, about in found.items()}, f"fetch {url}")
      files.write_json(partial / "origin.json", {"url": url})
  return True


def download(
  directory: RemoteDirectory, wanted: dict[str, tuple[pathlib.Path, int | None]], what: str, fix: str = _LATER
) -> None:
  """Copies files down: {name: (to, size)}, with a bar; a file of another size than it should have is an error."""
  pairs = [(name, local) for name, (local, _) in wanted.items()]
  with progress.bar(what, len(pairs), "file") as shown:
    for part in parts(pairs):
      preemption.check(f"{what} had not ended; nothing is lost")
      insist(lambda part=part: _get(directory, part, wanted), what, fix=fix)
      shown.advance(len(part))


def _get(directory: RemoteDirectory, part: Sequence[tuple[str, pathlib.Path]], wanted: dict) -> None:
  directory.get(part)
  for name, local in part:
    size = wanted[name][1]
    if size is not None and local.stat().st_size != size:
      raise OSError(f"{name} has {local.stat().st_size} bytes where {size} were expected")
