"""Prepared data: the round trip, every error with its place, and files that are lost or damaged."""

import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dptdr_jax.core import preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.data import array_records, prepare
from dptdr_jax.data.formats.beir import Beir
from dptdr_jax.data.formats.msmarco import MsMarco
from dptdr_jax.data.prepare import Corpus, Split, write_corpus
from dptdr_jax.data.records import Passage
from dptdr_jax.data.spans import SpanBatches, SpanLengths
from dptdr_jax.data.store import write_token_store
from dptdr_jax.data.tokenizer import Tokenizer

HEADER = "query-id\tcorpus-id\tscore"


def test_round_trip(beir, prepare_all):
  corpus, splits = prepare_all(Beir(beir))
  data, passages, train, dev = Beir(beir), corpus.passages, splits["train"], splits["dev"]
  assert list(passages.read()) == list(data.passages()) and len(corpus) == 6
  assert passages[4] == list(data.passages())[4]
  assert list(passages.read(4)) == list(data.passages())[4:]
  assert passages.take(np.array([4, 0, 4])) == [passages[row] for row in (4, 0, 4)]
  assert passages.take(np.array([], int)) == []
  assert list(train.queries.read()) == list(data.queries("train"))
  assert dev.queries[0] == next(data.queries("dev")) and dev.queries[0].answers == ("one", "eins")
  assert corpus.ids.ids(train.positives(0)) == ["d1", "d2"]
  np.testing.assert_array_equal(train.judgements.rows(0), [1, 2, 5])
  np.testing.assert_array_equal(train.judgements.values(0), [1, 2, 0])
  np.testing.assert_array_equal(train.positives(1), [0])
  assert len(train) == 2 and train.negatives.rows(0).size == 0


def test_counts_and_trainable_rows(beir, write, prepare_all, tmp_path):
  write("beir/qrels/train.tsv", [HEADER, "q0\td1\t0", "q2\td0\t1", "q3\td0\t-1"])
  train = prepare_all(Beir(beir))[1]["train"]
  assert train.trainable.tolist() == [1]
  train.check_trainable()
  assert json.loads((tmp_path / "p/corpus/counts.json").read_text()) == {"passages": 6}
  counts = json.loads((tmp_path / "p/train/counts.json").read_text())
  assert counts == {"queries": 3, "trainable": 1, "skipped": 0}
  write("beir/qrels/train.tsv", [HEADER, "q0\td1\t0"])
  with pytest.raises(InputError, match="no training query left: none has a positive"):
    prepare_all(Beir(beir))[1]["train"].check_trainable()


def test_preparing_prints_nothing_and_leaves_no_temporary_files(
  beir, prepare_all, tmp_path, monkeypatch, capfd, caplog
):
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
  (tmp_path / "temporary").mkdir()
  prepare_all(Beir(beir))
  assert capfd.readouterr().out == "" and not caplog.records
  assert not list((tmp_path / "temporary").iterdir())


def test_full_disk_is_an_os_error(beir, tmp_path, monkeypatch):
  class Full:
    def __init__(self, path, options):
      pass

    def write(self, record):
      raise RuntimeError("write() failed: No space left on device")

  monkeypatch.setattr(array_records.array_record_module, "ArrayRecordWriter", Full)
  with pytest.raises(OSError, match="No space left on device"):
    write_corpus(Beir(beir), tmp_path)


def test_tfds_reads_what_was_written(beir, prepare_all, tmp_path):
  prepare_all(Beir(beir))
  corpus = tfds.builder_from_directory(str(tmp_path / "p/corpus/text")).as_data_source("corpus")
  assert len(corpus) == 6
  assert corpus[1] == {"id": b"d1", "title": b"Title 1", "text": b"text number 1 about things"}
  queries = tfds.builder_from_directory(str(tmp_path / "p/train/text")).as_data_source("queries")
  assert queries[0] == {"id": b"q0", "text": b"question 0?", "answers": []}


def test_many_shards_keep_the_order(beir, prepare_all, tmp_path, monkeypatch):
  monkeypatch.setattr(array_records, "_SHARD_ROWS", 4)
  monkeypatch.setattr(array_records, "_READ", 3)
  passages = prepare_all(Beir(beir))[0].passages
  assert len(list((tmp_path / "p/corpus/text").glob("*array_record*"))) == 2
  assert [passage.id for passage in passages.read(1)] == [f"d{row}" for row in range(1, 6)]
  assert passages[5].id == "d5"


