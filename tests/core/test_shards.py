"""Shards: resumed at what is missing or damaged, shared out over processes, read by rows and by blocks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dptdr_jax.core import preemption, shards
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.shards import Shards, share_out

ARRAYS = {"rows": ("int32", (3,)), "scores": ("float16", (3,))}
ROWS = np.arange(30, dtype=np.int32).reshape(10, 3)


@dataclasses.dataclass
class Member:
  """One of several processes, run one after another; `said` is what process 0 says."""

  count: int
  index: int
  said: list | None = None

  @property
  def is_main(self):
    return self.index == 0

  def barrier(self, name):
    pass

  def first_says(self, make):
    return make() if self.said is None else self.said


class Maker:
  """Makes rows and half of them as scores, and notes which."""

  def __init__(self, rows=ROWS):
    self.rows, self.calls = rows, []

  def __call__(self, rows):
    self.calls.append((rows.start, rows.stop))
    block = self.rows[rows.start : rows.stop]
    return {"rows": block, "scores": block / 2}


def written(directory, make=None, **options):
  return share_out(directory, 10, 4, ARRAYS, make or Maker(), **options)


def test_rows_and_blocks_are_read_across_shards(tmp_path):
  made = written(tmp_path, about={"kind": "test"})
  for reader in (made, Shards.open(tmp_path)):
    column = reader["rows"]
    assert len(reader) == 10 and column.shape == (10, 3) and reader["scores"].dtype == np.float16
    np.testing.assert_array_equal(column, ROWS)
    np.testing.assert_array_equal(column[2:9, :2], ROWS[2:9, :2])
    np.testing.assert_array_equal(column[9], ROWS[9])
    np.testing.assert_array_equal(column[-1, 1:], ROWS[-1, 1:])
    np.testing.assert_array_equal(column[5:5], ROWS[5:5])
    np.testing.assert_array_equal(column.take([9, 0, 4]), ROWS[[9, 0, 4]])
    assert [(first, len(block)) for first, block in column.blocks(3)] == [(0, 3), (3, 1), (4, 3), (7, 1), (8, 2)]
    with pytest.raises(ValueError, match="go from 0 to 10, there are 10"):
      column.take([0, 10])
    with pytest.raises(IndexError):
      column[10]
  assert shards.read_manifest(tmp_path, kind="test")["shard_rows"] == 4
  assert {path.name.split("-")[0] for path in tmp_path.iterdir()} == {"manifest.json", "rows", "scores"}


def test_no_rows_are_no_shards(tmp_path):
  make = Maker()
  column = share_out(tmp_path, 0, 4, ARRAYS, make)["scores"]
  assert not make.calls and column[:].shape == column.take([]).shape == (0, 3) and not list(column.blocks(2))
  assert len(Shards.open(tmp_path)) == 0


def test_only_missing_and_damaged_shards_are_made_again(tmp_path):
  written(tmp_path, about={"lengths": (32, 128)})
  unused = Maker()
  written(tmp_path, unused, about={"lengths": (32, 128)})
  assert not unused.calls
  (tmp_path / "scores-00000.npy").unlink()
  whole = (tmp_path / "rows-00001.npy").read_bytes()
  np.save(tmp_path / "rows-00002.npy", ROWS[:1])
  flipped = [whole.replace(*pair) for pair in ((b"i4", b"f4"), (b"(4", b"(9"), (b"False", b"True "), (b"{", b"["))]
  for damaged in (whole[:-1], whole[:40], b"", b"garbage" * 30, *flipped):
    (tmp_path / "rows-00001.npy").write_bytes(damaged)
    with pytest.raises(InputError) as error:
      Shards(tmp_path, 10, 4, {"rows": ARRAYS["rows"]})
    assert error.value.path == tmp_path / "rows-00001.npy"
  with pytest.raises(InputError, match=r"scores-00000.npy: no such file"):
    Shards(tmp_path, 10, 4, {"scores": ARRAYS["scores"]})
  again = Maker()
  np.testing.assert_array_equal(written(tmp_path, again, about={"lengths": [32, 128]})["rows"], ROWS)
  assert again.calls == [(0, 4), (4, 8), (8, 10)]


def test_another_cut_begins_anew_and_leaves_other_files(tmp_path):
  (tmp_path / "mine.npy").write_bytes(b"mine")
  (tmp_path / "rows-of-mine.npy").write_bytes(b"mine")
  written(tmp_path)
  (tmp_path / "rows-00000.npy").unlink()
  again = Maker()  # shard 1 would have the right shape and other rows
  column = share_out(tmp_path, 8, 4, ARRAYS, again)["rows"]
  assert again.calls == [(0, 4), (4, 8)] and not (tmp_path / "rows-00002.npy").exists()
  np.testing.assert_array_equal(column, ROWS[:8])
  assert (tmp_path / "mine.npy").exists() and (tmp_path / "rows-of-mine.npy").exists()


def test_processes_take_turns_at_missing_shards(tmp_path):
  first, second = Maker(), Maker()
  with pytest.raises(ValueError, match=r"shards \[1\] are missing"):  # the second has not come to its barrier
    written(tmp_path, first, team=Member(2, 0))
  with pytest.raises(InputError, match="nothing finished is here"):
    Shards.open(tmp_path)
  written(tmp_path, second, team=Member(2, 1, said=[0, 1, 2]))
  assert (first.calls, second.calls) == ([(0, 4), (8, 10)], [(4, 8)])
  np.testing.assert_array_equal(written(tmp_path)["rows"], ROWS)


def test_sigterm_stops_after_a_shard(tmp_path, monkeypatch):
  make = Maker()
  monkeypatch.setattr(preemption, "asked", lambda: len(make.calls) == 2)
  with pytest.raises(preemption.Preempted, match="encode stopped after 2 of 3 shards"):
    written(tmp_path, make)
  monkeypatch.undo()
  written(tmp_path, make)
  assert make.calls == [(0, 4), (4, 8), (8, 10)]


@pytest.mark.parametrize("text", ["[]", "{}", '{"count": 10}', '{"count": 10, "shard_rows": 4, "arrays": [1]}', "{"])
def test_broken_manifest_is_named(tmp_path, text):
  (tmp_path / "manifest.json").write_text(text)
  with pytest.raises(InputError) as error:
    Shards.open(tmp_path)
  assert error.value.path == tmp_path / "manifest.json"


def test_arrays_of_another_shape_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"shard 0 of rows has shape \(10, 3\), not \(4, 3\)"):
    written(tmp_path, lambda rows: {"rows": ROWS, "scores": ROWS})
  with pytest.raises(ValueError, match="has the arrays"):
    written(tmp_path, lambda rows: {"rows": ROWS[:4]})
