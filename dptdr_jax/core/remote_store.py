"""The remote copy of an artefact store: finished artefacts, and the newest checkpoint of each unfinished one.

  URL/dptdr.json                            says that the directory is ours
  URL/KIND/KEY/                             a finished artefact; artefact.json is written last and lists every file
  URL/KIND/KEY.partial/data/SHA256          the contents of an unfinished artefact's files
  URL/KIND/KEY.partial/listing-{0,1}.json   its files, written in turns: the newest one that can be read counts

No remote operation is assumed to be atomic. A listing that was cut short is skipped; no content that the newest
listing names is overwritten or removed; what is downloaded must have the listed sizes and checksums.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import pydantic

from dptdr_jax.core import files, marks, preemption, progress, remote
from dptdr_jax.core.errors import DptdrError, InputError
from dptdr_jax.core.remote import RemoteDirectory
from dptdr_jax.core.store import ABOUT, BEGUN

_log = logging.getLogger(__name__)

_KIND = "dptdr_jax store"
_MARK = json.dumps({"kind": _KIND, "format": marks.FORMAT}).encode()
_NAMES = re.compile(r"(\w+/\w+)(?:/artefact\.json|\.partial/listing-[01]\.json)")
_DATA = re.compile(r".*/data/[0-9a-f]{64}")
_GROWING = "metrics.jsonl"  # appended to at any time: copied, where other files are linked
_SKIPPED = re.compile(r".*\.(partial|replaced|removed|growing)|.*orbax-checkpoint-tmp.*")
_FIX = "The local files are complete: run the same command again when the remote can be reached"


class _Listing(pydantic.BaseModel):
  """artefact.json, or the listing of an unfinished artefact; files: {name: (size, SHA-256)}."""

  kind: str = ""
  key: str = ""
  serial: int = 0
  writer: str = ""  # drawn at random by every process
  files: dict[str, tuple[pydantic.NonNegativeInt, Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]]] = {}


class RemoteStore:
  """The remote copy of a store, for process 0 of a run; an artefact is named KIND/KEY.

  Args:
    url: directory of the copy.
    aside: a local directory of this run alone, on the file system of the store; removed if it is there.

  Raises:
    InputError: the URL holds something that is not a copy of ours.
  """

  def __init__(self, url: str, aside: files.Path):
    if not remote.is_remote(url):
      raise InputError("a remote is a URL", value=url, fix="Say gs://BUCKET/DIR, s3://BUCKET/DIR, file:///DIR, …")
    self._remote, self._aside = RemoteDirectory(url), pathlib.Path(aside)
    self._before = self._claim()
    files.remove(self._aside)
    self._numbers, self._writer = itertools.count(), secrets.token_hex(8)
    self._copies: dict[str, _Copy] = {}
    self._damaged: set[str] = set()  # places there
    # Snapshots that wait are uploaded by threads, one at a time.
    self._waiting: dict[str, pathlib.Path] = {}
    self._threads: list[threading.Thread] = []
    self._turn = threading.Lock()
    self._failures: dict[str, Exception] = {}

  def fetch(self, name: str, target: files.Path) -> bool:
    """Downloads a finished artefact to `target`, complete or not at all; False: it is absent, or damaged."""
    text, about = self._read(name)
    if about is None or f"{about.kind}/{about.key}" != name:
      return text is not None and self._is_damaged(name, ABOUT)
    wanted = {file: (f"{name}/{file}", *known) for file, known in about.files.items()}
    return self._download(name, wanted, target, text)

  def fetch_partial(self, name: str, target: files.Path) -> bool:
    """Downloads the newest snapshot of an unfinished artefact likewise; False: there is none, or it is damaged."""
    copy = self._insist(lambda: self._copy_of(name))
    wanted = {file: (copy.at(checksum), size, checksum) for file, (size, checksum) in copy.listing.files.items()}
    return bool(wanted) and self._download(copy.place, wanted, target)

  def snapshot(self, name: str, directory: files.Path) -> None:
    """Freezes the files of an unfinished artefact and uploads them in a thread, in place of the snapshot before.

    While another upload is under way the newest snapshot waits. The next snapshot makes up for one that failed.

    Raises:
      InputError: the upload before found another run's files, or a listing with bad names.
    """
    if isinstance(failure := self._failures.get(name), DptdrError):
      raise failure
    frozen = self._aside / str(next(self._numbers))
    try:
      shutil.copytree(directory, frozen, ignore=_skipped, copy_function=_link)
    except OSError as error:
      self._note_failure(name, error)
      return
    self._drop(name)
    self._waiting[name] = frozen
    thread = threading.Thread(target=self._upload_snapshot, args=(name,), name=name, daemon=True)
    thread.start()
    self._threads = [*filter(threading.Thread.is_alive, self._threads), thread]

  def upload(self, name: str, directory: files.Path) -> None:
    """Uploads a finished artefact, if it is not there yet, and removes its snapshot.

    Raises:
      Preempted: SIGTERM came between two files; the next call starts again.
      InputError, OutageError: as `remote.insist`.
    """
    self._stop(name)
    _, there = self._read(name)
    if not self._is_whole(name, there):
      self._remove_files(name, there)
      self._upload_files(name, pathlib.Path(directory))
      self._damaged.discard(name)
    if name in self._copies or any(file.startswith(f"{name}.partial/") for file in self._before):
      self._insist(lambda: self._copy_of(name).remove())

  def last(self, seconds: float) -> None:
    """Waits after SIGTERM until the snapshots are uploaded, so long at most; logs which are not."""
    end = time.monotonic() + seconds
    for thread in self._threads:
      thread.join(max(0.0, end - time.monotonic()))
    late = {thread.name: f"not done in {seconds:g} s" for thread in self._threads if thread.is_alive()}
    for name, reason in {**self._failures, **late}.items():
      _log.warning("%s: the newest checkpoint is not on %s (%s)", name, self._remote.url, reason)

  def remove(self, names: Iterable[str]) -> None:
    """Removes artefacts, finished or not; of each the files that its artefact.json or listing names."""
    for name in names:
      self._stop(name)
      self._remove_files(name, self._read(name)[1])
      self._insist(lambda name=name: self._copy_of(name).remove())

  def names(self) -> set[str]:
    """The artefacts that are there, finished and unfinished."""
    return {match[1] for match in map(_NAMES.fullmatch, self._sizes()) if match}

  def _claim(self) -> dict[str, int]:
    """Writes the mark into an empty directory; returns the sizes of all files."""
    text, sizes = self._insist(lambda: self._remote.read(marks.NAME)) or b"", self._sizes()
    if (mark := _parse(text, marks.NAME)) is None or mark.kind != _KIND:
      if sizes.keys() - {marks.NAME} or not _MARK.startswith(text):  # an earlier write may have been cut short
        raise InputError("the directory is not empty and not a store of ours", path=self._remote.url,
                         value=sorted(sizes)[:3], fix="Name an empty or a new directory")  # fmt: skip
      self._insist(lambda: self._remote.write(marks.NAME, _MARK))
    return sizes

  def _read(self, name: str) -> tuple[bytes | None, _Listing | None]:
    """artefact.json; None, or twice None: it was cut short, or is absent."""
    text = self._insist(lambda: self._remote.read(f"{name}/{ABOUT}"))
    return text, _parse(text, remote.join(self._remote.url, name, ABOUT))

  def _sizes(self, below: str = "") -> dict[str, int]:
    return {name: entry["size"] for name, entry in self._insist(lambda: self._remote.find(below)).items()}

  def _is_whole(self, name: str, about: _Listing | None) -> bool:
    """Whether a finished artefact has all its files; other runs upload, too."""
    if about is None or name in self._damaged:
      return False
    listed = {f"{name}/{file}": size for file, (size, _) in about.files.items()}.items()
    return listed <= self._before.items() or listed <= self._sizes(name).items()

  def _copy_of(self, name: str) -> _Copy:
    if name not in self._copies:
      self._copies[name] = _Copy(self._remote, name, self._writer)
    return self._copies[name]

  def _download(
    self, place: str, wanted: dict[str, tuple[str, int, str]], target: files.Path, about: bytes = b""
  ) -> bool:
    """Downloads {file: (remote name, size, SHA-256)} from below `place`; False: a file is damaged."""
    sizes, directory = self._sizes(place), self._aside / str(next(self._numbers))
    damaged = [file for file, (at, size, _) in wanted.items() if sizes.get(at) != size]
    directory.mkdir(parents=True)
    if not damaged:
      firsts = {at: (directory / file, size) for file, (at, size, _) in wanted.items()}
      remote.download(self._remote, firsts, f"fetch {place}", _FIX)
      for file, (at, _, _) in wanted.items():
        if not (directory / file).exists():  # another file has the same content
          (directory / file).parent.mkdir(parents=True, exist_ok=True)
          shutil.copyfile(firsts[at][0], directory / file)
      damaged = [file for file, (_, _, checksum) in wanted.items() if files.sha256(directory / file) != checksum]
    if damaged:
      return self._is_damaged(place, damaged[0])
    if about:
      (directory / ABOUT).write_bytes(about)
    for path in directory.rglob("*"):
      files.sync(path)
    pathlib.Path(target).parent.mkdir(parents=True, exist_ok=True)
    files.rename(directory, target)
    return True

  def _is_damaged(self, place: str, file: str) -> bool:
    _log.warning("%s: %s is damaged on %s; the copy is ignored", place, file, self._remote.url)
    self._damaged.add(place)
    return False

  def _upload_files(self, name: str, directory: pathlib.Path) -> None:
    text = (directory / ABOUT).read_bytes()
    wanted = sorted(_Listing.model_validate_json(text).files)
    with progress.bar(f"upload {name}", len(wanted), "file") as bar:
      for part in remote.parts(wanted):
        preemption.check(f"the upload of {name} was interrupted; it is complete here")
        pairs = [(directory / file, f"{name}/{file}") for file in part]
        self._insist(lambda pairs=pairs: self._remote.put(pairs))
        bar.advance(len(part))
    self._insist(lambda: self._remote.write(f"{name}/{ABOUT}", text))

  def _remove_files(self, name: str, about: _Listing | None) -> None:
    if about:
      self._insist(lambda: self._remote.remove([f"{name}/{file}" for file in about.files]))
    self._insist(lambda: self._remote.remove([f"{name}/{ABOUT}"]))  # last: an interrupted removal can be repeated

  def _upload_snapshot(self, name: str) -> None:
    with self._turn:
      if (frozen := self._waiting.pop(name, None)) is None:
        return  # an earlier thread has uploaded it
      try:
        copy = self._copy_of(name)
        if copy.place in self._damaged:
          copy.remove()
          self._damaged.discard(copy.place)
        copy.update(frozen)
        self._failures.pop(name, None)
      except Exception as error:  # training goes on without the network
        self._note_failure(name, error)
      shutil.rmtree(frozen, ignore_errors=True)

  def _note_failure(self, name: str, error: Exception) -> None:
    _log.warning("%s: a checkpoint could not be uploaded to %s (%s)", name, self._remote.url, error)
    self._failures[name] = error

  def _stop(self, name: str) -> None:
    """Drops the snapshot of an artefact that waits, and waits until no upload is under way."""
    self._drop(name)
    for thread in self._threads:
      while thread.is_alive():
        preemption.check(f"the upload of a checkpoint of {thread.name} had not ended")
        thread.join(1.0)
    self._failures.pop(name, None)

  def _drop(self, name: str) -> None:
    if frozen := self._waiting.pop(name, None):
      shutil.rmtree(frozen, ignore_errors=True)

  def _insist(self, action: Callable[[], Any]) -> Any:
    return remote.insist(action, f"the remote store {self._remote.url}", fix=_FIX)


class _Copy:
  """The remote copy of one unfinished artefact.

  Attributes:
    place: its remote directory.
    listing: the newest one that is known.
  """

  def __init__(self, directory: RemoteDirectory, name: str, writer: str):
    self.place = f"{name}.partial"
    self._remote, self._writer = directory, writer
    self._listings = [f"{self.place}/listing-{number}.json" for number in (0, 1)]
    self._checksums: dict[tuple[int, ...], str] = {}  # by what `_state` says of the file
    self.listing = self._newest()

  def at(self, checksum: str) -> str:
    """The remote name of a content."""
    return f"{self.place}/data/{checksum}"

  def update(self, frozen: pathlib.Path) -> None:
    """Uploads the contents that are missing, then a new listing, then removes what it does not name.

    Raises:
      InputError: another run writes here.
      OSError, …: from the file system; the copy is as it was.
    """
    self._check_writer()
    paths = {path.relative_to(frozen).as_posix(): path for path in sorted(frozen.rglob("*")) if path.is_file()}
    if BEGUN not in paths:
      raise FileNotFoundError(f"{BEGUN} is lost here")  # the copy must not lose it too
    states = {name: _state(path) for name, path in paths.items()}
    self._checksums = {state: self._checksums.get(state) or files.sha256(paths[name]) for name, state in states.items()}
    listed = {name: (state[0], self._checksums[state]) for name, state in states.items()}
    there = self._remote.find(f"{self.place}/data")
    sources = {self.at(checksum): paths[name] for name, (_, checksum) in listed.items()}
    missing = [at for at, path in sources.items() if there.get(at, {}).get("size") != path.stat().st_size]
    for part in remote.parts(missing):
      self._remote.put([(sources[at], at) for at in part])
    if changed := [name for name, path in paths.items() if _state(path) != states[name]]:
      raise OSError(f"{changed[0]} was written to during the upload")
    listing = _Listing(serial=self.listing.serial + 1, writer=self._writer, files=listed)
    text = listing.model_dump_json(indent=1, exclude_defaults=True).encode()
    self._remote.write(self._listings[listing.serial % 2], text)
    self.listing = listing
    self._remote.remove([at for at in there if _DATA.fullmatch(at) and at not in sources])

  def remove(self) -> None:
    """Removes the contents, then the listings, so that an interrupted removal can be repeated."""
    self._remote.remove([at for at in self._remote.find(f"{self.place}/data") if _DATA.fullmatch(at)])
    self._remote.remove(self._listings)
    self.listing = _Listing()

  def _check_writer(self) -> None:
    newest = self._newest()  # a listing of ours may be there although its upload failed
    if newest != self.listing and newest.serial >= self.listing.serial and newest.writer != self._writer:
      raise InputError("another run writes here", path=remote.join(self._remote.url, self.place),
                       fix="Let one of them continue with another --remote")  # fmt: skip
    self.listing = newest

  def _newest(self) -> _Listing:
    parsed = (_parse(self._remote.read(at), remote.join(self._remote.url, at)) for at in self._listings)
    return max(filter(None, parsed), key=lambda listing: listing.serial, default=_Listing())


def _parse(text: bytes | None, source: str) -> _Listing | None:
  """None: the file is absent, was cut short, or has another form.

  Raises:
    InputError: a name leads out of the directory.
  """
  try:
    parsed = _Listing.model_validate_json(text or b"")
  except pydantic.ValidationError:
    return None
  remote.check_names(parsed.files, source)
  return parsed


def _state(path: pathlib.Path) -> tuple[int, int, int]:
  about = path.stat()
  return about.st_size, about.st_mtime_ns, about.st_ino


def _skipped(directory: str, names: list[str]) -> set[str]:
  """For copytree: names of what is not complete, and links."""
  return {name for name in names if _SKIPPED.fullmatch(name) or os.path.islink(os.path.join(directory, name))}


def _link(source: str, target: str) -> None:
  """A hard link; a copy, if the file system has no links or the file grows."""
  if os.path.basename(source) != _GROWING:
    with contextlib.suppress(OSError):
      os.link(source, target)
      return
  shutil.copy2(source, target)
