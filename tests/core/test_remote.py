"""Remote paths are downloaded to a cache as a whole, uploads end with one mark, failures are retried for a while."""

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


@pytest.fixture(autouse=True)
def pauses(monkeypatch) -> list[float]:
  """Seconds that retries would have waited."""
  waited = []
  monkeypatch.setattr(remote, "_wait", waited.append)
  return waited


@pytest.fixture
def memory():
  """The memory file system, empty before and after."""
  file_system = fsspec.filesystem("memory")
  file_system.store.clear()
  yield file_system
  file_system.store.clear()


def test_urls_are_told_from_local_paths_which_are_staged_as_they_are():
  for url in ("gs://b/x", "s3://b", "memory://a/b", "file:///data/x", "simplecache::gs://b/x"):
    assert remote.is_remote(url)
  for path in ("/data/x", "a/b", "package:name", "roberta-base", pathlib.Path("gs://b/x"), "c:/x"):
    assert not remote.is_remote(path) and remote.staged(path) == pathlib.Path(path)


def test_staged_paths_are_downloaded_once_and_again_when_they_change(memory):
  memory.pipe({"/run/vectors/a.npy": b"one", "/run/vectors/deep/b.npy": b"two"})
  first = remote.staged("memory://run/vectors")
  assert (first / "a.npy").read_bytes() == b"one" and (first / "deep/b.npy").read_bytes() == b"two"
  inode = (first / "a.npy").stat().st_ino
  assert remote.staged("memory://run/vectors/") == first and (first / "a.npy").stat().st_ino == inode
  assert remote.staged("memory://run/vectors/a.npy").read_bytes() == b"one"
  memory.pipe("/run/vectors/a.npy", b"new")  # of the same size
  second = remote.staged("memory://run/vectors")
  assert (second / "a.npy").read_bytes() == b"new"
  assert (first / "a.npy").read_bytes() == b"one"  # for those who still read it
  assert remote.origin(second / "deep/b.npy") == "memory://run/vectors/deep/b.npy"
  assert remote.origin(second / "../other") == "memory://run/other"
  assert remote.origin("/data/x") == "/data/x"


def test_interrupted_download_leaves_nothing_and_a_cut_one_is_repeated(memory, cache, monkeypatch):
  memory.pipe({"/run/a": b"one", "/run/b": b"two"})
  get, calls = type(memory).get_file, []

  def fails(self, path, local, **options):
    calls.append(path)
    if len(calls) == 2:
      raise KeyboardInterrupt
    get(self, path, local, **options)
    if len(calls) == 3:
      pathlib.Path(local).write_bytes(b"o")

  monkeypatch.setattr(type(memory), "get_file", fails)
  with pytest.raises(KeyboardInterrupt):
    remote.staged("memory://run")
  assert not list((cache / "remote").iterdir())
  assert (remote.staged("memory://run") / "a").read_bytes() == b"one"


def _stage(url: str) -> str:
  return (remote.staged(url) / "a").read_text()


def test_several_processes_at_once(tmp_path):
  (tmp_path / "there").mkdir()
  (tmp_path / "there/a").write_text("x" * 1_000_000)
  with multiprocessing.get_context("spawn").Pool(3) as pool:
    assert pool.map(_stage, [f"file://{tmp_path}/there"] * 3) == ["x" * 1_000_000] * 3


@pytest.mark.parametrize(
  ("url", "message"),
  [
    ("memory://none", "memory://none: nothing is there"),
    ("gs://bucket/x", r"gs:// needs a package.*pip install 'dptdr_jax\[gcs\]'"),
    ("s3://bucket/x", r"s3:// needs a package.*pip install 'dptdr_jax\[s3\]'"),
    ("nonsense://bucket/x", "unknown kind of URL"),
    ("memory://bad", r"memory://bad: an unsafe file name: 'bad/\.\./\.\./x'"),
  ],
)
def test_urls_that_cannot_be_staged(memory, cache, url, message):
  memory.pipe("/bad/../../x", b"x")  # object stores have such names
  with pytest.raises(InputError, match=message):
    remote.staged(url)
  assert not cache.exists()


