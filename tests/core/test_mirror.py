"""The remote copy of a stage is, whenever it is interrupted, what the stage's directory was at some instant."""

from __future__ import annotations

import json
import pathlib
import threading

import fsspec
import pytest

from dptdr_jax.core import files, mirror, preemption, remote, stage_copy
from dptdr_jax.core.errors import InputError, OutageError
from dptdr_jax.core.mirror import Mirror

URL = "memory://run"
STAGE = "train1"


@pytest.fixture(autouse=True)
def memory(monkeypatch):
  """The memory file system, empty before and after; nobody waits."""
  monkeypatch.setattr(remote.insist, "__kwdefaults__", remote.insist.__kwdefaults__ | {"pause": lambda seconds: None})
  found = fsspec.filesystem("memory")
  found.store.clear()
  yield found
  found.store.clear()


@pytest.fixture
def log(memory, monkeypatch):
  """What is done on the other side: (operation, path); `log.before`, if set, is called before each."""

  class Log(list):
    before = staticmethod(lambda operation, path: None)

  made, kind = Log(), type(memory)

  def watch(operation: str, name: str, place: int) -> None:
    function = getattr(kind, name)

    def watched(self, *arguments, **options):
      for path in arguments[place] if isinstance(arguments[place], list) else [arguments[place]]:
        made.append((operation, path.removeprefix("/run/")))
        made.before(operation, path)
      return function(self, *arguments, **options)

    monkeypatch.setattr(kind, name, watched)

  watch("put", "put_file", 1)
  watch("write", "pipe_file", 0)
  watch("remove", "rm", 0)
  return made


def write(root: pathlib.Path, tree: dict[str, str]) -> None:
  """Makes the stage's directory hold `tree`; what stays the same is not touched."""
  for path in [path for path in (root / STAGE).rglob("*") if path.is_file()]:
    if path.relative_to(root / STAGE).as_posix() not in tree:
      path.unlink()
  for name, text in tree.items():
    path = root / STAGE / name
    if not path.exists() or path.read_text() != text:
      path.parent.mkdir(parents=True, exist_ok=True)
      with files.atomic_path(path) as partial:
        partial.write_text(text)


def read(root: pathlib.Path) -> dict[str, str]:
  return {path.relative_to(root / STAGE).as_posix(): path.read_text()
          for path in (root / STAGE).rglob("*") if path.is_file()}  # fmt: skip


def fetched(directory: pathlib.Path, key: str = "k1", beside: tuple[str, ...] = ()) -> dict[str, str]:
  """What a machine gets that has nothing."""
  files.remove(directory)
  directory.mkdir()
  Mirror(URL, directory).fetch(STAGE, key, {}, beside)
  return read(directory)


BEGUN = '{"key": "k1"}'
# A stage as it goes on: a checkpoint, a better one with another retriever, the end.
STATES = (
  {"begun.json": BEGUN, "checkpoints/2/d/data": "two", "checkpoints/2/mark": "", "retriever/p": "best at two",
   "metrics.jsonl": "1\n2\n"},
  {"begun.json": BEGUN, "checkpoints/4/d/data": "four", "checkpoints/4/mark": "", "retriever/p": "best at four",
   "metrics.jsonl": "1\n2\n3\n4\n"},
  {"begun.json": BEGUN, "checkpoints/6/d/data": "six", "checkpoints/6/mark": "", "retriever/p": "best at six",
   "metrics.jsonl": "1\n2\n3\n4\n5\n6\n"},
  {"begun.json": BEGUN, "checkpoints/6/d/data": "six", "checkpoints/6/mark": "", "retriever/p": "best at six",
   "metrics.jsonl": "1\n2\n3\n4\n5\n6\n", "tensorboard/events": "curves", "manifest.json": BEGUN},
)  # fmt: skip


def follow(root: pathlib.Path, reached: list[int]) -> None:
  """A stage's life with its copy: through all states, an update after each."""
  copies = Mirror(URL, root)
  copies.fetch(STAGE, "k1", {})
  write(root, STATES[0])
  copy = copies._copies[STAGE]
  copy.begin("k1")
  for number, state in enumerate(STATES[:-1]):
    write(root, state)
    copy.update("k1", ended=False)
    reached.append(number)
  write(root, STATES[-1])
  copies.keep(STAGE, "k1")
  reached.append(len(STATES) - 1)


