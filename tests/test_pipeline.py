"""A whole run on a small corpus: what is done is not done again, what changed is, and errors come first."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from support import tiny

from dptdr_jax import pipeline
from dptdr_jax.core import preemption
from dptdr_jax.core.errors import DptdrError, InputError
from dptdr_jax.stages import common, evaluate, train
from dptdr_jax.stages.trial import DevTrial

ROOT = pathlib.Path(__file__).parents[1]


def make_config(directory: pathlib.Path, name: str = "beir", **fields):
  """configs/NAME.py at the size of the tiny corpus; `fields` are set by dotted names with '__' for '.'."""
  sys.path.insert(0, str(ROOT))  # the configs import configs.base, as they do from the repository's root
  config = importlib.import_module(f"configs.{name}").get_config()
  config.backbone.path = str(tiny.backbone(directory / "backbone"))
  config.backbone.sha256 = ""
  config.data.dir = str(directory / "data")
  config.prompt.length = 4
  config.text.passage_length = 32
  train = {"steps": 6, "queries": 8, "checkpoint_every": 3, "evaluate_every": 3, "log_every": 1, "learning_rate": 0.01}
  config.train.update(train)
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in fields.items()})
  return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(config, workdir) of a run that has ended."""
  directory = tmp_path_factory.mktemp("run")
  tiny.beir(directory / "data")
  config = make_config(directory, train__negatives="bm25")
  pipeline.run(config, directory / "work")
  return config, directory / "work"


def done_at(workdir: pathlib.Path) -> dict[str, int]:
  return {path.parent.name: path.stat().st_mtime_ns for path in workdir.glob("*/manifest.json")}


def test_results_name_systems_splits_and_measures(finished):
  _, workdir = finished
  results = json.loads((workdir / "results.json").read_text())
  assert list(results) == ["bm25", "backbone", "train1"]
  for system in results.values():
    assert {"RR@10", "R@50", "R@100", "R@1000", "nDCG@10"} <= set(system["dev"])
    assert all(0 <= value <= 1 for value in system["dev"].values())
  page = (workdir / "report.html").read_text()
  assert "Gradient norm" in page and "nDCG@10" in page and page.count("<details") > 4
  run = (workdir / "evaluate/runs/train1.dev.trec").read_text().splitlines()
  assert all(len(line.split()) == 6 for line in run)


def test_a_rerun_does_nothing_and_still_ends_with_the_table(finished, capsys):
  config, workdir = finished
  before = done_at(workdir)
  pipeline.run(config, workdir)
  assert done_at(workdir) == before
  assert "trained retriever" in capsys.readouterr().out


def test_a_changed_field_redoes_what_depends_on_it_and_nothing_else(finished, caplog, capsys):
  config, workdir = finished
  before = done_at(workdir)
  changed = config.copy_and_resolve_references()
  changed.evaluate.examples = 3
  changed.evaluate.graded_splits = ("dev",)
  pipeline.run(changed, workdir)
  table = capsys.readouterr().out.splitlines()
  head = next(line for line in table if "RR(rel=2)@10" in line)
  figures = next(line for line in table if "trained retriever" in line)
  assert head.split()[:2] == ["RR(rel=2)@10", "R(rel=2)@20"] and len(head) == len(figures)
  after = done_at(workdir)
  assert {name for name in after if after[name] != before[name]} == {"evaluate", "report"}
  pipeline.run(config, workdir)  # back to what the other tests expect


def test_a_touched_input_is_hashed_again_and_a_changed_one_redoes_all(tmp_path):
  data = tiny.beir(tmp_path / "data")
  config = make_config(tmp_path, evaluate__backbone=False)
  pipeline.run(config, tmp_path / "work", ["prepare"])
  before = done_at(tmp_path / "work")
  os.utime(data / "queries.jsonl")
  pipeline.run(config, tmp_path / "work", ["prepare"])
  assert done_at(tmp_path / "work") == before
  lines = (data / "queries.jsonl").read_text().splitlines()
  (data / "queries.jsonl").write_text(
    "\n".join([*lines[:-1], lines[-1].replace('"text": "', '"text": "merge ')]) + "\n"
  )
  pipeline.run(config, tmp_path / "work", ["prepare"])
  assert done_at(tmp_path / "work") != before


