"""DPR's Natural Questions files."""

import json

import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.formats import lines
from dptdr_jax.data.formats.lines import read_json_array
from dptdr_jax.data.formats.nq import NaturalQuestions
from dptdr_jax.data.records import Judgement, Negatives, Passage, Query


def _entry(question, positives, hard=(), key="passage_id", answers=("an answer",)):
  def contexts(ids):
    return [{"title": "T", "text": "t", "score": 1.0, "title_score": 0, key: passage_id} for passage_id in ids]

  return {
    "dataset": "nq_train_psgs_w100", "question": question, "answers": list(answers),
    "positive_ctxs": contexts(positives), "negative_ctxs": contexts(["5"]), "hard_negative_ctxs": contexts(hard),
  }  # fmt: skip


@pytest.fixture
def directory(write, tmp_path):
  rows = ["id\ttext\ttitle", '1\t"Aaron Aaron ( ; ""Ahärôn"") is a prophet, or ""priest""."\tAaron']
  write("n/psgs_w100.tsv.gz", rows + [f"{row}\tplain text {row}\tPage {row}" for row in range(2, 7)])
  train = [_entry("who is aaron", ["1", "2", "1"], ["3", "4"]), _entry("lost", []), _entry("x", ["6"], key="psg_id")]
  write("n/biencoder-nq-train.json", json.dumps(train, indent=4).encode())
  write("n/biencoder-nq-dev.json.gz", json.dumps([_entry("dev?", ["2"], ["1"])]).encode())
  write("n/nq-test.qa.csv", ["who got it first\t['Wilhelm Conrad Röntgen']", 'two?\t"[""a b"", \'c\']"'])
  return tmp_path / "n"


def test_reads_the_official_files(directory):
  data = NaturalQuestions(directory)
  assert data.splits() == ("train", "dev", "test")
  passages = list(data.passages())
  assert passages[0] == Passage("1", "Aaron", 'Aaron Aaron ( ; "Ahärôn") is a prophet, or "priest".')
  assert len(passages) == 6
  assert list(data.queries("train")) == [
    Query("nq-train-0", "who is aaron", ("an answer",)),
    Query("nq-train-2", "x", ("an answer",)),
  ]
  assert data.skipped["train"] == 1
  assert list(data.judgements("train")) == [
    Judgement("nq-train-0", "1", 1),
    Judgement("nq-train-0", "2", 1),
    Judgement("nq-train-2", "6", 1),
  ]
  assert list(data.negatives("train")) == [Negatives("nq-train-0", ("3", "4"))]
  assert list(data.negatives("dev")) == [Negatives("nq-dev-0", ("1",))]
  assert [path.name for path in data.files("dev")] == ["biencoder-nq-dev.json.gz"]


def test_questions_with_answers_have_no_judgements(directory):
  data = NaturalQuestions(directory)
  assert list(data.queries("test")) == [
    Query("nq-test-0", "who got it first", ("Wilhelm Conrad Röntgen",)),
    Query("nq-test-1", "two?", ("a b", "c")),
  ]
  assert list(data.judgements("test")) == [] and list(data.negatives("test")) == []


@pytest.mark.parametrize("answers", ["__import__('os').getcwd()", "['open'", "'one'", "[1, 2]"])
def test_answers_are_parsed_and_never_run(directory, write, answers):
  write("n/nq-test.qa.csv", ["fine\t['a']", f"bad\t{answers}"])
  with pytest.raises(InputError, match=r"nq-test\.qa\.csv:2: answers must be a list of strings"):
    list(NaturalQuestions(directory).queries("test"))


@pytest.mark.parametrize(
  ("line", "what"),
  [
    ("2\tno title", "3 columns expected, 2 found"),
    ("2\t \tT", "empty text"),
    ("\ttext\tT", "empty id"),
    ('2\ttext\t"Heroes\n3\ttext\tT', "a quote that is not closed"),  # would be one field up to the file's end
  ],
)
def test_damaged_passage_is_named(directory, write, line, what):
  write("n/psgs_w100.tsv.gz", ["id\ttext\ttitle", line])
  with pytest.raises(InputError, match=rf"psgs_w100\.tsv\.gz:2: {what}"):
    list(NaturalQuestions(directory).passages())


def test_header_is_required(directory, write):
  write("n/psgs_w100.tsv.gz", ["1\ttext\ttitle"])
  with pytest.raises(InputError, match=r"psgs_w100\.tsv\.gz:1: the header"):
    list(NaturalQuestions(directory).passages())


def test_context_without_id_is_an_error(directory, write):
  entry = _entry("who", ["1"])
  del entry["positive_ctxs"][0]["passage_id"]
  write("n/biencoder-nq-train.json", f"[\n{json.dumps(_entry('fine', ['1']))},\n{json.dumps(entry)}]".encode())
  with pytest.raises(InputError, match=r"biencoder-nq-train\.json:3: positive_ctxs has an entry without passage_id"):
    list(NaturalQuestions(directory).judgements("train"))


def test_missing_files_are_named(tmp_path):
  with pytest.raises(InputError, match="neither biencoder-nq-SPLIT.json nor"):
    NaturalQuestions(tmp_path).splits()


@pytest.mark.parametrize("at_once", [1, 3, 4096])
def test_json_array_streams_in_blocks_of_any_size(write, monkeypatch, at_once):
  value = [{"text": 'quotes " and \\ and é ☃ \U0001f600', "n": [1, -2.5e3, True, None]}, {}, {"a": {"b": ["c"]}}]
  path = write("a.json", json.dumps(value, indent=1, ensure_ascii=False).encode())
  monkeypatch.setattr(lines, "_AT_ONCE", at_once)
  found = list(read_json_array(path))
  assert [entry for _, entry in found] == value
  assert [line for line, _ in found] == [2, 11, 12]


@pytest.mark.parametrize(
  ("text", "line", "what"),
  [
    ("", 1, "one of '\\[' expected"),
    ('{"a": 1}', 1, "one of '\\[' expected"),
    ('[{"a": 1}\n{"a": 2}]', 2, "one of ',]' expected"),
    ('[{"a": 1},\n3]', 2, "one of '{' expected"),
    ('[\n{"a": 1},\n{"a": tru}' + " " * 40 + "]", 3, "Expecting value"),
    ('[{"a": 1},\n{"b": "cut', 2, "the file ends within an object"),
    ('[{"a": 1}', 1, "one of ',]' expected"),
  ],
)
def test_broken_json_array_names_its_line(write, text, line, what):
  path = write("a.json", text.encode())
  with pytest.raises(InputError, match=rf"a\.json:{line}: broken JSON .*{what}"):
    list(read_json_array(path))


def test_json_array_that_is_not_utf8_names_its_line(write):
  with pytest.raises(InputError, match=r"a\.json:3: not UTF-8"):
    list(read_json_array(write("a.json", b'[{"a": 1},\n\n{"b": "caf\xe9"}]')))
