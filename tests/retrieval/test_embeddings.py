"""Embeddings on disk: resumed, and checked when opened."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval.embeddings import Embeddings, write_vectors

SOURCE = {"retriever": "abc", "lengths": [32, 128]}
IDS = [f"id {i} é" for i in range(23)]


@pytest.fixture
def vectors() -> np.ndarray:
  return np.random.default_rng(0).normal(size=(23, 6)).astype(np.float32)


def made(path, vectors, ids=IDS, **options) -> Embeddings:
  options = {"width": 6, "source": SOURCE, "shard_rows": 10, **options}
  return write_vectors(path, ids=ids, make=lambda rows: vectors[rows], **options)


def test_written_vectors_are_read(tmp_path, vectors):
  made(tmp_path / "made", vectors)
  names = {"manifest.json", "ids.npy", *(f"vectors-0000{i}.npy" for i in range(3))}
  assert {path.name for path in (tmp_path / "made").iterdir()} == names
  got = Embeddings(tmp_path / "made")
  assert (len(got), got.width, got.dtype, got.source) == (23, 6, "float32", SOURCE)
  assert got.ids() == IDS
  blocks = list(got.blocks(4))
  assert [first for first, _ in blocks] == [0, 4, 8, 10, 14, 18, 20]
  assert np.array_equal(np.concatenate([block for _, block in blocks]), vectors)
  assert np.array_equal(got.take(np.array([22, 0, 9, 10, 0])), vectors[[22, 0, 9, 10, 0]])
  with pytest.raises(ValueError, match="rows go from -1"):
    got.take(np.array([-1]))


def test_float16_is_read_as_float32(tmp_path, vectors):
  got = made(tmp_path / "e", vectors, dtype="float16")
  (_, block), *_ = got.blocks(100)
  assert block.dtype == got.take(np.array([3])).dtype == np.float32
  np.testing.assert_allclose(block, vectors[:10], rtol=1e-3)
  with pytest.raises(InputError, match="float32 or float16"):
    made(tmp_path / "e", vectors, dtype="float64")


def test_no_texts_have_no_vectors(tmp_path, vectors):
  got = made(tmp_path / "e", vectors, ids=[])
  assert got.ids() == [] and got.take(np.array([], int)).shape == (0, 6) and not list(got.blocks(4))


def test_interrupted_writer_goes_on_with_missing_shards(tmp_path, vectors):
  asked = []

  def make(rows):
    asked.append(rows.start)
    return vectors[rows]

  vectors[13, 2], right = np.nan, vectors[13, 2]
  with pytest.raises(InputError, match="passage row 13"):
    write_vectors(tmp_path / "e", ids=IDS, width=6, source=SOURCE, make=make, shard_rows=10)
  with pytest.raises(InputError, match="nothing finished is here"):
    Embeddings(tmp_path / "e")
  vectors[13, 2] = right
  got = write_vectors(tmp_path / "e", ids=IDS, width=6, source=SOURCE, make=make, shard_rows=10)
  assert np.array_equal(got.take(np.arange(23)), vectors) and asked == [0, 10, 10, 20]
  write_vectors(tmp_path / "e", ids=IDS, width=6, source={"retriever": "other"}, make=make, shard_rows=10)
  assert asked[4:] == [0, 10, 20], "vectors of another retriever are made again"


@pytest.mark.parametrize(("bad", "dtype"), [(np.inf, "float32"), (np.inf, "float16"), (1e5, "float16")])
def test_vector_that_dtype_cannot_hold_is_named(tmp_path, vectors, bad, dtype):
  vectors[13, 2] = bad
  with pytest.raises(InputError, match="passage row 13"):
    made(tmp_path / "e", vectors, dtype=dtype)


def test_full_disk_leaves_whole_shards_alone(tmp_path, vectors, monkeypatch):
  save, saved = np.save, []

  def full(stream, array):
    saved.append(array)
    if len(saved) < 2:
      return save(stream, array)
    stream.write(b"half of it")
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patched:
    patched.setattr(np, "save", full)
    with pytest.raises(InputError, match="vectors-00001.npy: no space left on the disk"):
      made(tmp_path / "e", vectors)
  assert sorted(path.name for path in (tmp_path / "e").iterdir()) == ["ids.npy", "plan.json", "vectors-00000.npy"]
  assert np.array_equal(made(tmp_path / "e", vectors).take(np.arange(23)), vectors)


def test_damage_names_the_file(tmp_path, vectors):
  got = made(tmp_path / "e", vectors)
  for name, open_ in (("vectors-00001.npy", lambda: Embeddings(tmp_path / "e")), ("ids.npy", got.ids)):
    path = tmp_path / "e" / name
    whole = path.read_bytes()
    for damaged in (whole[:-8], whole[:20], b"", whole.replace(b"}", b"{", 1), None):
      path.unlink() if damaged is None else path.write_bytes(damaged)
      with pytest.raises(InputError) as error:
        open_()
      assert error.value.path == path
    path.write_bytes(whole)
  manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
  for name, value in (("format", 99), ("kind", "index"), ("width", "6"), ("dtype", "int8"), ("count", 24)):
    (tmp_path / "e" / "manifest.json").write_text(json.dumps(manifest | {name: value}))
    with pytest.raises(InputError):
      Embeddings(tmp_path / "e")


def test_id_that_ends_in_nul_is_refused_before_encoding(tmp_path):
  def never(rows):
    raise AssertionError

  with pytest.raises(InputError, match=r"ends in NUL and would be read without it: 'p3\\x00'. Rename it"):
    write_vectors(tmp_path / "e", ids=["p3", "p3\0"], width=6, source={}, make=never)


def test_folder_that_holds_something_else_stays_as_it_is(tmp_path, vectors):
  (tmp_path / "manifest.json").write_text('{"kind": "theirs"}')
  with pytest.raises(InputError, match="the directory holds something else"):
    made(tmp_path, vectors)
  assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
