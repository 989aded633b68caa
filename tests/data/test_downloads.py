"""Official downloads, with a file:// address in place of the network."""

import hashlib
import http.server
import io
import tarfile
import threading

import pytest

from dptdr_jax.core import preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.data import downloads
from dptdr_jax.data.downloads import Download, fetch, fetch_dataset
from dptdr_jax.data.formats.msmarco import MsMarco
from dptdr_jax.data.records import Judgement


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


def test_sigterm_stops_a_download(served, tmp_path, monkeypatch):
  served("qrels.train.tsv", b"1\t0\t2\t1\n")
  monkeypatch.setattr(preemption, "asked", lambda: True)
  with pytest.raises(preemption.Preempted, match="will be downloaded again"):
    fetch("qrels.train.tsv", tmp_path / "d")
  assert not list((tmp_path / "d").iterdir())


@pytest.mark.parametrize(
  ("changes", "message"), [({"size": 5}, "5 bytes expected, 7 found"), ({"md5": "0" * 32}, "MD5 0{32} expected")]
)
def test_wrong_file_is_not_kept(served, tmp_path, changes, message):
  served("qrels.train.tsv", b"1\t0\t2\t1", **changes)
  with pytest.raises(InputError, match=rf"qrels\.train\.tsv: {message}"):
    fetch("qrels.train.tsv", tmp_path / "d")
  assert not list((tmp_path / "d").iterdir())


def test_failed_download_names_the_file_to_provide(served, tmp_path):
  served("nq-test.qa.csv", b"x").unlink()
  with pytest.raises(InputError, match="the download failed.*Without a network, put nq-test.qa.csv into .*/d"):
    fetch("nq-test.qa.csv", tmp_path / "d")


def test_datasets_are_unpacked_and_fetched_once(served, tmp_path, monkeypatch):
  members = {
    "collection.tsv": b"0\tzero\n1\tone\n",
    "queries.train.tsv": b"5\tq\n",
    "queries.dev.small.tsv": b"6\tq\n",
    "qrels.dev.small.tsv": b"6\t0\t0\t1\n",
    "../escape.tsv": b"never written",
  }
  served("collectionandqueries.tar.gz", _archive(members))
  (tmp_path / "d").mkdir()
  (tmp_path / "d/qrels.train.tsv").write_bytes(b"5\t0\t1\t1\n")  # put there by hand
  monkeypatch.setitem(downloads.DATASETS, "msmarco", ("collectionandqueries.tar.gz", "qrels.train.tsv"))
  assert list(MsMarco(fetch_dataset("msmarco", tmp_path / "d")).judgements("train")) == [Judgement("5", "1", 1)]
  assert not list(tmp_path.rglob("escape.tsv"))
  (tmp_path / "served/collectionandqueries.tar.gz").unlink()  # it is not needed again
  names = sorted(path.name for path in fetch_dataset("msmarco", tmp_path / "d").glob("*.tsv"))
  assert names == sorted([*list(members)[:4], "qrels.train.tsv"])


def test_broken_archive_is_named(served, tmp_path):
  whole = _archive({"para.title.txt": b"".join(b"%d\tTitle %d\n" % (row, row * 7919) for row in range(500))})
  served("marco.tar.gz", whole[:-1000], md5=None, size=None)
  with pytest.raises(InputError, match=r"d/marco\.tar\.gz: a broken archive .*Remove it to download it again"):
    fetch_dataset("msmarco-titles", tmp_path / "d")
  (tmp_path / "d" / "marco.tar.gz").unlink()
  served("marco.tar.gz", _archive({"marco/para.txt": b"x"}))
  with pytest.raises(InputError, match=r"marco\.tar\.gz: para\.title\.txt is not in the archive"):
    fetch_dataset("msmarco-titles", tmp_path / "d")
  (tmp_path / "d" / "marco.tar.gz").unlink()
  served("marco.tar.gz", whole, md5=None, size=None)
  assert (fetch_dataset("msmarco-titles", tmp_path / "d") / "para.title.txt").read_text().startswith("0\tTitle 0\n")


class _Interrupted(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    self.send_response(200)
    self.send_header("Content-Length", "1000")
    self.end_headers()
    self.wfile.write(b"x" * 300)

  def log_message(self, *args):
    pass


def test_interrupted_download_is_not_kept(served, tmp_path):
  with http.server.HTTPServer(("127.0.0.1", 0), _Interrupted) as server:
    served("marco.tar.gz", b"", url=f"http://127.0.0.1:{server.server_port}/marco.tar.gz", md5=None, size=None)
    threading.Thread(target=server.handle_request, daemon=True).start()
    with pytest.raises(InputError, match=r"ended after 300 of 1000 bytes: 'http://.*marco\.tar\.gz'"):
      fetch("marco.tar.gz", tmp_path / "d")
  assert not list((tmp_path / "d").iterdir())