def test_failures_are_retried_with_growing_pauses_until_patience_ends(pauses):
  answers = [OSError("reset"), TimeoutError(), OSError("reset"), "done"]

  def act(always=None):
    answer = always or answers.pop(0)
    if isinstance(answer, Exception):
      raise answer
    return answer

  assert remote.insist(act, "copying") == "done"
  assert pauses == [1, 2, 4]
  pauses.clear()
  with pytest.raises(OutageError, match=r"copying failed \(unreachable\), retried for 243 s. Mend it"):
    remote.insist(lambda: act(OSError("unreachable")), "copying", fix="Mend it")
  assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
  with pytest.raises(InputError, match=r"copying failed \(no such bucket\)"):
    remote.insist(lambda: act(FileNotFoundError("no such bucket")), "copying")
  assert len(pauses) == 9


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
def test_refused_requests_are_input_errors_and_unreachable_remotes_outages(error, kind):
  def act():
    raise error

  with pytest.raises((InputError, OutageError)) as raised:
    remote.insist(act, "copying")
  assert raised.type is kind


def test_sigterm_ends_retries(monkeypatch):
  def act():
    raise OSError("unreachable")

  monkeypatch.undo()
  asked = iter((False, False, True))
  monkeypatch.setattr(preemption, "asked", lambda: next(asked, True))  # in the middle of the first pause
  with pytest.raises(preemption.Preempted, match=r"copying failed \(unreachable\)"):
    remote.insist(act, "copying")


def save(tree: dict[str, str], whole: bool = True) -> None:
  with remote.written("memory://out/retriever", last="about.json", whole=whole) as local:
    for name, text in tree.items():
      (local / name).parent.mkdir(parents=True, exist_ok=True)
      (local / name).write_text(text)


def there(memory) -> dict[str, str]:
  paths = memory.find("/out/retriever")
  return {path.removeprefix("/out/retriever/"): memory.cat_file(path).decode() for path in paths}


def test_files_are_written_as_they_are(memory, tmp_path):
  with remote.written("memory://out/lines.jsonl") as local:
    local.write_text("line")
  assert memory.cat("/out/lines.jsonl") == b"line"
  with remote.written(tmp_path / "here") as local:
    assert local == tmp_path / "here"
  save({"about.json": "{}", "pool/x": "x"}, whole=False)
  assert there(memory) == {"about.json": "{}", "pool/x": "x"}


OLD = {"about.json": "old", "weights": "old", "backbone/model[1]": "old"}
NEW = {"about.json": "new", "weights": "new", "words": "new"}
OTHERS = {"README.md": "mine", "backbone/model1": "mine", "backbone/notes": "mine"}


def test_killed_save_is_the_old_the_new_or_none_and_keeps_files_of_others(memory, monkeypatch):
  kind, left = type(memory), [100]

  def watch(name: str) -> None:
    function = getattr(kind, name)

    def watched(self, *arguments, **options):
      left[0] -= 1
      if left[0] < 0:
        raise KeyboardInterrupt
      return function(self, *arguments, **options)

    monkeypatch.setattr(kind, name, watched)

  for name in ("put_file", "pipe_file", "rm_file"):
    watch(name)
  seen = []
  for operations in range(6):  # the list, rm, three files, rm
    memory.store.clear()
    save(OLD)
    for name, text in OTHERS.items():
      memory.open(f"/out/retriever/{name}", "wb").write(text.encode())
    left[0] = operations
    with pytest.raises(KeyboardInterrupt):
      save(NEW)
    left[0] = 100
    seen.append(there(memory).get("about.json"))
    assert there(memory).items() >= ({"old": OLD, "new": NEW, None: {}}[seen[-1]] | OTHERS).items()
    save(NEW)
    assert {name: text for name, text in there(memory).items() if name != "dptdr.json"} == NEW | OTHERS
  assert seen == ["old", "old", None, None, None, "new"]


@pytest.mark.parametrize("tree", [{"thesis.tex": "x"}, {"about.json": "x", "dptdr.json": '{"kind": "other"}'}])
def test_save_refuses_a_directory_of_others(memory, tree):
  memory.pipe({f"/out/retriever/{name}": text.encode() for name, text in tree.items()})
  with pytest.raises(InputError, match="memory://out/retriever: the directory holds something else"):
    save(NEW)
  assert there(memory) == tree


def test_listed_names_that_lead_outside_are_refused(memory):
  memory.pipe({"/out/retriever/dptdr.json": b'{"kind": "dptdr_jax directory", "files": ["../thesis.tex"]}'})
  memory.pipe("/out/thesis.tex", b"mine")
  with pytest.raises(InputError, match=r"memory://out/retriever/dptdr.json: an unsafe file name"):
    save(NEW)
  assert memory.cat("/out/thesis.tex") == b"mine"
