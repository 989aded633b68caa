"""A whole run: what it leaves for people, how it is started, resumed and stopped, and whose directory it takes."""

from __future__ import annotations

import json
import os
import pathlib

import numpy as np
import pytest
from support import runs, tiny

from dptdr_jax import Retriever
from dptdr_jax.core import preemption
from dptdr_jax.core.errors import DptdrError, InputError
from dptdr_jax.pipeline import models, run
from dptdr_jax.retrieval import fusion
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.settings import Settings

SYSTEMS = ["bm25", "backbone", "backbone-first", "pretrain", "pretrain-first", "elsewhere", "train1", "train2",
           "fused-backbone", "fused", "reranked"]  # fmt: skip


def test_results_name_systems_splits_and_measures(whole):
  results = json.loads((whole.workdir / "results.json").read_text())
  assert list(results) == SYSTEMS
  for system in results.values():
    assert list(system) == ["dev", "test"] and list(system["dev"]) == ["RR@10", "R@100"]
    assert all(0 <= value <= 1 for split in system.values() for value in split.values())
  assert len({json.dumps(results[name]) for name in SYSTEMS}) > 6, "systems are not one another"
  assert runs.prompts(whole.workdir, 1) != runs.prompts(whole.workdir, 2)


def test_run_files_have_six_columns_and_every_query(whole):
  names = sorted(path.name for path in (whole.workdir / "evaluate/runs").iterdir())
  assert names == sorted(f"{system}.{split}.trec" for system in SYSTEMS for split in ("dev", "test"))
  for name in names:
    lines = [line.split() for line in (whole.workdir / "evaluate/runs" / name).read_text().splitlines()]
    assert {len(line) for line in lines} == {6} and {line[5] for line in lines} == {name.partition(".")[0]}
    assert len({line[0] for line in lines}) == 8


def test_recommended_is_the_best_on_dev_and_published_with_its_fusion(whole):
  results = json.loads((whole.workdir / "results.json").read_text())
  about = json.loads((whole.workdir / "recommended.json").read_text())
  means = {name: splits["dev"]["RR@10"] for name, splits in results.items()}
  assert about["dev"] == pytest.approx(means) and means[about["system"]] == max(means.values())
  for split in ("dev", "test"):
    for baseline, measures in about["differences"][split].items():
      wanted = results[about["system"]][split]["RR@10"] - results[baseline][split]["RR@10"]
      assert measures["RR@10"]["mean"] == pytest.approx(wanted)
      assert measures["RR@10"]["interval"][0] <= wanted + 1e-9
  search = json.loads((whole.workdir / "retriever/search.json").read_text())
  both = [Run.open(whole.path(node) / "run") for node in fused_of(whole)]
  assert search["value"] == pytest.approx(means["fused"]) and 0 <= search["weight"] <= 1
  made = fusion.weighted(*both[:2], search["weight"], both[2].depth)
  np.testing.assert_array_equal(np.asarray(both[2].rows[:]), made.rows)
  published, trained = (Retriever.load(whole.workdir / name) for name in ("retriever", "train2/retriever"))
  assert published.hash == trained.hash


def fused_of(whole: runs.Run) -> list:
  """BM25's run of dev, the last retriever's, and both fused."""
  node = whole.node("evaluate/runs/fused.dev.trec")
  nodes = whole.plan().nodes
  fused = nodes[node.inputs.run]
  return [nodes[fused.inputs.bm25], nodes[fused.inputs.dense], fused]


def test_report_shows_trainings_pools_and_examples(whole):
  page = (whole.workdir / "report.html").read_text()
  for words in ("Pretraining", "Uniformity", "Training, round 2", "Cross-encoder", "Gradient norm", "Tokens per second",
                "Negatives of round 2", "Negatives of round 1 and the cross-encoder", "from bm25 + dense",
                "Negatives mined during round 1", "Negatives of round 1 from step 6",
                "reranked by the cross-encoder"):  # fmt: skip
    assert words in page, words


def test_links_lead_to_what_people_look_for(whole):
  for name in ("train1/retriever/retriever.json", "train2/retriever/prompts.safetensors", "cross/model",
               "pretrain/backbone/config.json", "prepare/corpus", "prepare/splits/dev", "mine1/pool",
               "mine1/mining.json", "summary.json"):  # fmt: skip
    assert (whole.workdir / name).exists(), name
  assert not os.path.isabs(os.readlink(whole.workdir / "train1"))


def test_moved_run_finds_its_backbone(whole, tmp_path):
  moved = whole.copy(tmp_path / "moved")
  retriever, before = (Retriever.load(made.workdir / "train1/retriever") for made in (moved, whole))
  assert tmp_path in pathlib.Path(retriever.backbone.path).resolve().parents
  assert retriever.hash == before.hash


