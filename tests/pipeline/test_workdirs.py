"""Directories: only ours are written to, and what lies in the way is refused, untouched."""

from __future__ import annotations

import json
import pathlib

import pytest
from support import runs, tiny

from dptdr_jax.core import lock
from dptdr_jax.core.errors import InputError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp("workdirs")


def small(directory: pathlib.Path, workdir: pathlib.Path | str) -> runs.Run:
  """BM25 alone: a run of a moment."""
  return runs.Run(tiny.config(directory, rounds=0, evaluate__baselines=("bm25",)), workdir)


def contents(directory: pathlib.Path) -> dict[str, bytes]:
  return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def theirs(tmp_path):
  """A folder of a user's, whose names are also names of ours."""
  place = tmp_path / "theirs"
  for name in ("report/thesis.tex", "evaluate/metrics.py", "report.html", "store/corpus/notes.txt"):
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    (place / name).write_text("theirs")
  return place


@pytest.mark.parametrize("mark", ["", '{"start": 1}'])  # a run.json of others
def test_folder_of_others_is_refused_untouched(directory, theirs, mark):
  (theirs / "run.json").write_text(mark)
  before = contents(theirs)
  with pytest.raises(InputError, match=f"^{theirs}: the directory is not empty and not a run's.*Name an empty"):
    small(directory, theirs).run()
  with pytest.raises(InputError, match="not empty"):
    small(directory, theirs.parent / "work").run(store=theirs)
  assert contents(theirs) == before


def test_empty_and_remote_workdirs_are_refused(directory, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError, match="--workdir is empty. Name a directory"):
    small(directory, "").run()
  with pytest.raises(InputError, match=r"^gs://a/b: a run works on local files. Name a local --workdir and --remote"):
    small(directory, "gs://a/b").run()
  assert not list(tmp_path.iterdir())


def test_workdir_of_an_earlier_version_begins_anew_beside_its_files(directory, tmp_path, caplog):
  place = tmp_path / "work"
  (place / "train1").mkdir(parents=True)
  (place / "prepare/text").mkdir(parents=True)
  (place / "run.json").write_text(json.dumps({"start": "abc", "versions": {}, "config": {}}))
  (place / "results.json").write_text("old")
  (place / "prepare/text/part.json").write_text("old")
  small(directory, place).run()
  said = [record.getMessage() for record in caplog.records if "earlier version" in record.getMessage()]
  assert said == [f"{place} is of an earlier version, whose files are not read: the run begins anew in {place}/store"]
  assert (place / "prepare/text/part.json").read_text() == "old"
  assert (place / "results.json").read_text() == "old" and f"{place}/results.json is not a link" in caplog.text
  caplog.clear()
  small(directory, place).run()
  assert "earlier version" not in caplog.text


def test_file_of_the_users_in_place_of_a_link_stays(directory, tmp_path, caplog):
  made = small(directory, tmp_path / "work")
  made.run()
  (made.workdir / "results.json").unlink()
  (made.workdir / "results.json").write_text("mine")
  made.run()
  assert (made.workdir / "results.json").read_text() == "mine"
  assert f"{made.workdir}/results.json is not a link of this run and stays" in caplog.text


def test_links_in_place_of_our_files_are_not_written_through(directory, tmp_path):
  (tmp_path / "precious").write_text("theirs")
  made = small(directory, tmp_path / "work")
  made.run()
  (made.workdir / "lock").symlink_to(tmp_path / "precious")
  with pytest.raises(InputError, match=f"^{made.workdir}/lock: the lock cannot be opened"):
    made.run()
  (made.workdir / "lock").unlink()
  for name in ("run.json.partial", "results.json.partial", ".report.html.link"):
    (made.workdir / name).symlink_to(tmp_path / "precious")
  made.change(evaluate__measures=("RR@10",)).run()
  assert (tmp_path / "precious").read_text() == "theirs"


def test_home_directory_in_workdir_and_store(directory, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  small(directory, "~/runs/one").run(store="~/store")
  assert (tmp_path / "runs/one/results.json").exists() and (tmp_path / "store/corpus").is_dir()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "store"]


def test_read_only_workdir_is_one_line(directory, tmp_path, monkeypatch):
  def refuse(self, *arguments, **options):
    raise PermissionError(13, "Permission denied", str(self))

  with monkeypatch.context() as root:  # who may write everywhere
    root.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"work: the directory cannot be written \(Permission denied\)"):
      small(directory, tmp_path / "work").run()


def test_second_run_in_one_directory_is_refused(directory, tmp_path):
  (tmp_path / "work").mkdir()
  with lock.exclusive(tmp_path / "work"), pytest.raises(InputError, match="another run is at work in this directory"):
    small(directory, tmp_path / "work").run()


def test_prune_removes_what_no_run_reaches_and_nothing_of_others(directory, tmp_path, capsys):
  made = small(directory, tmp_path / "work")
  made.run()
  (made.workdir / "store/corpus/notes.txt").write_text("theirs")
  before = runs.stored(made.workdir)
  made.change(evaluate__measures=("RR@10",)).run(prune=True)
  gone = {name.partition("/")[0] for name in before - runs.stored(made.workdir)}
  assert gone == {"measures", "recommended", "report"} and "pruned: 3 artefacts" in capsys.readouterr().out
  assert (made.workdir / "store/corpus/notes.txt").read_text() == "theirs"