def test_order_of_writes(log, memory, tmp_path):
  follow(tmp_path, [])
  lists = [place for place, (operation, path) in enumerate(log) if "mirror-" in path and operation == "write"]
  assert len(lists) == 5  # begun; three states; the end
  for operation, path in log[lists[0] + 1 : lists[1]]:
    assert operation == "put", path
  second = log[lists[1] + 1 : lists[2] + 1]  # new files, the list, and only then what the list before named
  assert {operation for operation, _ in second[:-1]} == {"put"}
  assert ("put", "train1/retriever/p~") in second
  third = log[lists[2] + 1 : lists[3]]
  removed = {path for operation, path in third if operation == "remove"}
  assert removed == {"train1/retriever/p", "train1/metrics.jsonl", "train1/checkpoints/2/d/data",
                     "train1/checkpoints/2/mark"}  # fmt: skip
  assert log[-1] == ("write", "train1/manifest.json")
  names = {path.removeprefix("/run/train1/") for path in memory.find("/run")}
  assert names == {*STATES[-1], "mirror-0.json", "mirror-1.json"}


@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_any_operation_the_copy_is_of_one_instant_and_goes_on(log, memory, tmp_path, torn):
  (tmp_path / "whole").mkdir()
  follow(tmp_path / "whole", [])
  operations = len(log)
  for last in range(operations):
    memory.store.clear()
    log.clear()
    root, reached = tmp_path / f"run{last}", []
    root.mkdir()

    def die(operation, path, last=last):
      if len(log) > last:
        if torn and operation != "remove":  # a mounted file system may stop in the middle of a file
          memory.open(path, "wb").write(b'{"cut')
        raise KeyboardInterrupt

    log.before = die
    with pytest.raises(KeyboardInterrupt):
      follow(root, reached)
    log.before = lambda operation, path: None
    found = fetched(tmp_path / "other")
    done = reached[-1] if reached else -1
    expected = [STATES[number] for number in (done, done + 1) if 0 <= number < len(STATES)]
    if done == len(STATES) - 2:  # all but the manifest
      expected.append({name: text for name, text in STATES[-1].items() if name != "manifest.json"})
    assert found in expected or (done == -1 and found == {}), last
    follow(tmp_path / "other", [])
    assert fetched(tmp_path / "another") == STATES[-1], last
    assert not [path for path in memory.find("/run") if path.endswith("~")]


def test_what_is_not_whole_stays_here(tmp_path):
  unfinished = {"a.npy.partial": "x", "retriever.replaced/p": "x", "tokens/corpus.growing/tokens.bin": "x",
                "checkpoints/8.orbax-checkpoint-tmp/d": "x", "tensorboard/events": "x"}  # fmt: skip
  write(tmp_path, STATES[0] | unfinished)
  with pytest.raises(preemption.Preempted):
    stop(tmp_path, "k1")
  assert fetched(tmp_path / "other") == STATES[0]


def stop(root: pathlib.Path, key: str) -> None:
  """A stage that SIGTERM stops at once."""
  copies = Mirror(URL, root)
  copies.fetch(STAGE, key, {})
  with copies.follow(STAGE, key):
    raise preemption.Preempted("told so")


def test_a_directory_that_changes_while_it_is_looked_at(tmp_path, monkeypatch):
  write(tmp_path, STATES[0])
  link, states = stage_copy._link, [STATES[1], STATES[2]]

  def changes(source, target):
    if states and "metrics" not in source.name:
      write(tmp_path, states.pop(0))
    link(source, target)

  monkeypatch.setattr(stage_copy, "_link", changes)
  with pytest.raises(preemption.Preempted):
    stop(tmp_path, "k1")
  assert fetched(tmp_path / "other") == STATES[2]


def test_curves_alone_are_no_news(log, tmp_path):
  copies = Mirror(URL, tmp_path)
  copies.fetch(STAGE, "k1", {})
  write(tmp_path, STATES[0])
  copies._copies[STAGE].begin("k1")
  copies._copies[STAGE].update("k1", ended=False)
  log.clear()
  write(tmp_path, STATES[0] | {"metrics.jsonl": "1\n2\n3\n"})
  copies._copies[STAGE].update("k1", ended=False)
  assert log == []


def test_the_thread_goes_on_when_the_network_fails(log, memory, tmp_path, caplog):
  copies = Mirror(URL, tmp_path)
  copies.fetch(STAGE, "k1", {})
  write(tmp_path, STATES[0])
  copy = copies._copies[STAGE]
  copy.begin("k1")
  failures = [OSError("no route"), OSError("no route")]

  def fails(operation, path):
    if failures:
      raise failures.pop()

  log.before = fails
  waits, sends = [], threading.Event()

  class Stop:
    def wait(self, seconds):
      waits.append(seconds)
      return len(waits) == 5

    def is_set(self):
      return sends.is_set()

  mirror._keep_copying(copy, "k1", Stop())
  assert waits == [10, 20, 40, 10, 10] and caplog.text.count("is behind (no route)") == 2
  assert fetched(tmp_path / "other") == STATES[0]


