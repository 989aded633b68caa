"""What is read from a remote path is staged whole to a cache; what fails is tried again, for a while."""

from __future__ import annotations

import errno
import multiprocessing
import pathlib

import fsspec
import pytest

from dptdr_jax.core import preemption, remote
from dptdr_jax.core.errors import InputError, OutageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("DPTDR_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture
def memory():
  """The memory file system, empty before and after."""
  found = fsspec.filesystem("memory")
  found.store.clear()
  yield found
  found.store.clear()


@pytest.mark.parametrize("path", ["gs://b/x", "s3://b", "memory://a/b", "file:///data/x", "simplecache::gs://b/x"])
def test_urls(path):
  assert remote.is_remote(path)


@pytest.mark.parametrize("path", ["/data/x", "a/b", "package:name", "roberta-base", pathlib.Path("gs://b/x"), "c:/x"])
def test_what_is_no_url(path):
  assert not remote.is_remote(path)
  assert remote.staged(path) == pathlib.Path(path)


def test_a_file_and_a_directory_are_staged_once_and_anew_when_they_change(memory, cache):
  memory.pipe({"/run/vectors/a.npy": b"one", "/run/vectors/deep/b.npy": b"two"})
  first = remote.staged("memory://run/vectors")
  assert (first / "a.npy").read_bytes() == b"one" and (first / "deep/b.npy").read_bytes() == b"two"
  inode = (first / "a.npy").stat().st_ino
  assert remote.staged("memory://run/vectors/") == first and (first / "a.npy").stat().st_ino == inode
  assert remote.staged("memory://run/vectors/a.npy").read_bytes() == b"one"
  memory.pipe("/run/vectors/a.npy", b"new")  # of the same size
  second = remote.staged("memory://run/vectors")
  assert (second / "a.npy").read_bytes() == b"new"
  assert (first / "a.npy").read_bytes() == b"one"  # who reads it goes on reading it


def test_where_a_staged_path_comes_from(memory):
  memory.pipe("/run/vectors/deep/b.npy", b"two")
  staged = remote.staged("memory://run/vectors")
  assert remote.origin(staged / "deep/b.npy") == "memory://run/vectors/deep/b.npy"
  assert remote.origin(staged / "../other") == "memory://run/other"
  assert remote.origin("/data/x") == "/data/x"


def test_what_was_interrupted_is_absent(memory, cache, monkeypatch):
  memory.pipe({"/run/a": b"one", "/run/b": b"two"})
  get, calls = type(memory).get_file, []

  def fails(self, path, local, **options):
    calls.append(path)
    if len(calls) == 2:
      raise KeyboardInterrupt
    get(self, path, local, **options)

  monkeypatch.setattr(type(memory), "get_file", fails)
  with pytest.raises(KeyboardInterrupt):
    remote.staged("memory://run")
  assert [path.suffix for path in (cache / "remote").iterdir()] == [".lock"]
  assert (remote.staged("memory://run") / "b").read_bytes() == b"two"


def test_a_cut_download_is_fetched_again(memory, monkeypatch):
  memory.pipe("/run/a", b"whole")
  get, calls = type(memory).get_file, []

  def cuts(self, path, local, **options):
    get(self, path, local, **options)
    calls.append(path)
    if len(calls) == 1:
      pathlib.Path(local).write_bytes(b"who")

  monkeypatch.setattr(type(memory), "get_file", cuts)
  monkeypatch.setattr(remote.insist, "__kwdefaults__", remote.insist.__kwdefaults__ | {"pause": lambda seconds: None})
  assert remote.staged("memory://run/a").read_bytes() == b"whole"


def _stage(url: str) -> str:
  return (remote.staged(url) / "a").read_text()


def test_several_processes_at_once(tmp_path):
  (tmp_path / "there").mkdir()
  (tmp_path / "there/a").write_text("x" * 1_000_000)
  with multiprocessing.get_context("spawn").Pool(3) as pool:
    assert pool.map(_stage, [f"file://{tmp_path}/there"] * 3) == ["x" * 1_000_000] * 3


def test_what_cannot_work_says_so(memory):
  with pytest.raises(InputError, match="memory://none: nothing is there"):
    remote.staged("memory://none")
  with pytest.raises(InputError, match=r"gs:// needs a package.*pip install 'dptdr_jax\[gcs\]'"):
    remote.staged("gs://bucket/x")
  with pytest.raises(InputError, match=r"s3:// needs a package.*pip install 'dptdr_jax\[s3\]'"):
    remote.staged("s3://bucket/x")
  with pytest.raises(InputError, match="no such kind of remote path"):
    remote.staged("nonsense://bucket/x")


def test_what_fails_is_tried_again_with_growing_pauses():
  answers, pauses = [OSError("reset"), TimeoutError(), OSError("reset"), "done"], []

  def act():
    answer = answers.pop(0)
    if isinstance(answer, Exception):
      raise answer
    return answer

  assert remote.insist(act, "copying", pause=pauses.append) == "done"
  assert pauses == [1, 2, 4]


def test_it_is_given_up_after_a_bounded_time_or_at_once_where_nothing_will_change():
  pauses = []

  def act(error=OSError("unreachable")):  # noqa: B008
    raise error

  with pytest.raises(OutageError, match=r"copying failed \(unreachable\), tried again for 183 s. Mend it"):
    remote.insist(act, "copying", fix="Mend it", patience_s=200, pause=pauses.append)
  assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
  with pytest.raises(InputError, match=r"copying failed \(no such bucket\)"):
    remote.insist(lambda: act(FileNotFoundError("no such bucket")), "copying", pause=pytest.fail)


class HttpError(Exception):
  """As gcsfs has it."""

  def __init__(self, code: int):
    super().__init__(f"status {code}")
    self.code = code


class NoCredentialsError(Exception):
  """As botocore has it."""


@pytest.mark.parametrize(
  ("error", "kind"),
  [
    (OSError("Forbidden: bucket/x"), InputError),
    (OSError(errno.ENOSPC, "No space left on device"), InputError),
    (OSError(errno.EINVAL, "The specified bucket is not valid"), InputError),
    (ValueError("Bad Request: bucket/x"), InputError),
    (HttpError(401), InputError),
    (NoCredentialsError("Unable to locate credentials"), InputError),
    (HttpError(503), OutageError),
    (ConnectionResetError("reset"), OutageError),
    (TimeoutError(), OutageError),
  ],
)
def test_what_is_refused_is_an_error_of_input_and_what_is_away_an_outage(error, kind):
  def act():
    raise error

  with pytest.raises((InputError, OutageError)) as raised:
    remote.insist(act, "copying", patience_s=0)
  assert raised.type is kind


def test_sigterm_ends_the_patience(monkeypatch):
  def act():
    raise OSError("unreachable")

  def told(seconds):
    monkeypatch.setattr(preemption, "asked", lambda: True)

  with pytest.raises(preemption.Preempted, match=r"copying failed \(unreachable\)"):
    remote.insist(act, "copying", pause=told)
  remote._wait(60)  # returns at once


def test_writing_to_a_url_puts_the_mark_last(memory, tmp_path, monkeypatch):
  put, order = type(memory).put_file, []

  def noted(self, local, path, **options):
    order.append(path)
    put(self, local, path, **options)

  monkeypatch.setattr(type(memory), "put_file", noted)
  with remote.written("memory://out/retriever", last="about.json") as local:
    (local / "deep").mkdir(parents=True)
    for name in ("about.json", "deep/x", "z"):
      (local / name).write_text(name)
  assert order == ["/out/retriever/deep/x", "/out/retriever/z", "/out/retriever/about.json"]
  with remote.written("memory://out/lines.jsonl") as local:
    local.write_text("line")
  assert memory.cat("/out/lines.jsonl") == b"line"
  with remote.written(tmp_path / "here") as local:
    assert local == tmp_path / "here"


OLD = {"about.json": "old", "weights": "old", "backbone/model": "old"}
NEW = {"about.json": "new", "weights": "new", "words": "new"}


def export(content: dict[str, str]) -> None:
  with remote.written("memory://out/retriever", last="about.json", whole=True) as local:
    for name, text in content.items():
      (local / name).parent.mkdir(parents=True, exist_ok=True)
      (local / name).write_text(text)


def test_written_over_and_killed_at_any_operation_an_export_is_the_old_one_the_new_one_or_none(memory, monkeypatch):
  kind, done = type(memory), []

  def watch(name: str) -> None:
    function = getattr(kind, name)

    def watched(self, *arguments, **options):
      if len(done) == limit:
        raise KeyboardInterrupt
      done.append(name)
      return function(self, *arguments, **options)

    monkeypatch.setattr(kind, name, watched)

  def there() -> dict[str, str]:
    return {path.removeprefix("/out/retriever/"): memory.cat(path).decode() for path in memory.find("/out/retriever")}

  watch("put_file")
  watch("rm")
  limit, seen = 0, []
  while True:
    memory.store.clear()
    memory.pipe({f"/out/retriever/{name}": text.encode() for name, text in OLD.items()})
    done.clear()
    try:
      export(NEW)
      break
    except KeyboardInterrupt:
      found = there()
    seen.append(found.get("about.json"))
    assert seen[-1] != "old" or found == OLD
    assert seen[-1] != "new" or found.items() >= NEW.items()
    limit += 1
  assert there() == NEW
  assert seen == ["old", None, None, None, "new"]  # rm, three files, rm
