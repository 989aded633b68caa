"""MS MARCO's official files."""

import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.formats import msmarco
from dptdr_jax.data.formats.msmarco import MsMarco
from dptdr_jax.data.records import Judgement, Negatives, Passage, Query


@pytest.fixture
def directory(write, tmp_path):
  write("m/collection.tsv", [f"{row}\tPassage number {row}." for row in range(8)])
  write("m/queries.train.tsv", ["121352\tdefine extreme", "634306\twhat is chattel", "9\tnever judged"])
  write("m/qrels.train.tsv", ["121352\t0\t3\t1", "634306\t0\t5\t1", "634306\t0\t6\t1"])
  write("m/queries.dev.small.tsv", ["2\tandrogen receptor define"])
  write("m/qrels.dev.small.tsv", ["2\t0\t4\t1"])
  return tmp_path / "m"


def test_reads_the_official_files(directory):
  data = MsMarco(directory)
  assert data.splits() == ("train", "dev")
  assert list(data.passages())[3] == Passage("3", "", "Passage number 3.")
  assert list(data.queries("train")) == [Query("121352", "define extreme"), Query("634306", "what is chattel")]
  assert data.skipped["train"] == 1
  assert list(data.judgements("dev")) == [Judgement("2", "4", 1)]
  assert list(data.negatives("train")) == []
  assert [path.name for path in data.files("dev")] == ["queries.dev.small.tsv", "qrels.dev.small.tsv"]


def test_dev_falls_back_to_the_full_set(directory, write):
  for name in ("queries.dev.small.tsv", "qrels.dev.small.tsv"):
    (directory / name).unlink()
  write("m/queries.dev.tsv.gz", ["2\tandrogen receptor define"])
  write("m/qrels.dev.tsv", ["2\t0\t1\t1"])
  data = MsMarco(directory)
  assert list(data.judgements("dev")) == [Judgement("2", "1", 1)]
  assert list(data.queries("dev")) == [Query("2", "androgen receptor define")]


def test_trec_dl_has_grades_and_only_judged_queries(directory, write):
  write("m/msmarco-test2019-queries.tsv.gz", ["1108939\twhat slows down the flow of blood", "1112389\tunjudged"])
  write("m/2019qrels-pass.txt", ["1108939 Q0 1 0", "1108939 Q0 2 3"])
  write("m/msmarco-test2020-queries.tsv.gz", ["1030303\twho is aziz hashim"])
  write("m/2020qrels-pass.txt", ["1030303 0 7 2"])
  data = MsMarco(directory)
  assert data.splits() == ("train", "dev", "dl19", "dl20")
  assert list(data.queries("dl19")) == [Query("1108939", "what slows down the flow of blood")]
  assert list(data.judgements("dl19")) == [Judgement("1108939", "1", 0), Judgement("1108939", "2", 3)]
  assert list(data.judgements("dl20")) == [Judgement("1030303", "7", 2)]


def test_titles_are_joined_in_the_collections_order(directory, write):
  write("m/para.title.txt", ["0\tZero", "2\tTwo ", "7\tSeven"])
  titles = [passage.title for passage in MsMarco(directory, titles=True).passages()]
  assert titles == ["Zero", "", "Two", "", "", "", "", "Seven"]
  assert [path.name for path in MsMarco(directory, titles=True).files()] == ["collection.tsv", "para.title.txt"]
  write("m/para.title.txt", ["0\tZero", "99\tNobody's"])
  with pytest.raises(InputError, match=r"para\.title\.txt:2: no passage follows that has this id: '99'"):
    list(MsMarco(directory, titles=True).passages())


def test_triples_are_grouped_and_limited(directory, write, monkeypatch):
  triples = ["121352\t3\t0", "121352\t3\t1", "121352\t3\t1", "121352\t3\t2", "634306\t5\t7", "121352\t3\t4"]
  write("m/qidpidtriples.train.full.2.tsv.gz", triples)
  first = [Negatives("121352", ("0", "1", "2")), Negatives("634306", ("7",))]
  assert list(MsMarco(directory).negatives("train")) == [*first, Negatives("121352", ("4",))]
  monkeypatch.setattr(msmarco, "_NEGATIVES", 3)
  assert list(MsMarco(directory).negatives("train")) == first
  assert list(MsMarco(directory).negatives("dev")) == []
  assert MsMarco(directory).files("train")[-1].name == "qidpidtriples.train.full.2.tsv.gz"


@pytest.mark.parametrize(
  ("name", "kind", "line", "what"),
  [
    ("collection.tsv", "passages", "no tab here", "2 columns expected, 1 found"),
    ("collection.tsv", "passages", "1\t ", "empty text"),
    ("qrels.train.tsv", "judgements", "1\t0\t2", "4 columns expected, 3 found"),
    ("queries.train.tsv", "queries", "634306\t", "empty text"),
  ],
)
def test_damaged_line_is_named(directory, write, name, kind, line, what):
  first = (directory / name).read_text().splitlines()[0]
  write(f"m/{name}", [first, line])
  with pytest.raises(InputError, match=rf"{name}:2: .*{what}"):
    list(MsMarco(directory).records(kind, "train"))


def test_missing_files_are_named(directory, tmp_path):
  (directory / "queries.train.tsv").unlink()
  with pytest.raises(InputError, match=r"none of queries\.train\.tsv"):
    list(MsMarco(directory).queries("train"))
  (tmp_path / "none").mkdir()
  with pytest.raises(InputError, match="no qrels here"):
    MsMarco(tmp_path / "none").splits()
