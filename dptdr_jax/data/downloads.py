"""MS MARCO's and Natural Questions' official files: their addresses, sizes and checksums.

Sizes and MD5 sums as ir-datasets records them (https://ir-datasets.com). A file that is already in the directory is not
downloaded, which also serves closed networks.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import pathlib
import tarfile
import urllib.error
import urllib.request
import zlib
from typing import BinaryIO, NamedTuple

from dptdr_jax.core import files, preemption, progress
from dptdr_jax.core.errors import InputError

_MSMARCO = "https://msmarco.z22.web.core.windows.net/msmarcoranking"
_DPR = "https://dl.fbaipublicfiles.com/dpr"
_BLOCK = 1 << 20


class Download(NamedTuple):
  """One file: address, size in bytes and MD5, None if nobody recorded them; the members of an archive that are read."""

  url: str
  size: int | None = None
  md5: str | None = None
  members: tuple[str, ...] = ()


FILES = {
  "collectionandqueries.tar.gz": Download(
    f"{_MSMARCO}/collectionandqueries.tar.gz", 1_057_717_952, "31644046b18952c1386cd4564ba2ae69",
    ("collection.tsv", "queries.train.tsv", "queries.dev.small.tsv", "qrels.dev.small.tsv"),
  ),
  "qrels.train.tsv": Download(f"{_MSMARCO}/qrels.train.tsv", 10_589_532, "733fb9fe12d93e497f7289409316eccf"),
  "qidpidtriples.train.full.2.tsv.gz": Download(
    f"{_MSMARCO}/qidpidtriples.train.full.2.tsv.gz", 1_841_693_309, "219083e80a0a751c08b968c2f31a4e0b"
  ),
  "marco.tar.gz": Download("https://rocketqa.bj.bcebos.com/corpus/marco.tar.gz", members=("para.title.txt",)),
  "msmarco-test2019-queries.tsv.gz": Download(
    f"{_MSMARCO}/msmarco-test2019-queries.tsv.gz", 4_276, "eda71eccbe4d251af83150abe065368c"
  ),
  "msmarco-test2020-queries.tsv.gz": Download(
    f"{_MSMARCO}/msmarco-test2020-queries.tsv.gz", 4_131, "00a406fb0d14ed3752d70d1e4eb98600"
  ),
  "2019qrels-pass.txt": Download(
    "https://trec.nist.gov/data/deep/2019qrels-pass.txt", 187_092, "2f4be390198da108f6845c822e5ada14"
  ),
  "2020qrels-pass.txt": Download(
    "https://trec.nist.gov/data/deep/2020qrels-pass.txt", 218_617, "0355ccee7509ac0463e8278186cdd8d1"
  ),
  "psgs_w100.tsv.gz": Download(
    f"{_DPR}/wikipedia_split/psgs_w100.tsv.gz", 4_694_541_059, "612fe66e0b6b41ee28f806140226c563"
  ),
  "biencoder-nq-train.json.gz": Download(
    f"{_DPR}/data/retriever/biencoder-nq-train.json.gz", 2_314_892_908, "a1c927b5adae71388eb064329387709f"
  ),
  "biencoder-nq-dev.json.gz": Download(
    f"{_DPR}/data/retriever/biencoder-nq-dev.json.gz", 256_239_282, "2640483dbe0df7ae29c6da419c551a80"
  ),
  "nq-test.qa.csv": Download(f"{_DPR}/data/retriever/nq-test.qa.csv"),
}  # fmt: skip

DATASETS = {
  "msmarco": (
    "collectionandqueries.tar.gz", "qrels.train.tsv", "qidpidtriples.train.full.2.tsv.gz",
    "msmarco-test2019-queries.tsv.gz", "2019qrels-pass.txt", "msmarco-test2020-queries.tsv.gz", "2020qrels-pass.txt",
  ),
  "msmarco-titles": ("marco.tar.gz",),
  "nq": ("psgs_w100.tsv.gz", "biencoder-nq-train.json.gz", "biencoder-nq-dev.json.gz", "nq-test.qa.csv"),
}  # fmt: skip


def fetch_dataset(dataset: str, directory: str | pathlib.Path) -> pathlib.Path:
  """Downloads the missing files of "msmarco", "msmarco-titles" or "nq" into `directory`, unpacks archives, returns it.

  Raises:
    InputError: as `fetch`; an archive that cannot be unpacked.
  """
  directory = pathlib.Path(directory)
  for name in DATASETS[dataset]:
    members = FILES[name].members
    if not (members and all((directory / member).is_file() for member in members)):
      path = fetch(name, directory)
      if members:
        _unpack(path, FILES[name], directory)
  return directory


def fetch(name: str, directory: str | pathlib.Path) -> pathlib.Path:
  """Returns the path of the file `name` in `directory`, downloaded if it is missing.

  Raises:
    InputError: size or MD5 differ, the download was interrupted, or failed (it says which file to put where).
  """
  target = pathlib.Path(directory, name)
  if not target.is_file():
    with files.atomic_path(target) as partial:
      _download(FILES[name], partial, target)
      _check(partial, target, FILES[name])
  return target


def _download(entry: Download, partial: pathlib.Path, target: pathlib.Path) -> None:
  try:
    with urllib.request.urlopen(entry.url, timeout=60) as answer:
      announced = int(answer.headers.get("Content-Length", 0))
      _copy(answer, partial, f"download {target.name}", entry.size or announced or None)
    size = partial.stat().st_size
    if announced and size != announced:  # urllib takes a connection that closes early for the end
      raise InputError(f"the download ended after {size} of {announced} bytes", value=entry.url, fix="Try again")
  except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
    fix = f"Without a network, put {target.name} into {target.parent}"
    raise InputError(f"the download failed ({error})", value=entry.url, fix=fix) from error


def _check(path: pathlib.Path, shown: pathlib.Path, entry: Download) -> None:
  fix = f"Download it again from {entry.url}"
  size = path.stat().st_size
  if entry.size is not None and size != entry.size:
    raise InputError(f"{entry.size} bytes expected, {size} found", path=shown, fix=fix)
  if entry.md5 is not None:
    with open(path, "rb") as stream:
      md5 = hashlib.file_digest(stream, "md5").hexdigest()
    if md5 != entry.md5:
      raise InputError(f"MD5 {entry.md5} expected, {md5} found", path=shown, fix=fix)


def _unpack(archive: pathlib.Path, entry: Download, directory: pathlib.Path) -> None:
  """Extracts the members that are read, from any directory in the archive; nothing else is written."""
  missing = set(entry.members)
  try:
    with tarfile.open(archive) as packed:
      for info in packed:
        name = pathlib.PurePosixPath(info.name).name
        content = packed.extractfile(info) if name in missing and info.isfile() else None
        if content is None:
          continue
        with files.atomic_path(directory / name) as partial:
          _copy(content, partial, f"unpack {name}", info.size)
        missing.remove(name)
  except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
    fix = f"Remove it to download it again from {entry.url}"
    raise InputError(f"a broken archive ({error})", path=archive, fix=fix) from error
  if missing:
    raise InputError(f"{', '.join(sorted(missing))} is not in the archive", path=archive)


def _copy(stream: BinaryIO, path: pathlib.Path, description: str, size: int | None) -> None:
  with open(path, "wb") as target, progress.bar(description, size, "B") as bar:
    while block := stream.read(_BLOCK):
      target.write(block)
      bar.advance(len(block))
      preemption.check(f"{path.name} will be downloaded again")
