"""BEIR folders: what is read, and what each kind of damage is called."""

import codecs
import json

import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.records import Judgement, Passage, Query
from dptdr_jax.data.sources import Source
from dptdr_jax.data.sources.beir import Beir
from dptdr_jax.stages.prepare import open_source


def test_reads_passages_queries_and_judgements(beir):
  source = Beir(beir)
  assert isinstance(source, Source)
  assert source.splits() == ("train", "dev")
  passages = list(source.passages())
  assert len(passages) == 6 and passages[1] == Passage("d1", "Title 1", "text number 1 about things")
  assert list(source.queries("train")) == [Query("q0", "question 0?"), Query("q2", "question 2?")]
  assert list(source.queries("dev")) == [Query("q1", "question 1?", ("one", "eins"))]
  assert list(source.judgements("train"))[1] == Judgement("q0", "d2", 2)
  assert list(source.negatives("train")) == []
  assert [path.name for path in source.files()] == ["corpus.jsonl"]
  assert [path.name for path in source.files("dev")] == ["queries.jsonl", "dev.tsv"]


def test_gzip_and_missing_header_and_numeric_ids(write, tmp_path):
  write("b/corpus.jsonl.gz", [{"_id": 7, "text": "seven"}, "", {"_id": "8", "title": None, "text": "eight"}])
  write("b/queries.jsonl.gz", [{"_id": "q", "text": "which?"}])
  write("b/qrels/test.tsv.gz", ["q\t7\t1"])
  source = Beir(tmp_path / "b")
  assert list(source.passages()) == [Passage("7", "", "seven"), Passage("8", "", "eight")]
  assert source.splits() == ("test",)
  assert list(source.judgements("test")) == [Judgement("q", "7", 1)]
  assert source.locate("passages", 1)[1] == 3


def test_what_becomes_of_a_passage_without_text(beir, write):
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
  with pytest.raises(InputError, match="unknown data.empty_text: 'drop'. Use error, title, keep"):
    Beir(beir, empty_text="drop")


def test_the_config_says_what_becomes_of_it(beir, write, config):
  write("beir/corpus.jsonl", [{"_id": "d0", "text": ""}])
  config.data.dir = str(beir)
  with pytest.raises(InputError, match="empty text and no title"):
    list(open_source(config).passages())
  config.data.empty_text = "keep"
  assert list(open_source(config).passages()) == [Passage("d0", "", "")]


def test_a_split_is_a_tsv_file(beir, write):
  for name in ("train.tsv~", "dev.tsv.bak", "test.tsvx", "notes.txt"):
    write(f"beir/qrels/{name}", ["q0\td1\t1"])
  assert Beir(beir).splits() == ("train", "dev")


GOOD = json.dumps({"_id": "a", "text": "x"})


@pytest.mark.parametrize(
  ("line", "what"),
  [
    ('{"_id": "d", "text": "cut', "broken JSON"),
    ('["d", "text"]', "a line must be a JSON object"),
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
def test_damaged_corpus_line(beir, write, line, what):
  write("beir/corpus.jsonl", [GOOD, line])
  with pytest.raises(InputError, match=rf"corpus\.jsonl:2: .*{what}") as error:
    list(Beir(beir).passages())
  assert error.value.line == 2


def test_bytes_that_are_not_utf8(beir, write):
  write("beir/corpus.jsonl", GOOD.encode() + b'\n{"_id": "d", "text": "caf\xe9"}\n')
  with pytest.raises(InputError, match=r"corpus\.jsonl:2: not UTF-8"):
    list(Beir(beir).passages())


def test_a_byte_order_mark_is_no_text(beir, write):
  plain = list(Beir(beir).passages()), list(Beir(beir).judgements("train"))
  for name in ("corpus.jsonl", "qrels/train.tsv"):
    write(f"beir/{name}", codecs.BOM_UTF8 + (beir / name).read_bytes())
  assert (list(Beir(beir).passages()), list(Beir(beir).judgements("train"))) == plain


def test_truncated_gzip(beir, write):
  (beir / "corpus.jsonl").unlink()
  path = write("beir/corpus.jsonl.gz", [{"_id": f"d{row}", "text": f"text {row * 7919}"} for row in range(500)])
  path.write_bytes(path.read_bytes()[:-200])
  with pytest.raises(InputError, match=r"corpus\.jsonl\.gz:\d+: broken gzip"):
    list(Beir(beir).passages())


@pytest.mark.parametrize(
  ("line", "what"),
  [("q0\td1", "3 columns expected, 2 found"), ("q0\td1\tgood", "a grade must be a whole number")],
)
def test_damaged_qrels_line(beir, write, line, what):
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
