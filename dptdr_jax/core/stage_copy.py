"""The remote copy of one stage: what it holds, how it is kept up, and how a stage comes back from it.

While a stage runs, what is whole in its directory is copied as a kill at that instant would leave it: the directory is
looked at, what is new is linked aside, and the directory is looked at again; only where nothing changed in between does
the copy count. A stage that survives a SIGKILL thus survives the loss of its disk, and no stage knows of the copy.

On the other side every stage has

  STAGE/mirror-{0,1}.json  the lists of the copy's files, written in turns: the newest one that can be read counts
  STAGE/manifest.json      written when all else is there, as in the run's own directory

and its files, under their own names. What a list names is neither written over nor removed before a newer list stands:
a file that changed goes to its name with '~' behind, and back the next time. When the stage has ended no '~' is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dptdr_jax.core import files, manifest, progress, remote
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.remote import RemoteDirectory

_LOOKS = 100  # at a directory that keeps changing; then a later look will do
_UNFINISHED = (".partial", ".replaced", ".removed", ".growing")  # ends of names that are not yet, or no longer, whole
_UNFINISHED_CHECKPOINT = "orbax-checkpoint-tmp"
_GROWS = "metrics.jsonl"  # appended to at any time, and cut to the checkpoint on resuming: taken after all else
_MANY = 100  # files that are worth a bar
ASIDE = ".mirror"  # in the run's directory: links to what is being copied
_AT_THE_END = ("tensorboard",)  # made anew from the metrics on resuming

State = tuple[int, int]  # size, modification time in ns


@dataclasses.dataclass(frozen=True)
class Entry:
  """A file in the list: what it is, and the name it has on the other side."""

  state: State
  at: str


@dataclasses.dataclass(frozen=True)
class Listing:
  """What the copy of a stage holds: files by their path from the run's directory."""

  serial: int
  writer: str  # drawn anew by every process
  key: str
  entries: Mapping[str, Entry]

  @classmethod
  def parse(cls, text: bytes | None) -> Listing | None:
    """None for what is not there or was cut short."""
    try:
      about = json.loads(text or b"")
    except ValueError:
      return None
    entries = {name: Entry((size, time), at) for name, (size, time, at) in about["files"].items()}
    return cls(about["serial"], about["writer"], about["key"], entries)

  def text(self) -> bytes:
    rows = {name: [*entry.state, entry.at] for name, entry in self.entries.items()}
    about = {"serial": self.serial, "writer": self.writer, "key": self.key, "files": rows}
    return json.dumps(about, indent=1).encode()


_NOTHING = Listing(0, "", "", {})


