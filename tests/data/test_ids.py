"""The id table against a dictionary."""

import numpy as np
import pytest

from dptdr_jax.data import ids as ids_module
from dptdr_jax.data.ids import DuplicateId, IdTable, IdTableWriter


def _write(values, directory):
  writer = IdTableWriter()
  for value in values:
    writer.append(value)
  return writer.write(directory)


def test_rows_and_ids_both_ways(tmp_path, monkeypatch):
  monkeypatch.setattr(ids_module, "_CHUNK", 64)  # several chunks of few ids
  values = [f"{'doc-é' if row % 3 else ''}{row * 7919 % 1000}" for row in range(1000)]
  _write(values, tmp_path / "ids")
  table = IdTable(tmp_path / "ids")
  assert len(table) == 1000 and table[999] == values[999]
  assert table.ids([5, 0, 999]) == [values[5], values[0], values[999]]
  asked = [values[7], "unknown", values[998], "", values[0]] * 40
  np.testing.assert_array_equal(table.rows(asked), [7, -1, 998, -1, 0] * 40)
  np.testing.assert_array_equal(table.rows(values), np.arange(1000))
  assert table.rows([]).shape == (0,)


def test_ids_that_differ_by_a_trailing_nul_are_two(tmp_path):
  table = _write(["p3", "p3\0"], tmp_path / "ids")
  assert table.ids([0, 1]) == ["p3", "p3\0"] and table.rows(["p3\0", "p3", "p3\0\0"]).tolist() == [1, 0, -1]


def test_duplicate_names_its_second_row(tmp_path):
  with pytest.raises(DuplicateId) as error:
    _write(["a", "b", "c", "b", "a"], tmp_path / "ids")
  assert (error.value.row, error.value.value) == (3, "b")


def test_two_ids_of_one_hash_are_told_apart(tmp_path, monkeypatch):
  real = ids_module._hash

  def weak(ids, seed):
    return real(ids, seed) % np.uint64(50 if seed == 0 else 2**63)

  monkeypatch.setattr(ids_module, "_hash", weak)
  values = [f"id{row}" for row in range(60)]  # more ids than hashes: the first seed must fail
  table = _write(values, tmp_path / "ids")
  assert table._seed > 0
  np.testing.assert_array_equal(table.rows([*values, "id60"]), [*range(60), -1])


def test_an_unknown_id_that_shares_a_hash_is_unknown(tmp_path, monkeypatch):
  table = _write(["aa", "bbb"], tmp_path / "ids")
  monkeypatch.setattr(ids_module, "_hash", lambda ids, seed: np.repeat(table._hashes[:1], len(ids)))
  first = table[int(table._sorted_rows[0])]
  row = int(table._sorted_rows[0])
  np.testing.assert_array_equal(table.rows([first, "x" * len(first), "longer than any"]), [row, -1, -1])


def test_empty_table(tmp_path):
  table = _write([], tmp_path / "ids")
  assert len(table) == 0
  np.testing.assert_array_equal(table.rows(["a"]), [-1])