def test_negatives_by_row(write, prepare_all, tmp_path):
  write("m/collection.tsv", [f"{row + 100}\tPassage {row}." for row in range(5)])
  write("m/queries.train.tsv", ["7\tfirst", "8\tsecond"])
  write("m/qrels.train.tsv", ["8\t0\t104\t1", "7\t0\t100\t1", "8\t0\t104\t1"])
  write("m/qidpidtriples.train.full.2.tsv", ["8\t104\t101", "8\t104\t103", "7\t100\t102", "8\t104\t102"])
  train = prepare_all(MsMarco(tmp_path / "m"))[1]["train"]
  np.testing.assert_array_equal(train.negatives.rows(0), [2])
  np.testing.assert_array_equal(train.negatives.rows(1), [1, 3, 2])
  np.testing.assert_array_equal(train.judgements.rows(1), [4])  # a line that is repeated counts once
  for line, what in (
    ("7\t100\t999", "passage id in negatives: '999'"),
    ("55\t100\t101", "query id in negatives: '55'"),
  ):
    write("m/qidpidtriples.train.full.2.tsv", ["8\t104\t101", line])
    with pytest.raises(InputError, match=rf"full\.2\.tsv:2: unknown {what}"):
      prepare_all(MsMarco(tmp_path / "m"))


def test_queries_of_one_text_share_what_is_relevant_to_them(beir, write, prepare_all):
  texts = ["Which  port?", "other", "which port?", "else", "which port?", "other"]
  write("beir/queries.jsonl", [{"_id": f"q{row}", "text": text} for row, text in enumerate(texts)])
  judged = ["q0\td3\t2", "q0\td1\t1", "q1\td0\t1", "q2\td1\t0", "q2\td5\t1", "q2\td2\t0", "q4\td4\t0"]
  write("beir/qrels/train.tsv", [HEADER, *judged])
  write("beir/qrels/dev.tsv", [HEADER, "q1\td3\t1", "q5\td4\t1"])
  corpus, splits = prepare_all(Beir(beir))
  train, dev = splits["train"], splits["dev"]
  assert [corpus.ids.ids(train.relevant(row)) for row in range(4)] == [
    ["d3", "d1", "d5"],  # its own, in the order of the qrels, then those of the same text
    ["d0"],
    ["d5", "d3"],  # not d1, which is judged for this query itself
    ["d1", "d3", "d5"],  # none of its own
  ]
  assert [train.positives(row).tolist() for row in range(4)] == [[3, 1], [0], [5], []]
  assert [dev.positives(row).tolist() for row in range(2)] == [[3], [4]] and dev.relevant(0).tolist() == [3, 4]


def test_passage_without_text_is_a_row_without_tokens(beir, write, minilm, prepare_all, tmp_path):
  texts = ["merge sort of lists", "", "sockets and ports", "lists in order", "a heap", "trees"]
  write("beir/corpus.jsonl", [{"_id": f"d{row}", "title": "", "text": text} for row, text in enumerate(texts)])
  passages = prepare_all(Beir(beir, empty_text="keep"))[0].passages
  assert passages[1] == Passage("d1", "", "") and [passage.text for passage in passages.read()] == texts
  tokenizer = Tokenizer(minilm)
  texts = [f"{text} {text} {text} {text} {text}".strip() for text in texts]
  for words in (False, True):
    store = write_token_store(
      lambda start: iter(texts[start:]), 6, tokenizer, tmp_path / f"s{words}", max_tokens=32, words=words
    )
    tokens, lengths = store.batch(np.arange(3), 8)
    assert lengths.tolist() == [8, 2, 8] and tokens[1, :2].tolist() == tokenizer.wrap([])
  spans = SpanBatches([store], SpanLengths(18), None, batch_size=4, seed=0)
  assert spans.counts()[0]["empty"] == 1 and 1 not in {int(row) for step in range(20) for row in spans.draw(step).rows}


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("qrels/train.tsv", [HEADER, "q0\td1\t1", "q0\tno\t1"], r"train\.tsv:3: unknown passage id in judgements: 'no'"),
    ("qrels/train.tsv", [HEADER, "q0\td1\t1", "no\td1\t1"], r"train\.tsv:3: unknown query id in judgements: 'no'"),
    ("qrels/train.tsv", [HEADER, "q0\td1\t1", "q0\td1\t2"], r"train\.tsv:3: one pair is judged twice"),
    ("qrels/train.tsv", [HEADER], r"train\.tsv: no query in split train"),
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
def test_bad_input_names_its_place(beir, write, prepare_all, name, content, message):
  write(f"beir/{name}", content)
  with pytest.raises(InputError, match=message):
    prepare_all(Beir(beir))