class StageCopy:
  """The remote copy of one stage.

  Args:
    beside: files of the run's directory that the stage writes at its end, outside of its own.
  """

  def __init__(self, directory: RemoteDirectory, root: pathlib.Path, name: str, beside: Sequence[str] = ()):
    self.name = name
    self._remote, self._root, self._beside = directory, root, beside
    self._listing = self._newest()
    self._manifest = directory.read(f"{name}/{manifest.NAME}")
    self._writer = secrets.token_hex(8)
    self._sent: dict[str, State] = {}  # on the other side, in no list yet

  def is_whole(self, key: str) -> bool:
    """Whether the finished stage is there, made under `key`."""
    try:
      about = json.loads(self._manifest or b"{}")
    except ValueError:
      return False
    return about.get("key") == key and self.is_begun(key)

  def is_begun(self, key: str) -> bool:
    """Whether something of the stage is there, made under `key`."""
    return self._listing.key == key

  def made_from(self) -> dict[str, Any]:
    """What the stage that is there says that it was made from; empty where it says nothing."""
    entry = self._listing.entries.get(f"{self.name}/{manifest.BEGUN}")
    return json.loads((entry and self._remote.read(entry.at)) or b"{}").get("made_from", {})

  def fetch(self) -> None:
    """Copies all of it into the run's directory, in the place of what is there of the stage."""
    entries = self._listing.entries
    with files.atomic_directory(self._root / self.name) as partial:
      beside = partial / ".beside"
      places = {name: beside / name for name in entries}
      places |= {name: partial / place for name in entries if (place := name.removeprefix(f"{self.name}/")) != name}
      wanted = {entry.at: (places[name], entry.state[0]) for name, entry in entries.items()}
      place = remote.join(self._remote.url, self.name)
      fix = f"Run it again when the remote can be reached; if files are missing there, remove {place}"
      remote.download(self._remote, wanted, f"fetch {self.name}", fix)
      for name, entry in entries.items():
        os.utime(places[name], ns=(entry.state[1],) * 2)
      for name in self._beside:
        if (beside / name).exists():
          files.rename(beside / name, self._root / name)
      files.remove(beside)
      if self.is_whole(self._listing.key):
        (partial / manifest.NAME).write_bytes(self._manifest)

  def begin(self, key: str) -> None:
    """Makes the copy ready for a stage under `key`: what it has of another key goes, and what no list names."""
    self._settle()
    if self._manifest is not None:
      self._remote.remove([f"{self.name}/{manifest.NAME}"])
      self._manifest = None
    if not self.is_begun(key):
      self._commit(key, {})
    named = {entry.at for entry in self._listing.entries.values()} | set(self._lists())
    self._remote.remove([name for name in self._remote.find(self.name) if name not in named])

  def update(self, key: str, ended: bool, go_on: Callable[[], bool] = lambda: True) -> None:
    """Copies what is new and whole; after the stage has `ended` all that is left, the manifest last.

    Args:
      key: of the stage.
      ended: nobody works there any more.
      go_on: asked between files; where it says no, the copy stays as it was.

    Raises:
      InputError: another run writes to the same place.
    """
    # What the copy has whole stays: a file that is another now, or gone, broke here, and comes back from there.
    listed = {name: entry.state for name, entry in self._listing.entries.items()}
    whole = listed if ended and self.is_whole(key) else {}
    if self._is_news({name: state[1:] for name, state in self._look(ended).items()} | whole, ended):
      self._settle()
      with self._frozen(ended) as (aside, found):
        found |= whole
        while self._is_news(found, ended):
          missing = self._missing(found, ended)
          if not self._send(aside, missing, found, go_on):
            return
          kept = {name: entry for name, entry in self._listing.entries.items() if name in found}
          self._commit(key, kept | {name: Entry(found[name], at) for name, at in missing.items()})
    if ended and not self.is_whole(key):
      text = (self._root / self.name / manifest.NAME).read_bytes()
      self._remote.write(f"{self.name}/{manifest.NAME}", text)
      self._manifest = text

  def missing(self) -> list[str]:
    """Files of the stage that are whole here and not on the other side, by path from the run's directory."""
    try:
      found = {name: state[1:] for name, state in self._look(ended=False).items()}
    except OSError:
      return []
    return sorted(self._missing(found, ended=False))

  def _is_news(self, found: Mapping[str, State], ended: bool) -> bool:
    """Whether the copy is not as `found`; curves alone are no news while the stage runs: a resume would cut them."""
    growing = {f"{self.name}/{_GROWS}"} if not ended else set()
    return bool(self._missing(found, ended).keys() - growing or self._listing.entries.keys() - growing - found.keys())

  def _missing(self, found: Mapping[str, State], ended: bool) -> dict[str, str]:
    """What is not on the other side as it is here: the names that it will have there."""
    taken = {entry.at for entry in self._listing.entries.values()}
    missing = {}
    for name, state in found.items():
      entry = self._listing.entries.get(name)
      if entry is None or entry.state != state or (ended and entry.at != name):
        missing[name] = f"{name}~" if name in taken else name
    return missing

  def _send(
    self, aside: pathlib.Path, missing: Mapping[str, str], found: Mapping[str, State], go_on: Callable[[], bool]
  ) -> bool:
    todo = [(name, at) for name, at in missing.items() if self._sent.get(at) != found[name]]
    with progress.bar(f"copy {self.name}", len(todo), "file") if len(todo) > _MANY else progress.silent() as shown:
      for part in remote.parts(todo):
        if not go_on():
          return False
        for _, at in part:
          self._sent.pop(at, None)
        self._remote.put([(aside / name, at) for name, at in part])
        self._sent |= {at: found[name] for name, at in part}
        shown.advance(len(part))
    return True

  def _settle(self) -> None:
    """Reads the newest list again: one that failed may have been written all the same."""
    newest = self._newest()
    if newest.serial == self._listing.serial:
      return
    if newest.writer != self._writer:
      place = remote.join(self._remote.url, self.name)
      raise InputError("another run writes here", path=place, fix="Let one of them go on with another --remote")
    self._listing, self._sent = newest, {}

  def _commit(self, key: str, entries: Mapping[str, Entry]) -> None:
    """Writes the next list, then removes what the one before named and this one does not."""
    before, listing = self._listing, Listing(self._listing.serial + 1, self._writer, key, entries)
    self._remote.write(self._lists()[listing.serial % 2], listing.text())
    self._listing, self._sent = listing, {}
    now = {entry.at for entry in entries.values()}
    self._remote.remove(sorted({entry.at for entry in before.entries.values()} - now))

  def _lists(self) -> tuple[str, str]:
    return f"{self.name}/mirror-0.json", f"{self.name}/mirror-1.json"

  def _newest(self) -> Listing:
    found = [Listing.parse(self._remote.read(name)) for name in self._lists()]
    return max(filter(None, found), key=lambda listing: listing.serial, default=_NOTHING)

  @contextlib.contextmanager
  def _frozen(self, ended: bool) -> Iterator[tuple[pathlib.Path, dict[str, State]]]:
    """Yields a directory with what is missing on the other side, and the states of all files, of one instant."""
    aside = self._root / ASIDE
    try:
      found = next(filter(None, (self._freeze(aside, ended) for _ in range(_LOOKS))), None)
      if found is None:
        raise OSError(f"{self._root / self.name} changes too fast to be copied")
      yield aside, found
    finally:
      shutil.rmtree(aside, ignore_errors=True)

  def _freeze(self, aside: pathlib.Path, ended: bool) -> dict[str, State] | None:
    files.remove(aside)
    aside.mkdir()
    try:
      before = self._look(ended)
      found = {name: state[1:] for name, state in before.items()}
      for name in self._missing(found, ended):
        _link(self._root / name, aside / name)
      if self._look(ended) != before:
        return None
    except FileNotFoundError:
      return None
    growing = f"{self.name}/{_GROWS}"
    if not ended and (self._root / growing).exists():
      (aside / growing).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(self._root / growing, aside / growing)
      found[growing] = _state((aside / growing).stat())[1:]
    return found

  def _look(self, ended: bool) -> dict[str, tuple[int, int, int]]:
    """(inode, size, time) of what is whole, by path from the run's directory.

    Raises:
      FileNotFoundError: the directory has lost what every stage has; the copy must not lose it too.
    """
    found = dict(_walk(self._root / self.name, self.name, () if ended else _AT_THE_END))
    if f"{self.name}/{manifest.BEGUN}" not in found:
      raise FileNotFoundError(f"{self._root / self.name / manifest.BEGUN} is gone")
    found.pop(f"{self.name}/{manifest.NAME}", None)
    if not ended:
      found.pop(f"{self.name}/{_GROWS}", None)
    for name in self._beside if ended else ():
      if (self._root / name).exists():
        found[name] = _state((self._root / name).stat())
    return found


def _walk(directory: files.Path, name: str, without: Sequence[str]) -> Iterator[tuple[str, tuple[int, int, int]]]:
  """Yields the files that are whole below a directory called `name`; what goes away meanwhile is passed over."""
  with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
    for entry in entries:
      if entry.name.endswith(_UNFINISHED) or _UNFINISHED_CHECKPOINT in entry.name or entry.name in without:
        continue
      if entry.is_dir():
        yield from _walk(entry.path, f"{name}/{entry.name}", ())
      else:
        with contextlib.suppress(FileNotFoundError):
          yield f"{name}/{entry.name}", _state(entry.stat())


def _state(about: os.stat_result) -> tuple[int, int, int]:
  return about.st_ino, about.st_size, about.st_mtime_ns


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
  """A hard link, or a copy where the file system has none."""
  target.parent.mkdir(parents=True, exist_ok=True)
  try:
    os.link(source, target)
  except FileNotFoundError:
    raise
  except OSError:
    shutil.copy2(source, target)
