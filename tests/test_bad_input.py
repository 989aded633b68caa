"""Bad input through the main job: one line that names file, line and value, exit status 2, and nothing made is lost.

What a config alone can get wrong stands in test_pipeline.
"""

from __future__ import annotations

import gzip
import importlib
import json
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import types

import jax
import pytest
from safetensors.numpy import load_file, save_file
from support import tiny

from dptdr_jax import main as job
from dptdr_jax import pipeline
from dptdr_jax.backbone import Backbone
from dptdr_jax.core import preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.retriever import Retriever
from dptdr_jax.runtime.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]


def make_config(directory: pathlib.Path):
  """configs/beir.py over `directory`/data and `directory`/backbone, at the size of the tiny corpus."""
  sys.path.insert(0, str(ROOT))  # the configs import configs.base, as they do from the repository's root
  config = importlib.import_module("configs.beir").get_config()
  config.backbone.path, config.data.dir = str(directory / "backbone"), str(directory / "data")
  config.prompt.length, config.text.passage_length = 4, 32
  config.train.update({"steps": 4, "queries": 8, "checkpoint_every": 2, "evaluate_every": 0, "log_every": 1})
  config.encode.shard_passages, config.evaluate.bm25, config.evaluate.backbone = 16, False, False
  return config


@pytest.fixture
def end(monkeypatch, capsys):
  """A function (config, workdir, stages…) that runs the main job and returns its exit status and its last line."""
  monkeypatch.setattr(preemption, "install", lambda: None)  # pytest's process keeps its own handler

  def run(config, workdir: pathlib.Path, *stages: str) -> tuple[int, str]:
    values = {"_CONFIG": config, "_WORKDIR": workdir, "_STAGES": stages, "_VERIFY": False}
    values |= dict.fromkeys(("_COORDINATOR", "_PROCESSES", "_PROCESS", "_REMOTE"))
    for name, value in values.items():
      monkeypatch.setattr(job, name, types.SimpleNamespace(value=value))
    status = job.main(["main"])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return status, (error.splitlines() or [""])[-1]

  return run


def damage(path: pathlib.Path, number: int, line: str) -> None:
  """Puts `line` in the place of line `number` (from 1) of a text file, which may be gzipped."""
  packed = path.suffix == ".gz"
  lines = (gzip.decompress(path.read_bytes()) if packed else path.read_bytes()).decode().splitlines()
  lines[number - 1] = line
  text = "".join(f"{one}\n" for one in lines).encode()
  path.write_bytes(gzip.compress(text) if packed else text)


def cut(path: pathlib.Path, share: float = 0.5) -> None:
  """Leaves the first part of a file alone."""
  path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.fixture
def ready(tmp_path):
  """(config, directory): a tiny BEIR folder and backbone, not yet damaged."""
  tiny.beir(tmp_path / "data")
  tiny.backbone(tmp_path / "backbone")
  return make_config(tmp_path), tmp_path


@pytest.mark.parametrize(
  ("name", "number", "line", "message"),
  [
    ("corpus.jsonl.gz", 7, '{"_id": "p6", "text": "cut', "broken JSON"),
    ("corpus.jsonl.gz", 7, '["p6"]', "a line must be a JSON object"),
    ("corpus.jsonl.gz", 7, '{"_id": "p6", "title": "", "text": " "}', "empty text and no title"),
    ("corpus.jsonl.gz", 7, '{"_id": "p2", "title": "t", "text": "again"}', "duplicate id: 'p2'"),
    ("queries.jsonl", 3, '{"_id": "q2", "text": 5}', "text must be a string: 5"),
    ("queries.jsonl", 3, '{"_id": "q1", "text": "again"}', "duplicate id: 'q1'"),
    ("qrels/train.tsv", 5, "q7\tp1", "3 columns expected, 2 found: 'q7\\tp1'"),
    ("qrels/train.tsv", 5, "q7\tp999\t1", "unknown passage id in judgements: 'p999'"),
    ("qrels/train.tsv", 5, "q999\tp1\t1", "unknown query id in judgements: 'q999'"),
    ("qrels/dev.tsv", 2, "q0\tp1\tgood", "a grade must be a whole number: 'good'"),
  ],
)
def test_damaged_lines(ready, end, name, number, line, message):
  config, directory = ready
  damage(directory / "data" / name, number, line)
  status, said = end(config, directory / "work")
  assert status == 2
  assert said.startswith(f"error: {directory}/data/{name}:{number}: {message}")


