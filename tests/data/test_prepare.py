"""Prepared data: the round trip, every complaint with its place, and what a killed run leaves."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dptdr_jax.core import files, preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.data import builders, prepare
from dptdr_jax.data.prepare import PreparedData, prepare_source
from dptdr_jax.data.records import Passage
from dptdr_jax.data.sources.beir import Beir
from dptdr_jax.data.sources.msmarco import MsMarco
from dptdr_jax.data.spans import SpanBatches, SpanLengths
from dptdr_jax.data.store import write_token_store
from dptdr_jax.data.tokenizer import Tokenizer
from dptdr_jax.retrieval.bm25 import Bm25
from dptdr_jax.stages import common


def test_round_trip(beir, tmp_path):
  prepare_source(Beir(beir), tmp_path / "p")
  data, source = PreparedData(tmp_path / "p"), Beir(beir)
  assert list(data.passages.read()) == list(source.passages())
  assert data.passages[4] == list(source.passages())[4]
  assert list(data.passages.read(4)) == list(source.passages())[4:]
  assert data.passages.take(np.array([4, 0, 4])) == [data.passages[row] for row in (4, 0, 4)]
  assert data.passages.take(np.array([], int)) == []
  for wrong in ([6], [0, -1]):
    with pytest.raises(IndexError):
      data.passages.take(np.array(wrong))
  with pytest.raises(IndexError):
    data.passages[6]
  train, dev = data.splits["train"], data.splits["dev"]
  assert list(train.queries.read()) == list(source.queries("train"))
  assert dev.queries[0] == next(source.queries("dev"))
  assert data.ids.ids(train.positives(0)) == ["d1", "d2"]
  np.testing.assert_array_equal(train.judgements.rows(0), [1, 2, 5])
  np.testing.assert_array_equal(train.judgements.values(0), [1, 2, 0])
  np.testing.assert_array_equal(train.positives(1), [0])
  assert len(train) == 2 and train.negatives.rows(0).size == 0
  with pytest.raises(ValueError, match="no values"):
    train.negatives.values(0)
  counts = {"queries": 2, "trainable": 2, "skipped": 0}
  assert files.read_json(tmp_path / "p" / "prepared.json")["splits"]["train"] == counts


def test_says_nothing_on_standard_output_and_no_warning(beir, tmp_path, capfd, caplog):
  prepare_source(Beir(beir), tmp_path / "p")
  assert capfd.readouterr().out == "" and not caplog.records


def test_a_full_disk_is_named_and_leaves_nothing(beir, tmp_path, monkeypatch):
  class Full:
    def __init__(self, path, options):
      pass

    def write(self, record):
      raise RuntimeError("write() failed: No space left on device")

  monkeypatch.setattr(builders.array_record_module, "ArrayRecordWriter", Full)
  with pytest.raises(InputError, match="corpus: no space left on the disk"):
    prepare_source(Beir(beir), tmp_path / "p")
  assert not list((tmp_path / "p").iterdir())


def test_tfds_reads_what_was_written(beir, tmp_path):
  prepare_source(Beir(beir), tmp_path / "p")
  corpus = tfds.builder_from_directory(str(tmp_path / "p/corpus/prepared_text/corpus/1.0.0")).as_data_source("corpus")
  assert len(corpus) == 6
  assert corpus[1] == {"id": b"d1", "title": b"Title 1", "text": b"text number 1 about things"}
  folder = tmp_path / "p/splits/train/prepared_text/train/1.0.0"
  queries = tfds.builder_from_directory(str(folder)).as_data_source("queries")
  assert queries[0]["id"] == b"q0" and list(queries[0]["answers"]) == []
  assert list(queries[0]["passage_ids"]) == [b"d1", b"d2", b"d5"] and list(queries[0]["grades"]) == [1, 2, 0]


def test_many_shards_keep_the_order(write, tmp_path, monkeypatch, beir):
  monkeypatch.setattr(builders, "_SHARD_ROWS", 4)
  monkeypatch.setattr(builders, "_READ", 3)
  data = prepare_source(Beir(beir), tmp_path / "p")
  assert len(list((tmp_path / "p/corpus").rglob("*array_record*"))) == 2
  assert [passage.id for passage in data.passages.read(1)] == [f"d{row}" for row in range(1, 6)]
  assert data.passages[5].id == "d5"


def test_negatives_by_row(write, tmp_path):
  write("m/collection.tsv", [f"{row + 100}\tPassage {row}." for row in range(5)])
  write("m/queries.train.tsv", ["7\tfirst", "8\tsecond"])
  write("m/qrels.train.tsv", ["8\t0\t104\t1", "7\t0\t100\t1", "8\t0\t104\t1"])
  write("m/qidpidtriples.train.full.2.tsv", ["8\t104\t101", "8\t104\t103", "7\t100\t102", "8\t104\t102"])
  train = prepare_source(MsMarco(tmp_path / "m"), tmp_path / "p").splits["train"]
  np.testing.assert_array_equal(train.negatives.rows(0), [2])
  np.testing.assert_array_equal(train.negatives.rows(1), [1, 3, 2])
  np.testing.assert_array_equal(train.judgements.rows(1), [4])  # said twice with one grade: once
  write("m/qidpidtriples.train.full.2.tsv", ["8\t104\t101", "7\t100\t999"])
  with pytest.raises(InputError, match=r"full\.2\.tsv:2: unknown passage id in negatives: '999'"):
    prepare_source(MsMarco(tmp_path / "m"), tmp_path / "p")
  write("m/qidpidtriples.train.full.2.tsv", ["8\t104\t101", "55\t100\t101"])
  with pytest.raises(InputError, match=r"full\.2\.tsv:2: unknown query id in negatives: '55'"):
    prepare_source(MsMarco(tmp_path / "m"), tmp_path / "p")


def test_queries_of_one_text_share_what_is_relevant_to_them(beir, write, tmp_path):
  texts = ["Which  port?", "other", "which port?", "else", "which port?", "other"]
  write("beir/queries.jsonl", [{"_id": f"q{row}", "text": text} for row, text in enumerate(texts)])
  judged = ["q0\td3\t2", "q0\td1\t1", "q1\td0\t1", "q2\td1\t0", "q2\td5\t1", "q2\td2\t0", "q4\td4\t0"]
  write("beir/qrels/train.tsv", [HEADER, *judged])
  write("beir/qrels/dev.tsv", [HEADER, "q1\td3\t1", "q5\td4\t1"])
  data = prepare_source(Beir(beir), tmp_path / "p")
  train, dev = data.splits["train"], data.splits["dev"]
  assert [data.ids.ids(train.relevant(row)) for row in range(4)] == [
    ["d3", "d1", "d5"],  # its own, in the source's order, then its twins'
    ["d0"],
    ["d5", "d3"],  # not d1, which is judged for this one itself
    ["d1", "d3", "d5"],  # none of its own
  ]
  assert [train.positives(row).tolist() for row in range(4)] == [[3, 1], [0], [5], []], "as they were judged"
  assert [dev.positives(row).tolist() for row in range(2)] == [[3], [4]] and dev.relevant(0).tolist() == [3, 4]
  rows, grades = common.barred(train).of(2)
  assert dict(zip(rows.tolist(), grades.tolist(), strict=True)) == {1: 0, 2: 0, 3: 1, 5: 1}
  assert common.qrels(train).of(2)[0].tolist() == [1, 2, 5]
  files.remove(tmp_path / "p/splits/train/shared")  # as it was prepared before there were any
  before = PreparedData(tmp_path / "p").splits["train"]
  assert before.relevant(0).tolist() == [3, 1] and common.barred(before).of(2)[0].tolist() == [1, 2, 5]


def test_a_passage_without_text_is_a_row_that_no_word_finds(beir, write, minilm, tmp_path):
  texts = ["merge sort of lists", "", "sockets and ports", "lists in order", "a heap", "trees"]
  write("beir/corpus.jsonl", [{"_id": f"d{row}", "title": "", "text": text} for row, text in enumerate(texts)])
  data = prepare_source(Beir(beir, empty_text="keep"), tmp_path / "p")
  assert data.passages[1] == Passage("d1", "", "") and [passage.text for passage in data.passages.read()] == texts
  found = Bm25.build((passage.text for passage in data.passages.read()), tmp_path / "bm25").search(["lists", ""], 6)
  assert sorted(found.rows[0].tolist()) == [-1, -1, -1, -1, 0, 3] and (found.rows[1] == -1).all()
  tokenizer = Tokenizer(minilm)
  for words in (False, True):  # with words: what spans are cut from
    store = write_token_store(
      lambda start: iter(texts[start:]), 6, tokenizer, tmp_path / f"s{words}", max_tokens=16, words=words
    )
    tokens, lengths = store.batch(np.arange(3), 8)
    assert lengths.tolist() == [6, 2, 5] and tokens[1, :2].tolist() == tokenizer.wrap([])
  spans = SpanBatches([store], [], SpanLengths(8, 1), None, batch_size=4, seed=0)
  assert spans.counts()[0]["empty"] == 1 and 1 not in {int(row) for step in range(20) for row in spans.draw(step).rows}


HEADER = "query-id\tcorpus-id\tscore"


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("qrels/train.tsv", [HEADER, "q0\td1\t1", "q0\tno\t1"], r"train\.tsv:3: unknown passage id in judgements: 'no'"),
    ("qrels/train.tsv", [HEADER, "q0\td1\t1", "no\td1\t1"], r"train\.tsv:3: unknown query id in judgements: 'no'"),
    ("qrels/train.tsv", [HEADER, "q0\td1\t1", "q0\td1\t2"], r"train\.tsv:3: one pair is judged twice"),
    ("qrels/train.tsv", [HEADER], r"train\.tsv: no training query left"),
    ("qrels/train.tsv", [HEADER, "q0\td1\t0"], r"train\.tsv: no training query left: none has a positive"),
    ("qrels/dev.tsv", [HEADER], r"dev\.tsv: no query in split dev"),
    ("corpus.jsonl", [], r"corpus\.jsonl: empty corpus"),
    (
      "corpus.jsonl",
      [{"_id": "a", "text": "x"}, "", {"_id": "b", "text": "y"}, {"_id": "a", "text": "z"}],
      r"corpus\.jsonl:4: duplicate id: 'a'",
    ),
    (
      "queries.jsonl",
      [{"_id": "q0", "text": "x"}, {"_id": "q2", "text": "y"}, {"_id": "q0", "text": "z"}],
      r"queries\.jsonl:3: duplicate id: 'q0'",
    ),
  ],
)
def test_bad_input_names_its_place(beir, write, tmp_path, name, content, message):
  write(f"beir/{name}", content)
  with pytest.raises(InputError, match=message):
    prepare_source(Beir(beir), tmp_path / "p")
  assert not (tmp_path / "p" / "prepared.json").exists()
  assert not list((tmp_path / "p").rglob("*.partial"))


def test_splits_must_be_there(beir, tmp_path):
  with pytest.raises(InputError, match="no such split.*'test'"):
    prepare_source(Beir(beir), tmp_path / "p", splits=["train", "test"])
  with pytest.raises(InputError, match="no such split.*'train'"):
    prepare_source(Beir(beir), tmp_path / "p", splits=["dev"])
  data = prepare_source(Beir(beir), tmp_path / "p", splits=["dev"], training_split=None)
  assert list(data.splits) == ["dev"]


def test_a_killed_run_keeps_whole_parts_and_goes_on(beir, tmp_path, monkeypatch):
  class Killed(BaseException):
    pass

  rename, made = files.rename, []

  def until_train(source, target):
    if target.name == "train":
      raise Killed
    rename(source, target)

  monkeypatch.setattr(files, "rename", until_train)
  with pytest.raises(Killed):
    prepare_source(Beir(beir), tmp_path / "p")
  assert (tmp_path / "p/corpus/part.json").is_file() and not (tmp_path / "p/splits/train").exists()
  monkeypatch.setattr(files, "rename", rename)
  write_text = builders.write_text
  monkeypatch.setattr(builders, "write_text", lambda *args: (made.append(args[1]), write_text(*args)))
  prepare_source(Beir(beir), tmp_path / "p")
  assert made == ["train", "dev"]
  prepare_source(Beir(beir), tmp_path / "p")
  assert made == ["train", "dev"]


def test_changed_files_are_prepared_again(beir, write, tmp_path, monkeypatch):
  prepare_source(Beir(beir), tmp_path / "p")
  made, write_text = [], builders.write_text
  monkeypatch.setattr(builders, "write_text", lambda *args: (made.append(args[1]), write_text(*args)))
  write("beir/qrels/dev.tsv", ["q1\td3\t1", "q3\td4\t1"])
  assert len(prepare_source(Beir(beir), tmp_path / "p").splits["dev"]) == 2
  assert made == ["dev"]
  passages = [{"_id": f"d{row}", "text": f"other {row}"} for row in reversed(range(6))]
  write("beir/corpus.jsonl", passages)
  data = prepare_source(Beir(beir), tmp_path / "p")
  assert made == ["dev", "corpus", "train", "dev"]
  np.testing.assert_array_equal(data.splits["train"].positives(1), [5])


def test_sigterm_is_heard_while_judgements_and_negatives_are_read(monkeypatch):
  monkeypatch.setattr(prepare, "_CHUNK", 2)
  monkeypatch.setattr(preemption, "asked", lambda: True)
  chunks = prepare._chunks(iter(range(5)))
  assert next(chunks) == (0, [0, 1])
  with pytest.raises(preemption.Preempted, match="judgements and negatives will be read again"):
    next(chunks)