def test_start_writes_what_it_was_and_processes_see_one_directory(whole, monkeypatch):
  about = json.loads((whole.workdir / "run.json").read_text())
  assert about["config"]["train"]["steps"] == 7 and about["config"]["data"]["dir"] == whole.config.data.dir
  assert about["processes"] == 1 and about["devices"] == 8 and about["versions"]["jax"]
  assert run.opened(whole.workdir) == (Settings.of(whole.config), whole.workdir)
  monkeypatch.setattr(run, "_SEEN_WITHIN_S", 0)
  monkeypatch.setattr(type(run.hosts.TEAM), "first_says", lambda self, make: "written elsewhere")
  with pytest.raises(InputError, match=f"{whole.workdir}: process 0 does not see the first one's --workdir"):
    run._agree_on_directory(Settings.of(whole.config), whole.workdir)


def test_stages_are_chosen_by_name(tmp_path):
  made = runs.Run(tiny.config(tmp_path), tmp_path / "work")
  for stages, message in (
    (["trian"], "no stage is named 'trian'; this run has prepare, mine0, train1, encode, evaluate, report"),
    (["mine", "train"], "stage prepare is not done, and mine0 needs it; add it to --stages"),
    (["prepare", "encode"], "stage train1 is not done, and encode needs it; add it to --stages"),
  ):
    with pytest.raises(DptdrError, match=message):
      made.run(*stages)
    assert not runs.stored(made.workdir), "before anything is made"
  made.run("prepare", "mine")
  assert {path.partition("/")[0] for path in runs.stored(made.workdir)} == {"corpus", "split", "tokens", "bm25",
                                                                            "bm25_run", "candidates"}  # fmt: skip
  assert (made.workdir / "mine0/pool").is_dir() and not (made.workdir / "train1").exists()


def same(one: runs.Run, other: runs.Run, link: str) -> bool:
  """Whether two runs made the same of an artefact, but for names of directories and what the clock says."""
  contents = []
  for made in (one, other):
    about = json.loads((made.workdir / link / "artefact.json").read_text())
    hashes = {name: row for name, row in about["files"].items() if not name.endswith((".json", ".jsonl"))}
    lines = (made.workdir / link / "metrics.jsonl").read_text().splitlines()
    figures = [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]
    contents.append((about["key"], hashes, figures))
  return contents[0] == contents[1]


@pytest.mark.parametrize(
  ("stage", "asked_at"),
  [("pretrain", 3), ("train1", 5)],  # in the trial before the first step; while negatives are mined
)
def test_interrupted_training_ends_as_an_undisturbed_one(whole, tmp_path, monkeypatch, stage, asked_at):
  made = whole.copy(tmp_path / "work")
  made.forget(made.node(stage))
  times = iter(range(1, 10**6))
  with monkeypatch.context() as stopped, pytest.raises(preemption.Preempted):
    stopped.setattr(preemption, "asked", lambda: next(times) >= asked_at)
    made.run(stage)
  assert not (made.path(made.node(stage))).exists()
  assert (made.workdir / stage).resolve().name.endswith(".partial"), "its metrics can be watched"
  made.run(stage)
  assert same(made, whole, stage)
  assert not (made.workdir / stage / "checkpoints").exists()


def test_fine_tuning_starts_from_exact_weights_and_saves_its_own_backbone(tmp_path):
  tiny.backbone(tmp_path / "backbone", hidden=16, layers=1, heads=2)
  made = runs.Run(
    tiny.config(tmp_path, prompt__kind="none", compute_dtype="bfloat16", train__learning_rate=1e-3, train__steps=2,
                evaluate__baselines=("backbone",)), tmp_path / "work")  # fmt: skip
  made.run()
  retriever = Retriever.load(tmp_path / "work/train1/retriever", compute_dtype="bfloat16")
  assert (tmp_path / "work/train1/retriever/backbone/model.safetensors").is_file()
  assert retriever.backbone.compute_dtype == "bfloat16"
  results = json.loads((tmp_path / "work/results.json").read_text())
  assert list(results) == ["backbone", "train1"] and results["train1"] != results["backbone"]
  node = made.node("train1")
  making = made.making(node, tmp_path / "making")
  rounded = models.load_backbone(node.inputs.backbone, making, node.inputs.compute).params["embeddings"]["word"]
  exact = np.asarray(models.exact_weights(node.inputs.backbone, making)["embeddings"]["word"])
  assert exact.dtype == np.float32 and (exact != np.asarray(rounded).astype(np.float32)).any()
  np.testing.assert_array_equal(exact.astype(rounded.dtype), rounded)