def test_one_id_may_be_wrong_in_any_split_of_one_queries_file(ready, end):
  config, directory = ready
  damage(directory / "data/qrels/dev.tsv", 3, "q0\tp1\t1")
  damage(directory / "data/qrels/dev.tsv", 2, "q0\tp1\t2")
  status, said = end(config, directory / "work")
  assert (status, said) == (
    2, f"error: {directory}/data/qrels/dev.tsv:3: one pair is judged twice, with different grades: ('q0', 'p1')"
  )  # fmt: skip


def test_an_empty_corpus_and_no_training_query(ready, end):
  config, directory = ready
  qrels = directory / "data/qrels/train.tsv"
  whole = qrels.read_text()
  qrels.write_text(whole.replace("\t1\n", "\t0\n"))
  status, said = end(config, directory / "work")
  assert status == 2 and said.startswith(f"error: {qrels}: no training query left")
  qrels.write_text("query-id\tcorpus-id\tscore\n")
  status, said = end(config, directory / "work")
  assert status == 2 and said.startswith(f"error: {qrels}: no training query left")
  qrels.write_text(whole)
  (directory / "data/corpus.jsonl.gz").write_bytes(b"")
  assert end(config, directory / "work") == (2, f"error: {directory}/data/corpus.jsonl.gz: empty corpus")


def test_a_cut_download(ready, end):
  config, directory = ready
  cut(directory / "data/corpus.jsonl.gz", 0.9)
  status, said = end(config, directory / "work")
  assert status == 2 and f"{directory}/data/corpus.jsonl.gz:" in said and "broken gzip" in said


def test_a_mended_line_is_all_that_a_rerun_needs(ready, end):
  config, directory = ready
  qrels = directory / "data/qrels/train.tsv"
  whole = qrels.read_text()
  damage(qrels, 5, "q7\tp999\t1")
  assert end(config, directory / "work")[0] == 2
  corpus = directory / "work/prepare/text/corpus/part.json"
  assert not (directory / "work/prepare/manifest.json").exists() and corpus.is_file()
  qrels.write_text(whole)
  assert end(config, directory / "work", "prepare")[0] == 0


