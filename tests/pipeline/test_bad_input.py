"""Bad input through the main job: one line that names file, line and value, and status 2; nothing made is lost.

What settings alone can get wrong stands in test_rules, damage to what a run has made in tests/faults.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import shutil
import types

import pytest
from support import runs, tiny

from dptdr_jax import main as job
from dptdr_jax.core import preemption


@pytest.fixture
def end(monkeypatch, capsys):
  """A function (config, workdir, stages…) that runs the main job and returns its exit status and its last line."""
  monkeypatch.setattr(preemption, "install", lambda: None)  # pytest's process keeps its own handler

  def run(config, workdir: pathlib.Path, *stages: str) -> tuple[int, str]:
    values = dict.fromkeys(("_STORE", "_REMOTE", "_COORDINATOR", "_PROCESSES", "_PROCESS"))
    values |= {"_CONFIG": config, "_WORKDIR": workdir, "_STAGES": stages, "_VERIFY": False, "_PRUNE": False}
    for name, value in values.items():
      monkeypatch.setattr(job, name, types.SimpleNamespace(value=value))
    status = job.main(["main"])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return status, (error.splitlines() or [""])[-1]

  return run


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
  """A directory with data and a backbone that nobody damages."""
  directory = tmp_path_factory.mktemp("sound")
  tiny.config(directory)
  with gzip.open(directory / "data/corpus.jsonl.gz", "rb") as packed:
    (directory / "data/corpus.jsonl").write_bytes(packed.read())
  (directory / "data/corpus.jsonl.gz").unlink()
  return directory


@pytest.fixture
def ready(sound, tmp_path):
  """(config, directory) of a copy."""
  for name in ("data", "backbone"):
    shutil.copytree(sound / name, tmp_path / name)
  return tiny.config(tmp_path, evaluate__baselines=(), train__evaluate_every=0), tmp_path


CORPUS, QUERIES, TRAIN, DEV = "corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/dev.tsv"


@pytest.mark.parametrize(
  ("name", "number", "line", "message"),
  [
    (CORPUS, 7, '{"_id": "p6", "text": "cut', "broken JSON"),
    (CORPUS, 7, '["p6"]', "a line must be a JSON object"),
    (CORPUS, 7, f'{{"_id": "p6", "text": "long", "n": {"9" * 5000}}}', "broken JSON (Exceeds the limit"),
    (CORPUS, 7, f'{{"_id": "p6", "text": "deep", "n": {"[" * 100_000}{"]" * 100_000}}}', "broken JSON (maximum rec"),
    (CORPUS, 7, '{"_id": "p2", "title": "t", "text": "again"}', "duplicate id: 'p2'"),
    (CORPUS, 7, r'{"_id": "p6\u0000", "title": "t", "text": "NUL"}', "an id with a NUL character: 'p6\\x00'"),
    (CORPUS, 7, r'{"_id": "p6", "title": "t", "text": "half a \ud800"}', "text has half a surrogate pair"),
    (QUERIES, 3, '{"_id": "q2", "text": 5}', "text must be a string: 5"),
    (QUERIES, 3, '{"_id": "q1", "text": "again"}', "duplicate id: 'q1'"),
    (TRAIN, 5, "q7\tp1", "3 columns expected, 2 found: 'q7\\tp1'"),
    (TRAIN, 5, "q999\tp1\t1", "unknown query id in judgements: 'q999'"),
    (DEV, 2, "q0\tp1\tgood", "a grade must be a whole number: 'good'"),
    (DEV, 2, "q0\tp1\t3000000000", "a grade must have 32 bits: '3000000000'"),
    (DEV, 3, "q0\tp1\t1\nq0\tp1\t2", None),
  ],
)
def test_damaged_line_is_named(ready, end, name, number, line, message):
  config, directory = ready
  path = directory / "data" / name
  lines = path.read_text().splitlines()
  lines[number - 1] = line
  path.write_text("".join(f"{one}\n" for one in lines))
  status, said = end(config, directory / "work", "prepare")
  if message is None:
    number, message = number + 1, "one pair is judged twice, with different grades: ('q0', 'p1')"
  assert status == 2 and said.startswith(f"error: {path}:{number}: {message}"), said


def test_half_a_file_is_named(ready, end):
  config, directory = ready
  corpus = directory / "data/corpus.jsonl"
  whole = gzip.compress(corpus.read_bytes())
  for content, message in ((b"", "empty corpus"), (whole[: len(whole) // 2], "broken gzip")):
    corpus.write_bytes(content)
    status, said = end(config, directory / "work", "prepare")
    assert status == 2 and said.startswith(f"error: {corpus}") and message in said, said


@pytest.mark.parametrize("grade", ["0", "-2", None])
def test_no_training_query_is_left(ready, end, grade):
  config, directory = ready
  path = directory / "data" / TRAIN
  head, *lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join([head, *(line.replace("\t1\n", f"\t{grade}\n") for line in lines if grade)]))
  status, said = end(config, directory / "work", "prepare", "mine", "train")
  wanted = "no training query left: none has a positive" if grade else f"{path}: no query in split train"
  assert status == 2 and wanted in said, said


def test_query_judged_below_zero_alone_is_measured(ready):
  config, directory = ready
  path = directory / "data" / DEV
  head, first, *lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join([head, first.replace("\t1\n", "\t-2\n"), *lines]))
  made = runs.Run(config, directory / "work").change(rounds=0, evaluate__baselines=("bm25",))
  made.run()
  assert 0 < json.loads((directory / "work/results.json").read_text())["bm25"]["dev"]["RR@10"] < 1


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("config.json", "[]", "config.json: a JSON object was expected"),
    ("config.json", '{"model_type": "bert"', "config.json:1: broken JSON"),
    ("config.json", '"layer_norm_eps": "small"', "config.json: layer_norm_eps has the wrong type: 'small'"),
    ("model.safetensors", None, "model.safetensors: not a complete safetensors file"),
    ("tokenizer.json", None, "broken JSON"),
    ("tokenizer_config.json", '{"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}',
     "transformers cannot make a tokenizer of it (You need to install fugashi"),
  ],
)  # fmt: skip
def test_damaged_backbone_is_named(ready, end, name, content, message):
  config, directory = ready
  path = directory / "backbone" / name
  if content is None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  elif "eps" in content:
    path.write_text(path.read_text().replace('"layer_norm_eps": 1e-12', content))
  else:
    path.write_text(content)
  if "Japanese" in str(content):
    (directory / "backbone/tokenizer.json").unlink()
    (directory / "backbone/vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nheap\n")
  status, said = end(config, directory / "work", "prepare", "mine", "train")
  assert status == 2 and said.startswith(f"error: {directory}/backbone") and message in said, said


def test_mended_line_is_all_that_a_rerun_needs(ready, end):
  config, directory = ready
  path = directory / "data" / TRAIN
  whole = path.read_text()
  path.write_text(f"{whole}q7\tp1\n")
  assert end(config, directory / "work", "prepare")[0] == 2
  kept = runs.stored(directory / "work")
  assert any(name.startswith("corpus/") for name in kept) and not any(name.startswith("split/") for name in kept)
  path.write_text(whole)
  assert end(config, directory / "work", "prepare")[0] == 0
  assert kept < runs.stored(directory / "work")


def test_damaged_artefacts_are_made_again_and_the_others_stay(whole, tmp_path, monkeypatch, end):
  made = whole.copy(tmp_path / "work")
  results, built = (made.workdir / "results.json").read_bytes(), runs.watch(monkeypatch)
  harmed = {}
  for kind, name in (("tokens", "tokens/tokens.bin"), ("vectors", "vectors-00000.npy"), ("index", "index/index.faiss"),
                     ("bm25", "index/data-00000.npy"), ("split", "judgements/values.npy"), ("measures", "run.trec"),
                     ("report", "results.json")):  # fmt: skip
    node = made.nodes(kind)[0]
    path = made.path(node) / name
    harmed[node.ref] = path, path.read_bytes()
    if kind in ("tokens", "index", "report"):
      path.unlink()
    else:
      path.write_bytes(path.read_bytes()[:-8])
  assert end(made.config, made.workdir)[0] == 0
  assert sorted(built) == sorted(harmed)
  assert (made.workdir / "results.json").read_bytes() == results
  assert all(path.read_bytes() == before for ref, (path, before) in harmed.items() if ref.kind not in ("index",))
  prompts = made.workdir / "train1/retriever/prompts.safetensors"
  prompts.write_bytes(prompts.read_bytes()[:-8])
  status, said = end(made.config, made.workdir)
  assert (
    status == 2 and "training chose it on the way" in said and said.startswith(f"error: {prompts.resolve().parents[1]}")
  )