def test_writers_replace_what_a_killed_attempt_left(beir, prepare_all, tmp_path, monkeypatch):
  monkeypatch.setattr(array_records, "_SHARD_ROWS", 2)
  prepare_all(Beir(beir))
  monkeypatch.setattr(array_records, "_SHARD_ROWS", 4)
  for name in ("corpus/begun.json", "train/begun.json"):
    (tmp_path / "p" / name).write_text("{}")
  (tmp_path / "p/train/counts.json").unlink()
  corpus, splits = prepare_all(Beir(beir))
  assert [passage.id for passage in corpus.passages.read()] == [f"d{row}" for row in range(6)]
  assert splits["train"].positives(0).tolist() == [1, 2]
  assert (tmp_path / "p/train/begun.json").is_file()


def test_damaged_files_are_input_errors_and_json_files_are_not_read(beir, prepare_all, tmp_path):
  prepare_all(Beir(beir))
  whole = tmp_path / "p"

  def read(path):
    corpus = Corpus(path / "corpus")
    train = Split(path / "train", "train")
    return [*corpus.passages.read(), *train.queries.read(), *train.positives(0), *corpus.ids.rows(["d1"])]

  expected, harmless = read(whole), {"features.json", "dataset_info.json", "counts.json"}
  names = [path.relative_to(whole) for part in ("corpus", "train") for path in sorted((whole / part).rglob("*.*"))]
  assert len(names) > 20 and {"seed.npy", "values.npy"} <= {name.name for name in names}
  for name in names:
    content = (whole / name).read_bytes()
    cuts = {"lost": None, "cut": content[:-1] if name.suffix == ".npy" else content[: len(content) // 2], "empty": b"",
            "garbage": b"\x93NUMPY garbage" * 99}  # fmt: skip
    for damage, left in cuts.items():
      copy = tmp_path / "copy"
      shutil.copytree(whole, copy, dirs_exist_ok=True)
      (copy / name).unlink() if left is None else (copy / name).write_bytes(left)
      if name.name in harmless:
        assert read(copy) == expected
        continue
      with pytest.raises(InputError) as error:
        read(copy)
      assert error.value.path is not None and copy in error.value.path.parents, (name, damage)
      shutil.copy(whole / name, copy / name)


def test_files_of_another_corpus_do_not_fit(beir, write, prepare_all, tmp_path):
  prepare_all(Beir(beir))
  (tmp_path / "p").rename(tmp_path / "other")
  write("beir/corpus.jsonl", [{"_id": f"d{row}", "text": "x"} for row in range(7)])
  write("beir/qrels/train.tsv", [HEADER, "q0\td1\t1", "q1\td1\t1", "q2\td1\t1"])
  prepare_all(Beir(beir))
  for part, reader in (("corpus", Corpus), ("train", lambda path: Split(path, "train"))):
    for name in (path.name for path in sorted((tmp_path / "p" / part).iterdir()) if path.is_dir()):
      shutil.copytree(tmp_path / "p", tmp_path / "mixed", dirs_exist_ok=True)
      shutil.rmtree(tmp_path / "mixed" / part / name)
      shutil.copytree(tmp_path / "other" / part / name, tmp_path / "mixed" / part / name)
      with pytest.raises(InputError, match="expected"):
        reader(tmp_path / "mixed" / part)
      shutil.rmtree(tmp_path / "mixed")


def test_sigterm_stops_the_reading_of_judgements(monkeypatch):
  monkeypatch.setattr(prepare, "_CHUNK", 2)
  monkeypatch.setattr(preemption, "asked", lambda: True)
  chunks = prepare._chunks(iter(range(5)))
  assert next(chunks) == (0, [0, 1])
  with pytest.raises(preemption.Preempted, match="judgements and negatives will be read again"):
    next(chunks)