def test_truncated_backbone(ready, end):
  config, directory = ready
  cut(directory / "backbone/model.safetensors")
  status, said = end(config, directory / "work", "prepare", "mine", "train")
  assert status == 2 and said.startswith(f"error: {directory}/backbone/model.safetensors: ")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(config, directory) of a run that has ended."""
  directory = tmp_path_factory.mktemp("trained")
  tiny.beir(directory / "data")
  tiny.backbone(directory / "backbone")
  config = make_config(directory)
  pipeline.run(config, directory / "work")
  return config, directory


def test_from_a_truncated_checkpoint_the_one_before_goes_on(trained, end, caplog):
  config, directory = trained
  round1 = directory / "work/train1"
  expected = (round1 / "retriever/prompts.safetensors").read_bytes()
  for name in ("manifest.json", "retriever/prompts.safetensors"):  # as if killed at the last step
    (round1 / name).unlink()
  for path in (round1 / "checkpoints/4").rglob("*"):
    if path.is_file():
      cut(path)
  assert end(config, directory / "work")[0] == 0
  assert "the checkpoint of step 4 is damaged" in caplog.text
  assert (round1 / "retriever/prompts.safetensors").read_bytes() == expected


def test_a_full_disk_loses_no_shard(trained, end):
  config, directory = trained
  work = directory / "work"
  corpus = work / "encode/train1/corpus"
  results = (work / "results.json").read_bytes()
  (work / "encode/manifest.json").unlink()  # as if killed before the third shard
  (corpus / "manifest.json").rename(corpus / "begun.json")
  (corpus / "vectors-00002.npy").unlink()
  (corpus / "vectors-00002.npy.partial").symlink_to("/dev/full")
  made = {path.name: path.stat().st_mtime_ns for path in corpus.glob("vectors-*.npy")}
  status, said = end(config, work)
  assert status == 2
  assert said.startswith(f"error: {corpus}/vectors-00002.npy: no space left on the disk. Free some")
  status, _ = end(config, work)
  assert status == 0 and len(made) == 3
  assert made.items() <= {path.name: path.stat().st_mtime_ns for path in corpus.glob("vectors-*.npy")}.items()
  assert (work / "results.json").read_bytes() == results


def test_a_full_disk_while_a_checkpoint_is_written(tmp_path, capfd):
  """Writes to a file that may not grow, which is how a quota shows; the error comes when the save is waited for."""
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  state = {"table": jax.random.normal(jax.random.key(0), (64, 256))}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  checkpoints.save(1, state)
  checkpoints.wait()
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
  try:
    with pytest.raises(InputError, match=rf"{tmp_path}/checkpoints: no space left on the disk"):
      checkpoints.save(2, state)
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert Checkpoints(tmp_path / "checkpoints").steps() == [1]
  assert "Traceback" not in capfd.readouterr().err


def test_what_broke_after_its_stage_is_made_again(trained, end):
  config, directory = trained
  work = directory / "work"
  results = (work / "results.json").read_bytes()
  for broken in ("encode/train1/corpus/vectors-00001.npy", "prepare/tokens/corpus/tokens.bin"):
    whole = (work / broken).read_bytes()
    kept = work / "encode/train1/corpus/vectors-00000.npy"
    made = kept.stat().st_mtime_ns
    cut(work / broken)
    for stage in ("encode", "evaluate"):  # as if killed there
      if not broken.startswith(stage):
        (work / stage / "manifest.json").unlink()
    (work / "evaluate/parts/train1.dev.json").unlink(missing_ok=True)
    status, said = end(config, work)
    assert status == 1 and "The next start makes it again, in stage " + broken.partition("/")[0] in said
    assert end(config, work)[0] == 0
    assert (work / broken).read_bytes() == whole and (work / "results.json").read_bytes() == results
    assert kept.stat().st_mtime_ns == made


def test_a_damaged_index_is_built_again(tmp_path, end):
  tiny.beir(tmp_path / "data")
  tiny.backbone(tmp_path / "backbone")
  config, work = make_config(tmp_path), tmp_path / "work"
  config.rounds, config.evaluate.bm25, config.evaluate.backbone, config.index.factory = 0, True, True, "IVF4,Flat"
  pipeline.run(config, work)
  results = (work / "results.json").read_bytes()
  for broken in ("prepare/bm25/data-00000.npy", "evaluate/index/backbone/index.faiss"):
    whole = (work / broken).read_bytes()
    (work / broken).write_bytes(whole[: len(whole) // 2])
    for name in ("found", "parts"):  # all is searched again
      shutil.rmtree(work / "evaluate" / name)
    (work / "evaluate/manifest.json").unlink()
    status, said = end(config, work)
    assert status == 1 and "It is removed, and the next start does so" in said
    assert end(config, work)[0] == 0
    assert len((work / broken).read_bytes()) == len(whole) and (work / "results.json").read_bytes() == results


def test_truncated_prompts(trained, end):
  config, directory = trained
  path = directory / "work/train1/retriever/prompts.safetensors"
  whole = path.read_bytes()
  cut(path)
  (directory / "work/encode/manifest.json").unlink()
  status, said = end(config, directory / "work")
  path.write_bytes(whole)
  assert status == 2 and said.startswith(f"error: {path}: ")


def test_prompts_of_another_backbone_or_tokenizer(trained, tmp_path):
  _, directory = trained
  retriever = directory / "work/train1/retriever"
  other = Backbone.load(tiny.backbone(tmp_path / "other", seed=1))
  with pytest.raises(InputError, match=rf"{retriever}/retriever\.json: the prompts were trained on another backbone"):
    Retriever.load(retriever, other)
  deeper = Backbone.load(tiny.backbone(tmp_path / "deeper", layers=3))
  with pytest.raises(InputError, match="trained on another backbone"):
    Retriever.load(retriever, deeper)
  tiny.backbone(tmp_path / "same")
  tokens = tmp_path / "same/tokenizer.json"
  content = json.loads(tokens.read_text())
  content["model"]["vocab"] |= {
    "merge": content["model"]["vocab"]["quick"],
    "quick": content["model"]["vocab"]["merge"],
  }
  tokens.write_text(json.dumps(content))
  with pytest.raises(
    InputError, match=rf"{retriever}/retriever\.json: the prompts were trained with another tokenizer"
  ):
    Retriever.load(retriever, Backbone.load(tmp_path / "same"))


def test_prompts_of_another_shape(trained, tmp_path):
  _, directory = trained
  retriever = tmp_path / "retriever"
  Retriever.load(directory / "work/train1/retriever").save(retriever)
  tensors = load_file(retriever / "prompts.safetensors")
  save_file({name: value[:-1] for name, value in tensors.items()}, retriever / "prompts.safetensors")
  with pytest.raises(InputError, match=rf"{retriever}/prompts\.safetensors: "):
    Retriever.load(retriever)


CONFIG, PLACE = "--config=configs/beir.py", "--workdir=nowhere"


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([CONFIG, PLACE, "--wrkdir=x"], "Unknown command line flag 'wrkdir'"),
    ([CONFIG], "Flag --workdir must have a value"),
    ([PLACE], "Flag --config must have a value"),
    ([CONFIG, PLACE, "--processes=two"], "flag --processes=two"),
    ([CONFIG, PLACE, "--config.sed=1"], "no such field: 'sed'"),
    ([CONFIG, PLACE, "--config.seed=one"], "flag --config.seed=one"),
    ([CONFIG, PLACE, "extra"], "unexpected argument 'extra'"),
    (["--config=nothing.py", PLACE, "--config.seed=1"], "No such file or directory: 'nothing.py'"),
    (["--config=broken.py", PLACE], "SyntaxError: .*broken.py, line 1"),
    (["--config=wrong.py", PLACE], "config: ValueError: seven is no number"),
    (["--config=astray.py", PLACE], "nowhere"),
  ],
)
def test_flags_and_configs_that_are_wrong(tmp_path, flags, message):
  (tmp_path / "broken.py").write_text("def get_config(:\n")
  (tmp_path / "wrong.py").write_text("def get_config():\n  raise ValueError('seven is no number')\n")
  (tmp_path / "astray.py").write_text("from configs import nowhere\n")
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  status, said = call("main", *flags, directory=tmp_path)
  assert status == 2 and len(said.splitlines()) == 1 and re.match(f"error: .*{message}", said), said


@pytest.mark.parametrize("command", ["ablate", "compare", "plan", "negatives"])
def test_every_command_refuses_in_the_same_way(command):
  status, said = call(command, "--no_such_flag=1")
  assert status == 2 and len(said.splitlines()) == 1 and "no_such_flag" in said


def test_help_is_no_error():
  assert call("main", "--help") == (1, "")  # as absl has it


def call(command: str, *flags: str, directory: pathlib.Path = ROOT) -> tuple[int, str]:
  """A command's exit status, and what it says of errors."""
  whole = [sys.executable, "-m", f"dptdr_jax.{command}", *flags]
  ended = subprocess.run(whole, cwd=directory, capture_output=True, text=True, check=False)
  return ended.returncode, ended.stderr
