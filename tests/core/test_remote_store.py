"""Whenever an upload is interrupted, the remote copy of an artefact is the one before, the new one, or absent."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import threading

import fsspec
import pytest

from dptdr_jax.core import files, preemption, remote
from dptdr_jax.core.errors import InputError, OutageError
from dptdr_jax.core.remote_store import RemoteStore

URL = "memory://copies/run"
NAME = "train/0a1b"
FILES = {"retriever/p": "prompts", "retriever/same": "prompts", "report": "r", "empty": ""}
BEGUN = '{"key": "0a1b"}'
# An unfinished artefact at three checkpoints.
STATES = [
  {"begun.json": BEGUN, f"checkpoints/{step}/d/data": text, "best": f"at {text}",
   "metrics.jsonl": "line\n" * step}
  for step, text in ((2, "two"), (4, "four"), (6, "six"))
]  # fmt: skip


class Log(list):
  """What is done on the remote: (operation, name below URL); `before` is called before each operation."""

  before = staticmethod(lambda operation, path: None)
  is_dead = False


@pytest.fixture(autouse=True)
def memory(monkeypatch):
  """The memory file system, empty before and after; retries and local disks do not wait."""
  monkeypatch.setattr(files, "sync", lambda path: None)
  monkeypatch.setattr(remote, "_wait", lambda seconds: None)
  file_system = fsspec.filesystem("memory")
  file_system.store.clear()
  yield file_system
  file_system.store.clear()


@pytest.fixture
def log(memory, monkeypatch):
  log, kind = Log(), type(memory)

  def watch(operation: str, method: str, place: int) -> None:
    function = getattr(kind, method)

    def watched(self, *arguments, **options):
      for path in arguments[place] if isinstance(arguments[place], list) else [arguments[place]]:
        log.append((operation, path.removeprefix("/copies/run/")))
        log.before(operation, path)
      return function(self, *arguments, **options)

    monkeypatch.setattr(kind, method, watched)

  watch("put", "put_file", 1)
  watch("write", "pipe_file", 0)
  watch("remove", "rm_file", 0)
  return log


def write(directory: pathlib.Path, tree: dict[str, str]) -> pathlib.Path:
  """Makes a directory hold `tree`; files that stay the same are not touched."""
  for path in [path for path in directory.rglob("*") if path.is_file()]:
    if path.relative_to(directory).as_posix() not in tree:
      path.unlink()
  for name, text in tree.items():
    path = directory / name
    if not path.exists() or path.read_text() != text:
      path.parent.mkdir(parents=True, exist_ok=True)
      with files.atomic_path(path) as partial:
        partial.write_text(text)
  return directory


def finished(directory: pathlib.Path, tree: dict[str, str] = FILES) -> pathlib.Path:
  """A finished artefact."""
  listed = {name: [len(text), hashlib.sha256(text.encode()).hexdigest()] for name, text in tree.items()}
  about = {"kind": "train", "key": "0a1b", "files": listed, "seconds": 1.5}
  return write(directory, tree | {"artefact.json": json.dumps(about)})


def read(directory: pathlib.Path) -> dict[str, str]:
  return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


def fetched(tmp_path: pathlib.Path, *, partial: bool = False, url: str = URL) -> dict[str, str] | None:
  """What a machine gets that has nothing."""
  target = tmp_path / "fetched/train/0a1b"
  files.remove(target)
  store = RemoteStore(url, tmp_path / "other-aside")
  if (store.fetch_partial if partial else store.fetch)(NAME, target):
    return read(target)
  assert not target.exists()
  return None


def saved(store: RemoteStore, directory: pathlib.Path) -> None:
  """Uploads a snapshot."""
  store.snapshot(NAME, directory)
  store.last(60)


def interrupt(log: Log, memory, last: int, torn: bool) -> None:
  """Ends the process at operation `last`; a mounted file system may stop in the middle of a file."""

  def die(operation, path):
    log.is_dead = len(log) > last
    if log.is_dead:
      if torn and operation != "remove":
        memory.open(path, "wb").write(b'{"')
      raise KeyboardInterrupt

  log.clear()
  log.before = die


@pytest.mark.parametrize("url", [URL, "file"])
def test_finished_artefact_is_uploaded_once_and_fetched(log, tmp_path, url):
  url = url if url == URL else f"file://{tmp_path}/there"
  directory = finished(tmp_path / "here")
  beside = RemoteStore(url, tmp_path / "beside")
  RemoteStore(url, tmp_path / "aside").upload(NAME, directory)
  assert fetched(tmp_path, url=url) == read(directory)
  assert url != URL or log[-1] == ("write", f"{NAME}/artefact.json")
  log.clear()
  for store in (beside, RemoteStore(url, tmp_path / "aside")):
    store.upload(NAME, directory)
    assert store.names() == {NAME}
    assert not store.fetch("train/0a1c", tmp_path / "other") and not store.fetch_partial(NAME, tmp_path / "other")
  assert not log


@pytest.mark.parametrize("torn", [False, True])
def test_upload_killed_at_any_operation_is_complete_or_absent(log, memory, tmp_path, torn):
  directory = finished(tmp_path / "here")
  for last in range(6):  # the mark, four files, artefact.json
    memory.store.clear()
    interrupt(log, memory, last, torn)
    with pytest.raises(KeyboardInterrupt):
      RemoteStore(URL, tmp_path / "aside").upload(NAME, directory)
    log.before = Log.before
    assert fetched(tmp_path) is None
    RemoteStore(URL, tmp_path / "aside").upload(NAME, directory)
    assert fetched(tmp_path) == read(directory)


def test_sigterm_interrupts_upload_and_next_start_completes_it(log, tmp_path, monkeypatch):
  directory = finished(tmp_path / "here")
  with monkeypatch.context() as patch:
    patch.setattr(remote, "_PART", 1)
    patch.setattr(preemption, "asked", lambda: ("put", f"{NAME}/empty") in log)
    with pytest.raises(preemption.Preempted, match="it is complete here"):
      RemoteStore(URL, tmp_path / "aside").upload(NAME, directory)
  assert [name for operation, name in log if operation == "put"] == [f"{NAME}/empty"]
  RemoteStore(URL, tmp_path / "aside").upload(NAME, directory)
  assert fetched(tmp_path) == read(directory)


DAMAGES = {
  "lost": ("retriever/p", lambda memory, path: memory.rm(path)),
  "cut": ("retriever/p", lambda memory, path: memory.pipe(path, b"prom")),
  "flipped": ("retriever/p", lambda memory, path: memory.pipe(path, b"Prompts")),
  "cut artefact.json": ("artefact.json", lambda memory, path: memory.pipe(path, memory.cat(path)[:-9])),
  "other key": ("artefact.json", lambda memory, path: memory.pipe(path, memory.cat(path).replace(b"0a1b", b"ffff"))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_artefact_counts_as_absent_and_is_replaced(memory, tmp_path, caplog, damage):
  directory = finished(tmp_path / "here")
  RemoteStore(URL, tmp_path / "aside").upload(NAME, directory)
  name, change = DAMAGES[damage]
  change(memory, f"/copies/run/{NAME}/{name}")
  store = RemoteStore(URL, tmp_path / "aside")
  assert not store.fetch(NAME, tmp_path / "target") and not (tmp_path / "target").exists()
  assert f"{NAME}: {name} is damaged on {URL}; the copy is ignored" in caplog.text
  store.upload(NAME, finished(tmp_path / "made again", FILES | {"report": "again"}))
  assert fetched(tmp_path)["report"] == "again"


def test_damaged_snapshot_counts_as_absent_and_is_replaced(memory, tmp_path):
  saved(RemoteStore(URL, tmp_path / "aside"), write(tmp_path / "here", STATES[0]))
  content = hashlib.sha256(b"two").hexdigest()
  memory.pipe(f"/copies/run/{NAME}.partial/data/{content}", b"owt")
  store = RemoteStore(URL, tmp_path / "aside")
  assert not store.fetch_partial(NAME, tmp_path / "target")
  saved(store, tmp_path / "here")
  assert fetched(tmp_path, partial=True) == STATES[0]


@pytest.mark.parametrize("name", ["../../x", "b/c", "/x", "a/../../x", "a//x", "", ".", "a\\..\\x", "c:/x", "a\0x"])
def test_names_that_lead_outside_are_refused(memory, tmp_path, name):
  store = RemoteStore(URL, tmp_path / "deep/aside")
  before = sorted(tmp_path.rglob("*"))
  memory.pipe("/copies/run/train/x", b"x")
  checksum = hashlib.sha256(b"x").hexdigest()
  about = {"kind": "train", "key": "0a1b", "serial": 1, "files": {"b": [1, checksum], name: [1, checksum]}}
  memory.pipe({f"/copies/run/{NAME}.partial/data/{checksum}": b"x", "/copies/x": b"x"})
  memory.pipe({f"/copies/run/{NAME}{place}": json.dumps(about).encode()
               for place in ("/artefact.json", ".partial/listing-1.json")})  # fmt: skip
  there = memory.find("/copies")
  for place, act in {
    "/artefact.json": lambda: store.fetch(NAME, tmp_path / "deep/target"),
    ".partial/listing-1.json": lambda: store.fetch_partial(NAME, tmp_path / "deep/target"),
  }.items():
    with pytest.raises(InputError, match=f"{URL}/{NAME}{place}: an unsafe file name"):
      act()
  with pytest.raises(InputError, match="an unsafe file name"):
    store.remove([NAME])
  assert sorted(tmp_path.rglob("*")) == before and memory.find("/copies") == there


def test_directory_of_others_is_refused_untouched(memory, tmp_path):
  for tree in ({"thesis.tex": b"t"}, {"dptdr.json": b'{"kind": "other"}'}, {"dptdr.json": b"{", "thesis.tex": b"t"}):
    memory.store.clear()
    memory.pipe({f"/copies/run/{name}": content for name, content in tree.items()})
    with pytest.raises(InputError, match="memory://copies/run: the directory is not empty and not a store of ours"):
      RemoteStore(URL, tmp_path / "aside")
    assert {name: memory.cat(f"/copies/run/{name}") for name in tree} == tree
    assert len(memory.find("/copies")) == len(tree)
  with pytest.raises(InputError, match="a remote is a URL"):
    RemoteStore("bucket/run", tmp_path / "aside")


def test_files_of_others_in_the_store_are_kept(memory, tmp_path):
  store = RemoteStore(URL, tmp_path / "aside")
  places = ("notes", "train/notes", f"{NAME}/notes", f"{NAME}.partial/notes", f"{NAME}.partial/data/notes")
  others = {f"/copies/run/{place}": b"x" for place in places}
  memory.pipe(others)
  saved(store, write(tmp_path / "here", STATES[0]))
  saved(store, write(tmp_path / "here", STATES[1]))
  store.upload(NAME, finished(tmp_path / "done"))
  memory.rm(f"/copies/run/{NAME}/report")
  RemoteStore(URL, tmp_path / "aside").upload(NAME, finished(tmp_path / "done"))
  store.remove(store.names())
  assert {*memory.find("/copies")} == {*others, "/copies/run/dptdr.json"} and store.names() == set()


def life(log: Log, tmp_path: pathlib.Path, reached: list[int]) -> None:
  """An artefact is made, with a snapshot of each state, and finished."""
  store = RemoteStore(URL, tmp_path / "aside")
  for number, state in enumerate(STATES):
    store.snapshot(NAME, write(tmp_path / "here", state))
    store._threads[-1].join()
    if log.is_dead:
      raise KeyboardInterrupt
    reached.append(number)
  store.upload(NAME, finished(tmp_path / "done"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_snapshot_killed_at_any_operation_is_the_old_or_the_new_one(log, memory, tmp_path):
  life(log, tmp_path, [])
  expected = {f"/copies/run/{name}" for name in ("dptdr.json", *(f"{NAME}/{name}" for name in read(tmp_path / "done")))}
  assert {*memory.find("/copies")} == expected
  for last in range(len(log)):
    memory.store.clear()
    interrupt(log, memory, last, torn=True)
    reached = [-1]
    with pytest.raises(KeyboardInterrupt):
      life(log, tmp_path, reached)
    log.before, log.is_dead = Log.before, False
    complete, snapshot = fetched(tmp_path), fetched(tmp_path, partial=True)
    possible = [STATES[number] for number in (reached[-1], reached[-1] + 1) if 0 <= number < len(STATES)]
    assert snapshot in possible or (snapshot is None and reached == [-1]) or complete, last
    life(log, tmp_path, [])
    assert fetched(tmp_path) == read(tmp_path / "done")
    assert {*memory.find("/copies")} == expected, last


def test_only_new_contents_are_uploaded(log, tmp_path):
  store = RemoteStore(URL, tmp_path / "aside")
  saved(store, write(tmp_path / "here", STATES[0]))
  log.clear()
  saved(store, write(tmp_path / "here", STATES[0] | {"more": "two"}))
  assert log == [("write", f"{NAME}.partial/listing-0.json")]
  assert fetched(tmp_path, partial=True) == STATES[0] | {"more": "two"}


def test_snapshot_is_of_one_moment_and_the_newest_that_waits_wins(log, tmp_path, caplog):
  store, started, proceed = RemoteStore(URL, tmp_path / "aside"), threading.Event(), threading.Event()

  def hang(operation, path):
    started.set()
    proceed.wait(60)

  log.before = hang
  store.snapshot(NAME, write(tmp_path / "here", STATES[0]))
  started.wait(60)
  for state in STATES[1:]:
    store.snapshot(NAME, write(tmp_path / "here", state))
  (tmp_path / "here/metrics.jsonl").open("a").write("appended later")
  store.last(0.1)
  assert f"{NAME}: the newest checkpoint is not on {URL} (not done in 0.1 s)" in caplog.text
  proceed.set()
  store.last(60)
  assert fetched(tmp_path, partial=True) == STATES[2]
  listings = [name for operation, name in log if "listing" in name and operation == "write"]
  assert listings == [f"{NAME}.partial/listing-1.json", f"{NAME}.partial/listing-0.json"]
  assert not list((tmp_path / "aside").iterdir())


def test_incomplete_files_are_left_out_and_written_files_are_noticed(log, tmp_path, caplog):
  incomplete = ("a.npy.partial", "tokens.growing/lengths", "8.orbax-checkpoint-tmp-1/d", "old.removed/p")
  directory = write(tmp_path / "here", STATES[0] | dict.fromkeys(incomplete, "x"))
  (directory / "link").symlink_to(tmp_path)
  store = RemoteStore(URL, tmp_path / "aside")
  saved(store, directory)
  assert fetched(tmp_path, partial=True) == STATES[0]
  log.before = lambda operation, path: (directory / "best").open("a").write("in place")
  saved(store, write(directory, STATES[1]))
  assert "best was written to during the upload" in caplog.text
  shutil.rmtree(directory)
  saved(store, directory)
  directory.mkdir()
  saved(store, directory)
  assert "begun.json is lost here" in caplog.text and fetched(tmp_path, partial=True) == STATES[0]


def test_failed_snapshot_is_logged_and_the_next_one_makes_up_for_it(log, tmp_path, caplog):
  store = RemoteStore(URL, tmp_path / "aside")

  def fail(operation, path):
    raise OSError("no route")

  log.before = fail
  saved(store, write(tmp_path / "here", STATES[0]))
  assert f"{NAME}: the newest checkpoint is not on {URL} (no route)" in caplog.text
  log.before = Log.before
  saved(store, write(tmp_path / "here", STATES[1]))
  assert fetched(tmp_path, partial=True) == STATES[1]
  log.before = fail
  with pytest.raises(
    OutageError, match=r"remote store memory://copies/run failed \(no route\).*local files are complete"
  ):
    store.upload(NAME, finished(tmp_path / "done"))


def test_listing_that_was_written_though_its_upload_failed(log, memory, tmp_path, monkeypatch):
  store, pipe = RemoteStore(URL, tmp_path / "aside"), type(memory).pipe_file

  def loses_the_answer(self, path, value, **options):
    pipe(self, path, value, **options)
    raise OSError("reset")

  with monkeypatch.context() as patch:
    patch.setattr(type(memory), "pipe_file", loses_the_answer)
    saved(store, write(tmp_path / "here", STATES[0]))
  saved(store, write(tmp_path / "here", STATES[1]))
  assert fetched(tmp_path, partial=True) == STATES[1] and not store._failures


def test_two_runs_that_write_one_artefact(tmp_path):
  first = RemoteStore(URL, tmp_path / "a")
  saved(first, write(tmp_path / "here", STATES[0]))
  saved(RemoteStore(URL, tmp_path / "b"), write(tmp_path / "here", STATES[1]))
  saved(first, write(tmp_path / "here", STATES[2]))
  with pytest.raises(InputError, match=f"{NAME}.partial: another run writes here"):
    first.snapshot(NAME, tmp_path / "here")
  assert fetched(tmp_path, partial=True) == STATES[1]


def test_mounted_remote_keeps_no_empty_directories(tmp_path):
  store = RemoteStore(f"file://{tmp_path}/there", tmp_path / "aside")
  saved(store, write(tmp_path / "here", STATES[0]))
  store.upload(NAME, finished(tmp_path / "done"))
  assert sorted(path.name for path in (tmp_path / "there/train").iterdir()) == ["0a1b"]
