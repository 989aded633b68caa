"""Official downloads, with a file:// address in place of the network."""

import hashlib
import http.server
import io
import tarfile
import threading

import pytest

from dptdr_jax.core import preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.data import builders, downloads
from dptdr_jax.data.downloads import Download, fetch, fetch_dataset
from dptdr_jax.stages.prepare import open_source


@pytest.fixture
def served(tmp_path, monkeypatch):
  """serve(name, bytes, **changes) puts a file where the table then says it is."""
  (tmp_path / "served").mkdir()
  monkeypatch.setattr(downloads, "FILES", dict(downloads.FILES))

  def serve(name, content, **changes):
    path = tmp_path / "served" / name
    path.write_bytes(content)
    entry = Download(path.as_uri(), len(content), hashlib.md5(content).hexdigest())
    members = downloads.FILES[name].members
    downloads.FILES[name] = entry._replace(members=members)._replace(**changes)
    return path

  return serve


def _archive(members):
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode="w:gz") as packed:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      packed.addfile(info, io.BytesIO(content))
  return stream.getvalue()


def test_fetches_once_and_checks(served, tmp_path):
  path = served("qrels.train.tsv", b"1\t0\t2\t1\n")
  found = fetch("qrels.train.tsv", tmp_path / "d")
  assert found == tmp_path / "d" / "qrels.train.tsv" and found.read_bytes() == b"1\t0\t2\t1\n"
  path.unlink()
  assert fetch("qrels.train.tsv", tmp_path / "d") == found


def test_sigterm_ends_a_download(served, tmp_path, monkeypatch):
  served("qrels.train.tsv", b"1\t0\t2\t1\n")
  monkeypatch.setattr(preemption, "asked", lambda: True)
  with pytest.raises(preemption.Preempted, match="will be fetched again"):
    fetch("qrels.train.tsv", tmp_path / "d")
  assert not list((tmp_path / "d").iterdir())


@pytest.mark.parametrize(
  ("changes", "message"), [({"size": 5}, "5 bytes expected, 7 found"), ({"md5": "0" * 32}, "MD5 0{32} expected")]
)
def test_a_wrong_file_is_not_kept(served, tmp_path, changes, message):
  served("qrels.train.tsv", b"1\t0\t2\t1", **changes)
  with pytest.raises(InputError, match=rf"qrels\.train\.tsv: {message}"):
    fetch("qrels.train.tsv", tmp_path / "d")
  assert not list((tmp_path / "d").iterdir())
  (tmp_path / "manual").mkdir()
  (tmp_path / "manual" / "qrels.train.tsv").write_bytes(b"1\t0\t2\t1")
  with pytest.raises(InputError, match=rf"manual/qrels\.train\.tsv: {message}"):
    fetch("qrels.train.tsv", tmp_path / "d", tmp_path / "manual")


def test_a_closed_network_says_what_to_put_where(served, tmp_path):
  served("nq-test.qa.csv", b"x").unlink()
  with pytest.raises(InputError, match="the download failed.*get nq-test.qa.csv elsewhere and put it into .*/manual"):
    fetch("nq-test.qa.csv", tmp_path / "d", tmp_path / "manual")


def test_datasets_are_unpacked_and_builders_read_them(served, tmp_path, monkeypatch):
  (tmp_path / "manual").mkdir()
  members = {
    "collection.tsv": b"0\tzero\n1\tone\n",
    "queries.train.tsv": b"5\tq\n",
    "queries.dev.small.tsv": b"6\tq\n",
    "qrels.dev.small.tsv": b"6\t0\t0\t1\n",
    "../escape.tsv": b"never written",
  }
  served("collectionandqueries.tar.gz", _archive(members))
  qrels = served("qrels.train.tsv", b"5\t0\t1\t1\n")
  qrels.rename(tmp_path / "manual" / "qrels.train.tsv")
  monkeypatch.setitem(downloads.DATASETS, "msmarco", ("collectionandqueries.tar.gz", "qrels.train.tsv"))
  options = {"data_dir": str(tmp_path / "tfds"), "manual_dir": tmp_path / "manual"}
  builder = builders.MsMarcoText("train", **options)
  builder.download_and_prepare(download_dir=str(tmp_path / "d"))
  assert builder.as_data_source("queries")[0]["passage_ids"] == [b"1"]
  assert not list(tmp_path.rglob("escape.tsv"))
  for path in (tmp_path / "served").iterdir():  # what was fetched is enough from now on
    path.unlink()
  assert sorted(path.name for path in fetch_dataset("msmarco", tmp_path / "d" / "msmarco").glob("*.tsv")) == sorted(
    [*list(members)[:4], "qrels.train.tsv"]
  )


