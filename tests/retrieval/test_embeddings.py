"""Embeddings on disk: whole or absent, resumable, checked when opened."""

import json
import pathlib
import pickle

import numpy as np
import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval.embeddings import Embeddings, EmbeddingWriter

SOURCE = {"retriever": "abc", "lengths": [32, 128]}


@pytest.fixture
def vectors() -> np.ndarray:
  return np.random.default_rng(0).normal(size=(23, 6)).astype(np.float32)


def writer(path, **options) -> EmbeddingWriter:
  return EmbeddingWriter(path, **{"count": 23, "width": 6, "source": SOURCE, "shard_rows": 10, **options})


def write(path, vectors, **options) -> Embeddings:
  some = writer(path, **options)
  for shard in some.missing():
    some.write(shard, vectors[some.rows(shard)])
  return some.finish([f"id {i} é" for i in range(len(vectors))])


def test_round_trip(tmp_path, vectors):
  got = write(tmp_path / "e", vectors)
  assert (len(got), got.width, got.dtype, got.source) == (23, 6, "float32", SOURCE)
  assert got.ids()[7] == "id 7 é"
  blocks = list(got.blocks(4))
  assert [first for first, _ in blocks] == [0, 4, 8, 10, 14, 18, 20]
  assert np.array_equal(np.concatenate([block for _, block in blocks]), vectors)
  rows = np.array([22, 0, 9, 10, 0])
  assert np.array_equal(got.take(rows), vectors[rows])
  with pytest.raises(ValueError, match="rows go from -1"):
    got.take(np.array([-1]))


def test_float16_is_read_as_float32(tmp_path, vectors):
  got = write(tmp_path / "e", vectors, dtype="float16")
  (_, block), *_ = got.blocks(100)
  assert block.dtype == np.float32
  np.testing.assert_allclose(block, vectors[:10], rtol=1e-3)
  assert got.manifest["dtype"] == "float16"
  with pytest.raises(InputError, match="float32 or float16"):
    writer(tmp_path / "e", dtype="float64")


def test_an_interrupted_writer_goes_on_with_the_missing_shards(tmp_path, vectors):
  first = writer(tmp_path / "e")
  first.write(1, vectors[10:20])
  with pytest.raises(InputError, match="no finished embeddings"):
    Embeddings(tmp_path / "e")
  again = writer(tmp_path / "e")
  assert again.missing() == [0, 2]
  with pytest.raises(ValueError, match="missing shards"):
    again.finish(["x"] * 23)
  assert np.array_equal(write(tmp_path / "e", vectors).take(np.arange(23)), vectors)
  assert writer(tmp_path / "e").missing() == []  # a finished one stays
  assert len(writer(tmp_path / "e").finish(["x"] * 23)) == 23


def test_other_arguments_begin_anew(tmp_path, vectors):
  write(tmp_path / "e", vectors)
  assert writer(tmp_path / "e", source={"retriever": "other"}).missing() == [0, 1, 2]
  assert not (tmp_path / "e" / "manifest.json").exists()


@pytest.mark.parametrize(("bad", "dtype"), [(np.nan, "float32"), (np.inf, "float16"), (1e5, "float16")])
def test_vectors_that_cannot_be_held_are_named(tmp_path, vectors, bad, dtype):
  vectors[13, 2] = bad
  some = writer(tmp_path / "e", dtype=dtype)
  with pytest.raises(InputError, match="passage row 13"):
    some.write(1, vectors[10:20])
  assert some.missing() == [0, 1, 2]
  with pytest.raises(ValueError, match="shape"):
    some.write(0, vectors[:9])


def test_a_full_disk_loses_nothing(tmp_path, vectors, monkeypatch):
  some = writer(tmp_path / "e")
  some.write(0, vectors[:10])
  before = (tmp_path / "e" / "vectors-00000.npy").read_bytes()

  def full(stream, array):
    stream.write(b"half of it")
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patched:
    patched.setattr(np, "save", full)
    with pytest.raises(InputError, match="vectors-00001.npy: no space left on the disk"):
      some.write(1, vectors[10:20])
  assert some.missing() == [1, 2]
  assert sorted(path.name for path in (tmp_path / "e").iterdir()) == ["begun.json", "vectors-00000.npy"]
  assert (tmp_path / "e" / "vectors-00000.npy").read_bytes() == before
  assert np.array_equal(write(tmp_path / "e", vectors).take(np.arange(23)), vectors)


def shrink(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-8])


def narrow(path: pathlib.Path) -> None:
  np.save(path, np.zeros((10, 5), np.float32))


def retype(path: pathlib.Path) -> None:
  np.save(path, np.zeros((10, 6), np.float64))


def pickled(path: pathlib.Path) -> None:
  path.write_bytes(pickle.dumps(np.zeros((10, 6), np.float32)))


def empty(path: pathlib.Path) -> None:
  path.write_bytes(b"")


@pytest.mark.parametrize("damage", [shrink, narrow, retype, pickled, empty, pathlib.Path.unlink])
def test_damage_names_the_shard(tmp_path, vectors, damage):
  write(tmp_path / "e", vectors)
  damage(tmp_path / "e" / "vectors-00001.npy")
  with pytest.raises(InputError, match=r"vectors-00001\.npy"):
    Embeddings(tmp_path / "e")


def test_ids_and_manifest_are_checked(tmp_path, vectors):
  got = write(tmp_path / "e", vectors)
  np.save(tmp_path / "e" / "ids.npy", np.array([b"one"]))
  with pytest.raises(InputError, match="1 ids for 23 vectors"):
    got.ids()
  (tmp_path / "e" / "manifest.json").write_text(json.dumps({"format": 99}))
  with pytest.raises(InputError, match="not embeddings of this version"):
    Embeddings(tmp_path / "e")
