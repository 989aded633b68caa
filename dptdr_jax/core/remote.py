"""Reading and writing on remote file systems: gs://, s3://, and what else fsspec supports.

Object stores have no renames, and a write to a mounted file system may stop in the middle of a file. So no operation
is assumed to be atomic: a file that is written last says that the others are complete.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dptdr_jax.core import files, lock, marks, preemption, progress
from dptdr_jax.core.errors import DptdrError, InputError, OutageError

_log = logging.getLogger(__name__)
T = TypeVar("T")

_KIND = "dptdr_jax directory"  # of the mark in a directory that `written` replaces as a whole
_LATER = "Run it again when the remote can be reached"
_PATIENCE_S = 300.0  # pauses between attempts, in all, before an error is raised
_PART = 16  # files per call: some file systems transfer several at a time
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
# Fields that identify a content, as file systems name them, checksums before times; the first one present is used.
_VERSIONS = ("etag", "ETag", "md5Hash", "crc32c", "checksum")
_VERSIONS += ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
# Errors that trying again does not mend.
_PERMANENT = (
  FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError, NotImplementedError,
)  # fmt: skip
# The same as numbers: HTTP statuses of object stores, errno of file systems.
_PERMANENT_HTTP = (400, 401, 403)
_PERMANENT_ERRNO = (
  errno.EPERM, errno.EINVAL, errno.ENAMETOOLONG, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
)  # fmt: skip
_POLL_S = 1.0  # seconds between two checks for SIGTERM during a pause


def is_remote(path: files.Path) -> bool:
  """Whether a path is a URL, such as gs://BUCKET/DIR."""
  return re.match(r"[a-zA-Z][\w+.-]*(::[\w+.-]+)*://", os.fspath(path)) is not None


def join(url: str, *names: str) -> str:
  """Appends names to a URL."""
  return (url if url.endswith("/") else f"{url}/") + "/".join(names)


def _split(url: str) -> tuple[str, str]:
  """A URL's parent and its last name; the parent of a bucket is 'gs://'."""
  protocol, _, path = url.rstrip("/").partition("://")
  parent, _, name = path.rpartition("/")
  return f"{protocol}://{parent}", name


def is_file(url: str) -> bool:
  """Whether a URL names a file."""
  parent, name = _split(url)
  return bool(insist(lambda: RemoteDirectory(parent).find(name), f"looking at {url}"))


def open_file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
  """The file system of a URL, and the path there.

  Raises:
    InputError: no installed package reads such URLs; says what to install.
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
    raise InputError(f"unknown kind of URL ({error})", value=url) from error


def check_names(names: Iterable[str], source: str) -> None:
  """Checks file names that a remote gave: none may lead out of the directory that the files are written to.

  Args:
    names: relative, with '/' between parts.
    source: the listing or URL that gave them.

  Raises:
    InputError: a name is absolute, or has '..', an empty part, a backslash, a NUL, a drive, or a file as its directory.
  """
  taken = set(names)
  for name in sorted(taken):
    parts = name.split("/")
    is_below_file = any("/".join(parts[:depth]) in taken for depth in range(1, len(parts)))
    is_foreign = {"\\", "\0"} & {*name} or pathlib.PureWindowsPath(name).drive
    if is_below_file or is_foreign or {"", ".", ".."} & {*parts}:
      raise InputError("an unsafe file name", path=source, value=name, fix="Nothing was written")


class RemoteDirectory:
  """A directory on a remote file system; names are relative to it. Errors are the file system's own: see `insist`."""

  def __init__(self, url: str):
    self.url = url if url.endswith("://") else url.rstrip("/")
    self._fs, self._path = open_file_system(self.url)

  def read(self, name: str) -> bytes | None:
    """A file's bytes; None: there is no such file."""
    self._fs.invalidate_cache()
    try:
      return self._fs.cat_file(self._at(name))
    except FileNotFoundError:
      return None

  def write(self, name: str, content: bytes) -> None:
    """Writes a small file, in one operation if the file system has one."""
    self._fs.pipe_file(self._at(name), content)

  def put(self, pairs: Sequence[tuple[files.Path, str]]) -> None:
    """Uploads files: (local path, name)."""
    self._fs.put([os.fspath(local) for local, _ in pairs], [self._at(name) for _, name in pairs])

  def get(self, pairs: Sequence[tuple[str, files.Path]]) -> None:
    """Downloads files: (name, local path)."""
    for _, local in pairs:
      os.makedirs(os.path.dirname(local), exist_ok=True)
    self._fs.get([self._at(name) for name, _ in pairs], [os.fspath(local) for _, local in pairs])

  def find(self, below: str = "") -> dict[str, dict[str, Any]]:
    """Every file at or below a name: {name: the file system's entry, with its size}; empty: there is none."""
    self._fs.invalidate_cache()
    start = self._at(below) if below else self._path
    entries = {name: entry for name, entry in self._fs.find(start, detail=True).items() if not name.endswith("/")}
    # Some file systems return no entry for a file that is asked for by its own name.
    return {name.removeprefix(self._path).lstrip("/"): entry or self._fs.info(name) for name, entry in entries.items()}

  def remove(self, names: Sequence[str]) -> None:
    """Removes files; missing ones are no error. On local file systems, directories that become empty go too."""
    paths = [self._at(name) for name in names]
    one_by_one = [path for path in paths if {*"*?["} & {*path}]  # `rm` would expand them
    try:
      if plain := [path for path in paths if not {*"*?["} & {*path}]:
        self._fs.rm(plain)  # one request for many, if the file system can
    except FileNotFoundError:
      one_by_one = paths
    for path in one_by_one:
      with contextlib.suppress(FileNotFoundError):
        self._fs.rm_file(path)
    if isinstance(self._fs, LocalFileSystem):  # object stores have no directories
      for parent in {os.path.dirname(path) for path in paths}:
        with contextlib.suppress(OSError):
          os.removedirs(parent)

  def _at(self, name: str) -> str:
    return f"{self._path}/{name}" if self._path else name