def test_another_place_or_split_redoes_no_training(finished, tmp_path):
  config, workdir = finished
  moved = config.copy_and_resolve_references()
  for name, path in (("data", config.data.dir), ("backbone", config.backbone.path), ("work", workdir)):
    shutil.copytree(path, tmp_path / name)
  moved.data.dir, moved.backbone.path = str(tmp_path / "data"), str(tmp_path / "backbone")
  before = done_at(tmp_path / "work")
  (tmp_path / "backbone/README.md").write_text("not read")
  pipeline.run(moved, tmp_path / "work")
  assert done_at(tmp_path / "work") == before
  vectors = tmp_path / "work/encode/train1/corpus/vectors-00000.npy"
  encoded = vectors.stat().st_mtime_ns
  shutil.copy(tmp_path / "data/qrels/dev.tsv", tmp_path / "data/qrels/test.tsv")
  moved.evaluate.splits = ("dev", "test")
  pipeline.run(moved, tmp_path / "work")
  after = done_at(tmp_path / "work")
  assert {name for name in after if after[name] != before[name]} == {"prepare", "encode", "evaluate", "report"}
  assert vectors.stat().st_mtime_ns == encoded, "the corpus' vectors stay"
  results = json.loads((tmp_path / "work/results.json").read_text())
  assert results["train1"]["test"] == results["train1"]["dev"]


def test_sigterm_during_a_trial_saves_and_the_trial_comes_again(finished, monkeypatch, tmp_path):
  config, workdir = finished
  for name in ("prepare", "mine0"):
    shutil.copytree(workdir / name, tmp_path / name)
  trials, evaluate = [], DevTrial.evaluate

  def stopped(self, retriever):
    trials.append(len(trials))
    return evaluate(self, retriever)

  monkeypatch.setattr(DevTrial, "evaluate", stopped)
  for trial in (1, 2, 1):  # in the first trial; when that has come again, in the next and last; when that comes again
    trials.clear()
    monkeypatch.setattr(preemption, "asked", lambda trial=trial: len(trials) == trial)
    with pytest.raises(preemption.Preempted, match="train stands at step"):
      pipeline.run(config, tmp_path, ["train"])
  monkeypatch.undo()
  pipeline.run(config, tmp_path, ["train"])
  for name in ("retriever/prompts.safetensors", "metrics.jsonl"):
    assert (tmp_path / "train1" / name).read_bytes() == (workdir / "train1" / name).read_bytes(), name


