"""BEIR folders: what is read, and the error for each kind of damage."""

import codecs
import json
import re

import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.formats.beir import Beir
from dptdr_jax.data.records import Judgement, Passage, Query


def test_reads_passages_queries_and_judgements(beir):
  data = Beir(beir)
  assert data.splits() == ("train", "dev")
  passages = list(data.passages())
  assert len(passages) == 6 and passages[1] == Passage("d1", "Title 1", "text number 1 about things")
  assert list(data.queries("train")) == [Query("q0", "question 0?"), Query("q2", "question 2?")]
  assert list(data.queries("dev")) == [Query("q1", "question 1?", ("one", "eins"))]
  assert list(data.judgements("train"))[1] == Judgement("q0", "d2", 2)
  assert list(data.negatives("train")) == []
  assert [path.name for path in data.files()] == ["corpus.jsonl"]
  assert [path.name for path in data.files("dev")] == ["queries.jsonl", "dev.tsv"]


def test_gzip_and_missing_header_and_numeric_ids(write, tmp_path):
  write("b/corpus.jsonl.gz", [{"_id": 7, "text": "seven"}, "", {"_id": "8", "title": None, "text": "eight"}])
  write("b/queries.jsonl.gz", [{"_id": "q", "text": "which?"}])
  write("b/qrels/test.tsv.gz", ["q\t7\t1"])
  data = Beir(tmp_path / "b")
  assert list(data.passages()) == [Passage("7", "", "seven"), Passage("8", "", "eight")]
  assert data.splits() == ("test",)
  assert list(data.judgements("test")) == [Judgement("q", "7", 1)]
  assert data.locate("passages", 1)[1] == 3


def test_passage_without_text_is_an_error_or_its_title_or_kept(beir, write):
  titled, bare = {"_id": "d0", "title": "Only a title", "text": ""}, {"_id": "d1", "title": None, "text": " "}
  write("beir/corpus.jsonl", [titled])
  assert list(Beir(beir).passages()) == [Passage("d0", "", "Only a title")]
  with pytest.raises(InputError, match=r"corpus\.jsonl:1: empty text\. .*data\.empty_text=title"):
    list(Beir(beir, empty_text="error").passages())
  write("beir/corpus.jsonl", [titled, bare])
  for empty_text in ("error", "title"):
    with pytest.raises(InputError, match=r"corpus\.jsonl:[12]: empty text"):
      list(Beir(beir, empty_text=empty_text).passages())
  with pytest.raises(InputError, match=r"corpus\.jsonl:2: empty text and no title\. .*data\.empty_text=keep"):
    list(Beir(beir).passages())
  kept = [Passage("d0", "", "Only a title"), Passage("d1", "", "")]
  assert list(Beir(beir, empty_text="keep").passages()) == kept
  write("beir/corpus.jsonl", [titled | {"text": None}])
  assert list(Beir(beir).passages()) == [Passage("d0", "", "Only a title")]


def test_splits_are_tsv_files_with_a_name_of_their_own(beir, write):
  for name in ("train.tsv~", "dev.tsv.bak", "test.tsvx", "notes.txt"):
    write(f"beir/qrels/{name}", ["q0\td1\t1"])
  assert Beir(beir).splits() == ("train", "dev")
  for name, split in ((".tsv", ""), ("...tsv.gz", ".."), ("a\\b.tsv", "a\\b")):
    path = write(f"beir/qrels/{name}", ["q0\td1\t1"])
    with pytest.raises(InputError, match=rf"qrels: a split cannot have this name: {re.escape(repr(split))}"):
      Beir(beir).splits()
    path.unlink()


GOOD = json.dumps({"_id": "a", "text": "x"})


@pytest.mark.parametrize(
  ("line", "what"),
  [
    ('{"_id": "d", "text": "cut', "broken JSON"),
    ('["d", "text"]', "a line must be a JSON object"),
    (f'{{"_id": {"9" * 5000}}}', "broken JSON .Exceeds the limit"),
    ("[" * 100_000, "broken JSON .maximum recursion"),
    ('{"text": "no id"}', "no _id"),
    ('{"_id": "", "text": "t"}', "empty _id"),
    ('{"_id": "a b", "text": "t"}', "_id has white space"),
    ('{"_id": "d", "text": "  "}', "empty text"),
    ('{"_id": "d", "contents": "x"}', "no text: {'_id'"),
    ('{"_id": "d", "text": 5}', "text must be a string"),
    ('{"_id": "d", "title": 5, "text": "t"}', "a title must be a string"),
    ('{"_id": "d", "text": "half \\ud800"}', "half a surrogate pair"),
  ],
)
def test_damaged_corpus_line_is_named(beir, write, line, what):
  write("beir/corpus.jsonl", [GOOD, line])
  with pytest.raises(InputError, match=rf"corpus\.jsonl:2: .*{what}") as error:
    list(Beir(beir).passages())
  assert error.value.line == 2


def test_bytes_that_are_not_utf8(beir, write):
  write("beir/corpus.jsonl", GOOD.encode() + b'\n{"_id": "d", "text": "caf\xe9"}\n')
  with pytest.raises(InputError, match=r"corpus\.jsonl:2: not UTF-8"):
    list(Beir(beir).passages())


def test_byte_order_mark_is_skipped(beir, write):
  def read():
    data = Beir(beir)
    return list(data.passages()), list(data.queries("train")), list(data.judgements("train"))

  plain = read()
  for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"):
    write(f"beir/{name}", codecs.BOM_UTF8 + (beir / name).read_bytes())
  assert read() == plain


def test_truncated_gzip(beir, write):
  (beir / "corpus.jsonl").unlink()
  path = write("beir/corpus.jsonl.gz", [{"_id": f"d{row}", "text": f"text {row * 7919}"} for row in range(500)])
  path.write_bytes(path.read_bytes()[:-200])
  with pytest.raises(InputError, match=r"corpus\.jsonl\.gz:\d+: broken gzip"):
    list(Beir(beir).passages())


@pytest.mark.parametrize(
  ("line", "what"),
  [
    ("q0\td1", "3 columns expected, 2 found"),
    ("q0\td1\tgood", "a grade must be a whole number"),
    ("q0\td1\t3000000000", "a grade must have 32 bits"),
  ],
)
def test_damaged_qrels_line_is_named(beir, write, line, what):
  write("beir/qrels/train.tsv", ["query-id\tcorpus-id\tscore", "q0\td1\t1", line])
  with pytest.raises(InputError, match=rf"train\.tsv:3: {what}"):
    list(Beir(beir).judgements("train"))


def test_damaged_queries_and_missing_files(beir, write, tmp_path):
  write("beir/queries.jsonl", [{"_id": "q0", "text": "fine"}, {"_id": "q1", "text": ""}])
  with pytest.raises(InputError, match=r"queries\.jsonl:2: empty text"):
    list(Beir(beir).queries("train"))
  write("beir/queries.jsonl", [{"_id": "q0", "text": "fine", "metadata": {"answers": "one"}}])
  with pytest.raises(InputError, match=r"queries\.jsonl:1: metadata.answers must be a list of strings"):
    list(Beir(beir).queries("train"))
  (beir / "corpus.jsonl").unlink()
  with pytest.raises(InputError, match="none of corpus.jsonl"):
    Beir(beir).files()
  with pytest.raises(InputError, match="no such directory"):
    Beir(tmp_path / "absent")
  (tmp_path / "empty").mkdir()
  with pytest.raises(InputError, match="no qrels/SPLIT.tsv"):
    Beir(tmp_path / "empty").splits()