def _wait(seconds: float) -> None:
  """Sleeps; SIGTERM ends it."""
  end = time.monotonic() + seconds
  while not preemption.asked() and (left := end - time.monotonic()) > 0:
    time.sleep(min(left, _POLL_S))


def insist(action: Callable[[], T], what: str, *, fix: str = _LATER) -> T:
  """Calls `action` and returns its result; retries after 1, 2, 4 … 60 seconds, until the pauses add up to 5 minutes.

  Raises:
    InputError: it failed for a reason that a retry does not mend (no permission, no such bucket, a full disk).
    OutageError: every attempt failed.
    Preempted: SIGTERM came between two attempts.
  """
  spent, wait = 0.0, 1.0
  while True:
    try:
      return action()
    except (DptdrError, preemption.Preempted):
      raise
    except Exception as error:  # each file system has its own types of errors
      message = f"{what} failed ({error or type(error).__name__})"
      if isinstance(error, _PERMANENT):
        raise InputError(message, fix=fix) from error
      if spent + wait > _PATIENCE_S:
        message = f"{message}, retried for {spent:g} s"
        raise (InputError(message, fix=fix) if _is_permanent(error) else OutageError(f"{message}. {fix}")) from error
      preemption.check(message)
      _log.warning("%s, next attempt in %g s", message, wait)
      _wait(wait)
      spent, wait = spent + wait, min(2 * wait, 60.0)


def _is_permanent(error: Exception) -> bool:
  """Whether the remote refuses the request; otherwise it is not reachable."""
  if getattr(error, "code", None) in _PERMANENT_HTTP or getattr(error, "errno", None) in _PERMANENT_ERRNO:
    return True
  # gcsfs reports 403 and malformed requests only in words; packages for credentials have their own error types.
  return isinstance(error, ValueError) or str(error).startswith("Forbidden") or "Credentials" in type(error).__name__


def parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
  """Yields a few items at a time."""
  for start in range(0, len(items), _PART):
    yield items[start : start + _PART]


def staged(path: files.Path) -> pathlib.Path:
  """A local path as it is; for the URL of a file or directory its copy in the local cache, downloaded if necessary.

  The cache is $DPTDR_CACHE, by default ~/.cache/dptdr_jax. A copy is complete or absent. Its key is the URL with the
  checksums (or sizes and times) that the remote reports, so a changed file is downloaded again.

  Raises:
    InputError: nothing is there, or it cannot be read.
  """
  if not is_remote(path):
    return pathlib.Path(path)
  url = os.fspath(path).rstrip("/")
  parent, name = _split(url)
  directory = RemoteDirectory(parent)
  for _ in range(3):
    entries = insist(lambda: directory.find(name), f"looking at {url}")
    if not entries:
      raise InputError("nothing is there", path=url)
    check_names(entries, url)
    place = _cache() / _version(url, entries)
    downloaded = _fetch(directory, url, entries, place)
    if not downloaded or place.name == _version(url, insist(lambda: directory.find(name), f"looking at {url}")):
      return place / name
    files.remove(place)
  raise InputError("it changes while it is read", path=url, fix="Wait until the process that writes it has ended")