def test_unpacked_members_in_the_manual_directory_will_do(tmp_path):
  (tmp_path / "manual").mkdir()
  (tmp_path / "manual" / "para.title.txt").write_text("0\tZero\n")
  found = fetch_dataset("msmarco-titles", tmp_path / "d", tmp_path / "manual")
  assert (found / "para.title.txt").read_text() == "0\tZero\n"


def test_a_manual_directory_that_is_the_target_by_another_name_keeps_its_files(served, tmp_path, monkeypatch):
  monkeypatch.setitem(downloads.DATASETS, "msmarco", ("marco.tar.gz", "qrels.train.tsv"))
  served("qrels.train.tsv", b"1\t0\t2\t1\n")
  (tmp_path / "d").mkdir()
  (tmp_path / "other").symlink_to(tmp_path / "d")
  contents = {"para.title.txt": b"0\tZero\n", "qrels.train.tsv": b"1\t0\t2\t1\n"}
  for name, content in contents.items():
    (tmp_path / "d" / name).write_bytes(content)
  for directory, manual in (("d", "other"), ("other", "d"), ("d", "d")):
    found = fetch_dataset("msmarco", tmp_path / directory, tmp_path / manual)
    assert {path.name: path.read_bytes() for path in found.iterdir()} == contents


def test_a_broken_archive_is_told_of_and_stays(served, tmp_path):
  whole = _archive({"para.title.txt": b"".join(b"%d\tTitle %d\n" % (row, row * 7919) for row in range(500))})
  served("marco.tar.gz", whole[:-1000], md5=None, size=None)
  with pytest.raises(InputError, match=r"d/marco\.tar\.gz: a broken archive .*Remove it, and it is fetched again"):
    fetch_dataset("msmarco-titles", tmp_path / "d")
  (tmp_path / "manual").mkdir()
  for broken in (whole[:-1000], b"<html>not found</html>"):  # a user's own file stays
    (tmp_path / "manual" / "marco.tar.gz").write_bytes(broken)
    with pytest.raises(InputError, match=r"manual/marco\.tar\.gz: "):
      fetch_dataset("msmarco-titles", tmp_path / "d", tmp_path / "manual")
    assert (tmp_path / "manual" / "marco.tar.gz").is_file()
  served("marco.tar.gz", whole, md5=None, size=None)
  (tmp_path / "d" / "marco.tar.gz").unlink()
  assert (fetch_dataset("msmarco-titles", tmp_path / "d") / "para.title.txt").read_text().startswith("0\tTitle 0\n")


class _BreaksOff(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    self.send_response(200)
    self.send_header("Content-Length", "1000")
    self.end_headers()
    self.wfile.write(b"x" * 300)

  def log_message(self, *args):
    pass


def test_a_download_that_breaks_off_is_not_kept(served, tmp_path):
  with http.server.HTTPServer(("127.0.0.1", 0), _BreaksOff) as server:
    served("marco.tar.gz", b"", url=f"http://127.0.0.1:{server.server_port}/marco.tar.gz", md5=None, size=None)
    threading.Thread(target=server.handle_request, daemon=True).start()
    with pytest.raises(InputError, match=r"broke off after 300 of 1000 bytes: 'http://.*marco\.tar\.gz'"):
      fetch("marco.tar.gz", tmp_path / "d")
  assert not list((tmp_path / "d").iterdir())


@pytest.mark.parametrize("source", ["beir", "original", "docstrings"])
def test_there_are_downloads_of_official_files_only(config, tmp_path, source):
  config.data.update({"source": source, "dir": str(tmp_path), "download": True})
  with pytest.raises(InputError, match=f"data.download has no files of this source: '{source}'"):
    open_source(config)


def test_an_archive_without_a_wanted_member(served, tmp_path):
  served("marco.tar.gz", _archive({"marco/para.txt": b"x"}))
  with pytest.raises(InputError, match=r"marco\.tar\.gz: para\.title\.txt is not in the archive"):
    fetch_dataset("msmarco-titles", tmp_path / "d")


def test_natural_questions_builder(served, tmp_path, monkeypatch):
  served("nq-test.qa.csv", b"who?\t['me', 'you']\n")
  monkeypatch.setitem(downloads.DATASETS, "nq", ("nq-test.qa.csv",))
  builder = builders.NaturalQuestionsText("test", data_dir=str(tmp_path / "tfds"))
  builder.download_and_prepare(download_dir=str(tmp_path / "d"))
  assert builder.as_data_source("queries")[0]["answers"] == [b"me", b"you"]


def test_every_dataset_is_in_the_table():
  assert all(name in downloads.FILES for names in downloads.DATASETS.values() for name in names)
  sized = [entry for entry in downloads.FILES.values() if entry.md5 is not None]
  assert len(sized) == 10 and all(len(entry.md5) == 32 and entry.size > 0 for entry in sized)