def test_another_measure_searches_nothing_again(finished, monkeypatch, tmp_path):
  config, workdir = finished
  shutil.copytree(workdir, tmp_path / "work")
  config = config.copy_and_resolve_references()
  config.evaluate.measures = (*config.evaluate.measures, "R@5")
  with monkeypatch.context() as watched:
    watched.setattr(evaluate.search, "dense", lambda *arguments: pytest.fail("searched again"))
    pipeline.run(config, tmp_path / "work")
  results = json.loads((tmp_path / "work/results.json").read_text())
  before = json.loads((workdir / "results.json").read_text())
  for system, measured in results.items():
    assert 0 <= measured["dev"].pop("R@5") <= measured["dev"]["R@20"]
    assert measured == before[system]
  data = tmp_path / "data"  # other texts of the same queries: nothing that was found for the old ones counts
  shutil.copytree(config.data.dir, data)
  config.data.dir = str(data)
  lines = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
  texts = [line["text"] for line in lines]
  for line, text in zip(lines, texts[3:] + texts[:3], strict=True):
    line["text"] = text
  (data / "queries.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  config.train.steps = 1
  pipeline.run(config, tmp_path / "work")
  shown = json.loads((tmp_path / "work/results.json").read_text())
  assert shown["bm25"]["dev"]["RR@10"] < 0.5 * before["bm25"]["dev"]["RR@10"]
  assert shown["backbone"]["dev"]["RR@10"] != before["backbone"]["dev"]["RR@10"]
  config.evaluate.depth, config.evaluate.measures = 30, ("R@5",)
  pipeline.run(config, tmp_path / "work")
  runs = [(tmp_path / "work/evaluate/runs" / path.name).read_text() for path in (workdir / "evaluate/runs").iterdir()]
  assert max(int(line.split()[3]) for run in runs for line in run.splitlines()) == 30, "another depth is searched"


def test_a_start_writes_what_it_was_and_processes_see_one_directory(finished, monkeypatch):
  config, workdir = finished
  about = json.loads((workdir / "run.json").read_text())
  assert about["config"]["train"]["negatives"] == "bm25" and about["config"]["data"]["dir"] == config.data.dir
  assert about["processes"] == 1 and about["devices"] == 8 and about["versions"]["jax"]
  monkeypatch.setattr(pipeline, "_SEEN_WITHIN_S", 0)
  monkeypatch.setattr(pipeline.hosts, "first_says", lambda make: "written elsewhere")
  with pytest.raises(InputError, match=f"{workdir}: process 0 does not see the first one's --workdir"):
    pipeline._agree_on_directory(config, pipeline.Layout.of(workdir))


def test_stages_by_name(tmp_path):
  tiny.beir(tmp_path / "data")
  config = make_config(tmp_path)
  with pytest.raises(DptdrError, match="no stage is named 'trian'"):
    pipeline.run(config, tmp_path / "work", ["trian"])
  with pytest.raises(DptdrError, match="prepare is not done, and mine0, train1 need it; add it to --stages"):
    pipeline.run(config, tmp_path / "work", ["mine", "train"])
  with pytest.raises(DptdrError, match="train1 is not done, and encode needs it; add it to --stages"):
    pipeline.run(config, tmp_path / "work", ["prepare", "encode"])
  assert not done_at(tmp_path / "work"), "it shows before anything is run"
  pipeline.run(config, tmp_path / "work", ["prepare", "mine", "train"])
  assert set(done_at(tmp_path / "work")) == {"prepare", "mine0", "train1"}


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"text__passage_length": 512}, "512 tokens don't fit the backbone's 96 positions"),
    ({"data__max_stored_tokens": 20}, "text.query_length is beyond the 20 tokens that are stored: 32"),
    ({"train__query_chunk": 3, "train__queries": 40}, "a query chunk of 3 does not divide the 5 rows"),
    ({"evaluate__measures": ("MRR10",)}, "MRR10"),
    ({"evaluate__depth": 100}, "looks deeper than evaluate.depth, 100: 'R@1000'"),
    ({"train__checkpoint_every": 0}, "train.checkpoint_every must be at least 1: 0"),
    ({"train__warmup": float("nan")}, "train.warmup must be at least 0: nan"),
    ({"vector__temperature": 0.0}, "vector.temperature must be above 0"),
    ({"train__schedule": "step"}, "unknown decay of the learning rate"),
    ({"encode__dtype": "float8"}, "unknown encode.dtype"),
    ({"train__negatives": "hard"}, "unknown train.negatives"),
    ({"train__positive": "random"}, "unknown train.positive"),
    ({"vector__pooling": "max"}, "unknown vector.pooling"),
    ({"data__source": "trec"}, "unknown data.source"),
    ({"data__dir": "nowhere"}, "no such folder"),
    ({"data__dev_split": "train"}, "the dev split is the training split"),
    ({"data__dev_split": "valid"}, "data.dev_split names a split that is not here: 'valid'.*dev; '' for none"),
    ({"evaluate__splits": ("dev", "tset")}, "evaluate.splits names a split that is not here: 'tset'"),
    ({"evaluate__splits": ()}, "evaluate.splits names no split"),
    ({"evaluate__measures": ()}, "evaluate.measures names no measure"),
    ({"data__train_split": "tarin"}, "a split that is not here: 'tarin'.* to train nothing, set rounds to 0"),
    ({"pretrain__tokenizer": "train"}, "pretrain.tokenizer is train, and nothing is pretrained"),
    ({"prompt__kind": "soft"}, "unknown prompt kind"),
    ({"text__query_template": "query: {words}"}, "template"),
    ({"backbone__path": "package:no_such_package"}, "no such package is installed"),
    ({"backbone__sha256": "0" * 64}, "SHA-256"),
    ({"seed": -1}, "seed must be at least 0: -1"),
    ({"compute_dtype": "float16"}, "compute_dtype is 'auto', 'float32' or 'bfloat16': 'float16'"),
    ({"text__query_length": 2}, "text.query_length must be at least 3: 2"),
    ({"prompt__length": 100}, "reads as many words as the prompt is long, and the backbone takes 96: 100"),
    ({"train__backbone_dropout": 1.5}, "train.backbone_dropout must be -1, or at least 0 and below 1: 1.5"),
    ({"train__warmup": 3.0, "train__steps": 0}, "a warm-up of so many steps"),
    ({"train__negatives": "source", "train__passages": 2}, "'source', and no negatives come with this data"),
    ({"cross__enabled": True, "cross__epochs": 0.0}, "a cross-encoder's training has no steps"),
    ({"evaluate__answers": True, "evaluate__measures": ("Success@5",)}, "no query of split dev has one"),
    ({"evaluate__splits": ("dev", "empty")}, "nothing is judged in split empty, which RR@10 needs"),
    ({"index__search_parameters": "nprobe=4"}, "search is exact: 'nprobe=4'"),
  ],
)
def test_what_cannot_work_is_said_before_any_work(tmp_path, fields, message):
  tiny.beir(tmp_path / "data")
  if "empty" in fields.get("evaluate__splits", ()):
    (tmp_path / "data/qrels/empty.tsv").write_text("query-id\tcorpus-id\tscore\n")
  with pytest.raises(InputError, match=message):
    pipeline.run(make_config(tmp_path, **fields), tmp_path / "work")
  assert not done_at(tmp_path / "work")