def test_a_remote_that_stays_away_is_an_outage_when_the_stage_ends(log, tmp_path):
  copies = Mirror(URL, tmp_path)
  copies.fetch(STAGE, "k1", {})
  write(tmp_path, STATES[-1])

  def fails(operation, path):
    raise OSError("no route")

  log.before = fails
  with pytest.raises(OutageError, match=r"copy of train1 on memory://run failed \(no route\).*local files are whole"):
    copies.keep(STAGE, "k1")


def test_sigterm_while_the_remote_is_away_tries_once_and_says_what_is_only_here(log, tmp_path, caplog):
  write(tmp_path, STATES[0])
  copies, tried = Mirror(URL, tmp_path), []
  copies.fetch(STAGE, "k1", {})

  def fails(operation, path):
    tried.append(path)
    raise OSError("no route")

  with pytest.raises(preemption.Preempted, match="told so"), copies.follow(STAGE, "k1"):
    log.before = fails
    raise preemption.Preempted("told so")
  assert len(tried) == 1
  assert "ends behind (no route); 4 files are only here: train1/begun.json, train1/checkpoints/2/d/data" in caplog.text


def test_sigterm_while_the_remote_hangs_is_not_held_up(log, tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(mirror, "LAST_S", 0.2)
  write(tmp_path, STATES[0])
  copies, goes_on = Mirror(URL, tmp_path), threading.Event()
  copies.fetch(STAGE, "k1", {})
  with pytest.raises(preemption.Preempted, match="told so"), copies.follow(STAGE, "k1"):
    log.before = lambda operation, path: goes_on.wait(60)
    raise preemption.Preempted("told so")
  goes_on.set()
  assert "ends behind (not done in 0.2 s); 4 files are only here" in caplog.text
  for thread in threading.enumerate():
    if thread.name.startswith("last copy"):
      thread.join()
  assert fetched(tmp_path / "other") == STATES[0]  # a machine that lives on may still end it


def test_sigterm_while_a_finished_stage_is_copied_ends_it_and_the_next_start_goes_on(log, tmp_path, monkeypatch):
  write(tmp_path, STATES[-1])
  copies = Mirror(URL, tmp_path)
  copies.fetch(STAGE, "k1", {})
  with monkeypatch.context() as told:
    told.setattr(preemption, "asked", lambda: ("put", "train1/metrics.jsonl") in log)
    told.setattr(remote, "parts", lambda todo: [[one] for one in todo])
    with pytest.raises(preemption.Preempted, match="the copy of train1 is not whole"):
      copies.keep(STAGE, "k1")
  assert [path for operation, path in log if operation == "put"] == ["train1/metrics.jsonl"]
  again = Mirror(URL, tmp_path)
  again.fetch(STAGE, "k1", {})
  again.keep(STAGE, "k1")
  assert fetched(tmp_path / "other") == STATES[-1]


def test_a_list_that_was_written_though_it_seemed_to_fail(memory, tmp_path, monkeypatch):
  copies = Mirror(URL, tmp_path)
  copies.fetch(STAGE, "k1", {})
  copy = copies._copies[STAGE]
  write(tmp_path, STATES[0])
  copy.begin("k1")
  pipe = type(memory).pipe_file

  def loses_the_answer(self, path, value, **options):
    pipe(self, path, value, **options)
    raise OSError("reset")

  monkeypatch.setattr(type(memory), "pipe_file", loses_the_answer)
  with pytest.raises(OSError, match="reset"):
    copy.update("k1", ended=False)
  monkeypatch.setattr(type(memory), "pipe_file", pipe)
  write(tmp_path, STATES[1])
  copy.update("k1", ended=False)
  assert fetched(tmp_path / "other") == STATES[1]


def test_two_runs_on_one_remote(tmp_path):
  (tmp_path / "a").mkdir()
  first = Mirror(URL, tmp_path / "a")
  first.fetch(STAGE, "k1", {})
  write(tmp_path / "a", STATES[0])
  first._copies[STAGE].begin("k1")
  fetched(tmp_path / "b")
  with pytest.raises(preemption.Preempted):
    write(tmp_path / "b", STATES[1])
    stop(tmp_path / "b", "k1")
  with pytest.raises(InputError, match="another run writes here"):
    first._copies[STAGE].update("k1", ended=False)


def test_another_key_begins_anew_and_what_is_here_is_not_replaced(memory, tmp_path):
  follow(tmp_path, [])
  assert fetched(tmp_path / "other", key="k2") == {}
  write(tmp_path / "other", {"begun.json": '{"key": "k2"}', "retriever/p": "of k2"})
  with pytest.raises(preemption.Preempted):
    stop(tmp_path / "other", "k2")
  assert fetched(tmp_path / "another", key="k1") == {}
  assert {json.loads(text)["key"] for text in [memory.cat("/run/train1/begun.json")]} == {"k2"}
  here = {"begun.json": '{"key": "k2"}', "retriever/p": "newer, of k2"}
  write(tmp_path / "other", here)
  Mirror(URL, tmp_path / "other").fetch(STAGE, "k2", {})
  assert read(tmp_path / "other") == here


def test_the_log_says_why_a_copy_is_not_taken_up(tmp_path, caplog):
  about = json.dumps({"key": "k1", "made_from": {"config": {"seed": 0}}})
  write(tmp_path, STATES[0] | {"begun.json": about})
  with pytest.raises(preemption.Preempted):
    stop(tmp_path, "k1")
  (tmp_path / "other").mkdir()
  Mirror(URL, tmp_path / "other").fetch(STAGE, "k2", {"config": {"seed": 1}})
  assert "train1: the copy on memory://run is of another run (config.seed: 0 → 1)" in caplog.text


def test_files_beside_and_files_that_come_later(tmp_path, memory):
  follow(tmp_path, [])
  (tmp_path / "results.json").write_text("{}")
  copies = Mirror(URL, tmp_path)
  copies.fetch(STAGE, "k1", {}, ("results.json",))
  copies.keep(STAGE, "k1")
  assert memory.cat("/run/results.json") == b"{}"
  write(tmp_path, STATES[-1] | {"bm25/index": "built by another stage"})
  copies.keep(STAGE, "k1")
  assert fetched(tmp_path / "other", beside=("results.json",)) == STATES[-1] | {"bm25/index": "built by another stage"}
  assert (tmp_path / "other/results.json").read_text() == "{}"


def test_what_breaks_here_after_the_end_does_not_reach_the_copy_and_comes_back(tmp_path):
  follow(tmp_path, [])
  broken = {name: text for name, text in STATES[-1].items() if name != "checkpoints/6/d/data"}
  write(tmp_path, broken | {"retriever/p": "best"})
  copies = Mirror(URL, tmp_path)
  copies.fetch(STAGE, "k1", {})
  copies.keep(STAGE, "k1")
  assert fetched(tmp_path / "other") == STATES[-1]
  (tmp_path / STAGE / "manifest.json").write_text("{")  # as one that cannot be read, or is set back
  Mirror(URL, tmp_path).fetch(STAGE, "k1", {})
  assert read(tmp_path) == STATES[-1]


def test_a_run_that_has_had_no_remote_is_copied_and_a_whole_copy_replaces_what_is_not_whole(tmp_path):
  for machine in ("first", "second"):
    (tmp_path / machine).mkdir()
  write(tmp_path / "first", STATES[-1])
  copies = Mirror(URL, tmp_path / "first")
  copies.fetch(STAGE, "k1", {})
  copies.keep(STAGE, "k1")
  write(tmp_path / "second", STATES[0])
  Mirror(URL, tmp_path / "second").fetch(STAGE, "k1", {})
  assert read(tmp_path / "second") == STATES[-1]


def test_a_directory_that_is_lost_while_the_stage_runs_does_not_take_its_copy_along(tmp_path, caplog):
  (tmp_path / "run").mkdir()
  copies = Mirror(URL, tmp_path / "run")
  copies.fetch(STAGE, "k1", {})
  write(tmp_path / "run", STATES[0])
  with pytest.raises(preemption.Preempted), copies.follow(STAGE, "k1"):
    copies._copies[STAGE].update("k1", ended=False)
    files.remove(tmp_path / "run" / STAGE)
    raise preemption.Preempted("between two steps")
  assert "begun.json is gone" in caplog.text
  assert fetched(tmp_path / "other") == STATES[0]


def test_a_mounted_remote_keeps_no_empty_directories(tmp_path):
  (tmp_path / "run").mkdir()
  copies = Mirror(f"file://{tmp_path}/there", tmp_path / "run")
  copies.fetch(STAGE, "k1", {})
  for state in STATES[:2]:
    write(tmp_path / "run", state)
    with pytest.raises(preemption.Preempted), copies.follow(STAGE, "k1"):
      raise preemption.Preempted("between two steps")
  assert [path.name for path in (tmp_path / "there/train1/checkpoints").iterdir()] == ["4"]


def test_a_remote_is_a_url(tmp_path):
  with pytest.raises(InputError, match="a remote is a URL"):
    Mirror("bucket/run", tmp_path)
