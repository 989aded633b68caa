"""Reading JSON: what is broken is named by file and line."""

from __future__ import annotations

import gzip

import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import read_json, remove


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b'{"a": 1,\n oops}', "2: broken JSON"),
    (b'{"a": 1,\n "b": "caf\xe9"}', r"2: not UTF-8: b'\\xe9\"}'"),
    (gzip.compress(b"\xff\xfe{}", mtime=0), r"1: not UTF-8"),
    (b"", "1: broken JSON"),
  ],
  ids=["broken", "latin-1", "packed", "empty"],
)
def test_a_broken_file_is_named(tmp_path, content, message):
  path = tmp_path / "some.json"
  path.write_bytes(content)
  with pytest.raises(InputError, match=rf"some\.json:{message}"):
    read_json(path)
  path.write_bytes('{"a": "café"}'.encode())
  assert read_json(path) == {"a": "café"}


def test_what_a_kill_left_of_a_removal_goes_with_the_next_one(tmp_path):
  for place in ("tree", "tree.removed"):
    (tmp_path / place).mkdir()
    (tmp_path / place / "file").touch()
  remove(tmp_path / "tree")
  assert not list(tmp_path.iterdir())
  (tmp_path / "tree.removed").mkdir()  # killed after the tree had lost its name
  remove(tmp_path / "tree")
  assert not list(tmp_path.iterdir())