@contextlib.contextmanager
def written(path: files.Path, last: str = "", whole: bool = False) -> Iterator[pathlib.Path]:
  """Yields a local path to write a file or directory to; for a URL a temporary one, uploaded at the end.

  When a directory is replaced, `last` is removed first and written last: killed at any moment it is the old one, the
  new one, or none.

  Args:
    last: the file of the directory that says that the others are complete.
    whole: replace what an earlier call wrote there, as dptdr.json lists it. Other files stay.

  Raises:
    InputError: with `whole`, the directory holds something that no earlier call wrote.
    InputError, OutageError: as `insist`.
  """
  if not is_remote(path):
    yield pathlib.Path(path)
    return
  parent, name = _split(os.fspath(path))
  with tempfile.TemporaryDirectory(prefix="dptdr-") as directory:
    local = pathlib.Path(directory, name)
    yield local
    children = (child for child in (local.rglob("*") if local.is_dir() else [local]) if child.is_file())
    sources = {child.relative_to(directory).as_posix(): child for child in sorted(children)}
    _replace(RemoteDirectory(parent), name, sources, f"{name}/{last}", whole)


def _replace(there: RemoteDirectory, name: str, sources: dict[str, pathlib.Path], last: str, whole: bool) -> None:
  """Uploads {remote name: local path} as `written` says."""

  def firmly(action: Callable[[], T]) -> T:
    return insist(action, f"writing {join(there.url, name)}")

  before, mark, stale = firmly(lambda: there.find(name)), f"{name}/{marks.NAME}", set()
  if whole:
    listed = _listed(firmly(lambda: there.read(mark)), join(there.url, mark))
    if before and (listed is None or not {last, mark} & before.keys()):
      raise InputError("the directory holds something else", path=join(there.url, name), value=sorted(before)[:3],
                       fix="Name an empty or a new directory")  # fmt: skip
    stale = {f"{name}/{child}" for child in listed or ()} & before.keys() - sources.keys()
    names = sorted({*(listed or ()), *(at.removeprefix(f"{name}/") for at in sources)})
    about = {"kind": _KIND, "format": marks.FORMAT, "files": names}
    firmly(lambda: there.write(mark, json.dumps(about, indent=1).encode()))
  if last in before:
    firmly(lambda: there.remove([last]))
  for at in sorted(sources, key=lambda at: at == last):
    firmly(functools.partial(there.put, [(sources[at], at)]))
  firmly(lambda: there.remove(sorted(stale)))


def _listed(text: bytes | None, source: str) -> list[str] | None:
  """The files that a mark lists, none if it is absent or was cut short; None: it is not the mark of `written`."""
  try:
    about = json.loads(text or json.dumps({"kind": _KIND, "files": []}))
  except (ValueError, RecursionError):
    return []
  if not isinstance(about, dict) or about.get("kind") != _KIND or not isinstance(about.get("files"), list):
    return None
  names = [name for name in about["files"] if isinstance(name, str)]
  check_names(names, source)
  return names


def origin(path: files.Path) -> str:
  """The URL of a path in the cache, or of a path beside one; any other path as it is."""
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


def _version(url: str, entries: dict[str, dict[str, Any]]) -> str:
  known = []
  for name, entry in sorted(entries.items()):
    version = [str(entry[field]) for field in _VERSIONS if entry.get(field) is not None]
    known.append([name, entry.get("size"), *version[:1]])
  return hashlib.sha256(json.dumps([url, known]).encode()).hexdigest()[:32]


def _fetch(directory: RemoteDirectory, url: str, entries: dict[str, dict[str, Any]], place: pathlib.Path) -> bool:
  """Downloads files into `place`, which is complete or absent; False: it was there. A lock admits one process."""
  with lock.held(place.with_name(f"{place.name}.lock")):
    if place.exists():
      return False
    with files.atomic_directory(place) as partial:
      wanted = {name: (partial / name, entry.get("size")) for name, entry in entries.items()}
      download(directory, wanted, f"fetch {url}")
      files.write_json(partial / "origin.json", {"url": url})
  return True


def download(
  directory: RemoteDirectory, wanted: dict[str, tuple[pathlib.Path, int | None]], what: str, fix: str = _LATER
) -> None:
  """Downloads {name: (local path, size)} with a progress bar; a file of another size is downloaded again."""
  pairs = [(name, local) for name, (local, _) in wanted.items()]
  with progress.bar(what, len(pairs), "file") as shown:
    for part in parts(pairs):
      preemption.check(f"{what} was interrupted; nothing is lost")
      insist(lambda part=part: _get(directory, part, wanted), what, fix=fix)
      shown.advance(len(part))


def _get(directory: RemoteDirectory, part: Sequence[tuple[str, pathlib.Path]], wanted: dict) -> None:
  directory.get(part)
  for name, local in part:
    size = wanted[name][1]
    if size is not None and local.stat().st_size != size:
      raise OSError(f"{name} has {local.stat().st_size} bytes where {size} were expected")