def test_a_loss_that_is_not_finite_stops_with_advice_and_keeps_the_checkpoint(tmp_path):
  tiny.beir(tmp_path / "data")
  config = make_config(tmp_path, train__learning_rate=1e30, train__clip=0.0, train__checkpoint_every=1)
  with pytest.raises(DptdrError, match="Try a lower train.learning_rate") as kept:  # with its traceback and all frames
    pipeline.run(config, tmp_path / "work")
  for thread in threading.enumerate():
    if thread.name.startswith("batches"):
      thread.join(60)
      assert not thread.is_alive(), kept
  assert any((tmp_path / "work/train1/checkpoints").iterdir())


def test_fine_tuning_saves_a_backbone_of_its_own(tmp_path):
  tiny.beir(tmp_path / "data")
  config = make_config(tmp_path, prompt__kind="none", train__learning_rate=1e-3, evaluate__bm25=False)
  pipeline.run(config, tmp_path / "work")
  retriever = tmp_path / "work/train1/retriever"
  assert (retriever / "backbone/model.safetensors").is_file()
  config.compute_dtype = "bfloat16"
  assert common.load_retriever(config, retriever, None).backbone.compute_dtype == "bfloat16"
  results = json.loads((tmp_path / "work/results.json").read_text())
  assert results["train1"] != results["backbone"]


def test_fine_tuning_in_bfloat16_starts_from_the_exact_weights(finished, monkeypatch, tmp_path):
  config, workdir = finished
  config = config.copy_and_resolve_references()
  config.prompt.kind, config.compute_dtype = "none", "bfloat16"
  for name in ("prepare", "mine0"):
    shutil.copytree(workdir / name, tmp_path / name)
  given = []
  monkeypatch.setattr(train, "TrainLoop", lambda *arguments: given.extend(arguments) or pytest.exit("enough"))
  with pytest.raises(pytest.exit.Exception):
    train.run(config, tmp_path)
  rounded, exact = (np.asarray(tree["embeddings"]["word"]) for tree in (given[1].params, given[-1]))
  assert exact.dtype == np.float32 and (exact != rounded.astype(np.float32)).any()
  np.testing.assert_array_equal(exact.astype(rounded.dtype), rounded)


def test_main_reports_errors_in_one_line_and_sigterm_with_its_own_status(tmp_path):
  data, backbone = tiny.beir(tmp_path / "data"), tiny.backbone(tmp_path / "backbone")
  command = [
    sys.executable, "-m", "dptdr_jax.main", f"--config={ROOT}/configs/beir.py", f"--workdir={tmp_path}/work",
    f"--config.data.dir={data}", f"--config.backbone.path={backbone}", "--config.text.passage_length=32",
    "--config.prompt.length=4", "--config.train.steps=100000", "--config.train.queries=8",
    "--config.train.evaluate_every=0",
  ]  # fmt: skip
  broken = subprocess.run([*command, "--config.data.dir=nowhere"], cwd=ROOT, capture_output=True, text=True)
  assert broken.returncode == 2 and broken.stderr.splitlines()[-1] == "error: nowhere: no such folder"
  unknown = subprocess.run([*command, "--config.train.stepz=3"], cwd=ROOT, capture_output=True, text=True)
  assert unknown.returncode == 2 and 'mean "steps"' in unknown.stderr and "Traceback" not in unknown.stderr
  running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
  metrics = tmp_path / "work/train1/metrics.jsonl"
  while not (metrics.exists() and metrics.stat().st_size):
    assert running.poll() is None
    time.sleep(0.2)
  running.send_signal(signal.SIGTERM)
  assert running.wait(60) == preemption.EXIT_STATUS
  assert len(list((tmp_path / "work/train1/checkpoints").iterdir())) == 1
