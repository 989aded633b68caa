"""Text without queries: plain files, JSON lines, folders of them."""

import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.formats.plain import PlainText, TextFolder
from dptdr_jax.data.records import Passage


def test_plain_text_and_json_lines(write):
  path = write("a.txt.gz", ["first passage", "", " second "])
  assert [(p.id, p.title, p.text) for p in PlainText(path).read()] == [
    ("1", "", "first passage"), ("3", "", "second")
  ]  # fmt: skip
  path = write("a.jsonl", [{"text": "x", "title": "T"}, {"text": "y", "more": 1}])
  assert [(p.title, p.text) for p in PlainText(path).read(1)] == [("", "y")]
  assert PlainText(path).count() == 2


def test_text_folder_reads_all_its_text_files(write, tmp_path):
  (tmp_path / "f").mkdir()
  with pytest.raises(InputError, match=r"no text in this folder"):
    TextFolder(tmp_path / "f").files()
  for name, lines in (("b.txt", ["", "last"]), ("a.jsonl.gz", [{"text": "first", "title": "T"}]), ("c.md", ["no"])):
    write(f"f/{name}", lines)
  folder = TextFolder(tmp_path / "f")
  assert list(folder.passages()) == [Passage("a.jsonl.gz:1", "T", "first"), Passage("b.txt:2", "", "last")]
  assert folder.splits() == () and folder.locate("passages", 1) == (tmp_path / "f/b.txt", 2)


@pytest.mark.parametrize(
  ("name", "lines", "where"),
  [
    ("b.jsonl", [{"text": "x"}, "{"], "b.jsonl:2: broken JSON"),
    ("b.jsonl", [{"text": "x"}, {"title": "y"}], "b.jsonl:2: text must be a string"),
    ("b.jsonl", [{"text": " "}], "b.jsonl:1: empty text"),
    ("b.jsonl", [{"text": "x", "title": 3}], "b.jsonl:1: a title must be a string"),
    ("b.txt", b"fine\n\xff\xfe\n", "b.txt:2: not UTF-8"),
    ("b.txt", [""], "b.txt: empty corpus"),
    ("b.json", ["", '{"text": "x"}'], "b.json:2: a file of plain text begins as JSON"),
    ("b.json", ["[", '  {"text": "x"}', "]"], "b.json:1: a file of plain text begins as JSON"),
    ("b.json", ['[{"text": "x"},', '{"text": "y"}]'], "b.json:1: a file of plain text begins as JSON"),
  ],
)
def test_damaged_text_line_is_named(write, name, lines, where):
  with pytest.raises(InputError, match=where):
    PlainText(write(name, lines)).count()
