"""A grid of runs on a tiny corpus: shared stages are done once, and the table says what the runs measured."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from support import tiny
from test_rounds import make_config

from dptdr_jax import Backbone, Retriever, ablate, compare, pipeline
from dptdr_jax.core import files
from dptdr_jax.core.errors import DptdrError, InputError
from dptdr_jax.retrieval import measures
from dptdr_jax.stages import comparison, order


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(config, arms, workdir) of an ablation that has ended."""
  directory = tmp_path_factory.mktemp("ablation")
  config = make_config(directory, rounds=1, train__negatives="bm25", evaluate__backbone=True)
  config.pretrain.update({"spans": 16, "span_tokens": 16, "shortest": 2, "steps": 2, "evaluate_every": 0})
  config.cross.update({"steps": 2, "queries": 4, "passages": 2, "pair_length": 48, "length": 4, "rerank": 5})
  Retriever.untuned(Backbone.load(config.backbone.path), passage_length=48).save(directory / "elsewhere")
  config.evaluate.retrievers = (f"elsewhere={directory}/elsewhere",)
  arms = ablate.chosen(["plain", "unm"], ["P 2: prompt.length=2, pretrain.enabled=True, cross.enabled=True"])
  ablate.ablate(config, directory / "work", arms, [0, 1], ["P 2"], "RR@10")
  return config, arms, directory / "work"


def test_the_table_is_what_the_runs_measured(finished):
  _, _, workdir = finished
  written = json.loads((workdir / "ablation.json").read_text())
  assert written["reference"] == "plain" and written["arms"]["P 2"]["prompt.length"] == 2
  found = written["dev"]
  baselines = ["BM25", "untuned backbone", "pretrained backbone", "elsewhere"]
  assert list(found) == [*baselines, "plain", "unm", "P 2", "P 2, reranked"]
  assert [found[arm]["seeds"] for arm in ("plain", "unm", "P 2", "P 2, reranked")] == [2, 2, 1, 1]
  per_query = {}
  for arm, system in (("plain", "train1"), ("unm", "train2")):
    runs = [np.load(workdir / f"runs/{arm}-{seed}/evaluate/per_query/{system}.dev.npz")["RR@10"] for seed in (0, 1)]
    per_query[arm] = np.mean(runs, axis=0)
    assert found[arm]["means"]["RR@10"] == pytest.approx(per_query[arm].mean())
    assert found[arm]["spread"] == pytest.approx(sorted(run.mean() for run in runs))
  difference = found["unm"]["difference"]
  assert difference["p"] == measures.randomisation_test(per_query["unm"], per_query["plain"])
  assert difference["mean"] == pytest.approx(found["unm"]["means"]["RR@10"] - found["plain"]["means"]["RR@10"])
  assert difference["seeds"] == 2 and found["P 2"]["difference"]["seeds"] == 1 and "difference" not in found["plain"]
  of_one = [np.load(workdir / f"runs/{run}/evaluate/per_query/train1.dev.npz")["RR@10"] for run in ("P-2-0", "plain-0")]
  assert found["P 2"]["difference"]["mean"] == pytest.approx(np.mean(of_one[0] - of_one[1])), "by the seed of both"
  assert found["plain"]["parameters"] > found["P 2"]["parameters"] > 0
  head = found["P 2, reranked"]["parameters"] - found["P 2"]["parameters"] - found["plain"]["parameters"]  # P is 4 too
  assert 32 <= head < 32 * 40, "the cross-encoder's prompt and head count"
  measured = {(path.name.partition(".")[0], path.parts[-4]) for path in workdir.glob("runs/*/evaluate/parts/*.json")}
  baselines = {(system, run) for system, run in measured if not system.startswith(("train", "reranked"))}
  assert baselines == {("bm25", "plain-0"), ("elsewhere", "plain-0"), ("backbone", "P-2-0"), ("pretrain", "P-2-0")}
  table = (workdir / "ablation.md").read_text()
  assert "are against plain, query by query" in table
  assert "| unm |" in table and f"{found['unm']['means']['RR@10']:.4f}" in table
  assert "<svg" in (workdir / "ablation.html").read_text()


def test_shared_stages_are_done_once(finished):
  _, _, workdir = finished
  runs = workdir / "runs"
  for one, other in (
    ("plain-0/prepare/manifest.json", "unm-1/prepare/manifest.json"),
    ("plain-0/mine0/pool/rows.npy", "unm-1/mine0/pool/rows.npy"),
    ("plain-1/train1/retriever/prompts.safetensors", "unm-1/train1/retriever/prompts.safetensors"),
  ):
    assert (runs / one).samefile(runs / other), one
  assert not (runs / "plain-0/train1/metrics.jsonl").samefile(runs / "plain-1/train1/metrics.jsonl")


HOT = {"rounds": 1, "train.learning_rate": 1e30, "train.clip": 0.0, "train.schedule": "constant"}


def test_an_arm_that_fails_keeps_no_other_from_running_and_finds_what_earlier_ones_have_done(finished):
  config, arms, workdir = finished
  three = {"again": arms["plain"], "hot": HOT | {"pretrain.enabled": False}, "once more": arms["plain"]}
  with pytest.raises(DptdrError, match="hot, seed 0 failed: step .* loss nan"):
    ablate.ablate(config, workdir, three, [0], [], "RR@10")
  shown = json.loads((workdir / "ablation.json").read_text())["dev"]
  assert list(shown) == ["BM25", "untuned backbone", "elsewhere", "again", "once more"]
  name = "train1/retriever/prompts.safetensors"
  assert (workdir / "runs/again-0" / name).samefile(workdir / "runs/plain-0" / name)
  ablate.ablate(config, workdir, arms, [0, 1], ["P 2"], "RR@10")


def test_what_a_failing_arm_was_to_measure_another_one_measures(finished):
  config, arms, workdir = finished
  runs = workdir / "runs"

  def compared(some: dict[str, dict]) -> dict:
    with pytest.raises(DptdrError, match="hot, seed 0 failed"):
      ablate.ablate(config, workdir, some, [0], [], "RR@10")
    return json.loads((workdir / "ablation.json").read_text())

  ablate.ablate(config, workdir, {"first": arms["plain"], "second": arms["plain"]}, [0], [], "RR@10")
  assert list(files.read_json(runs / "second-0/results.json")) == ["train1"]
  failing_first = {"hot": HOT | {"pretrain.enabled": False}, "second": arms["plain"], "third": arms["unm"]}
  found = compared(failing_first)
  assert list(found["dev"]) == ["BM25", "untuned backbone", "elsewhere", "second", "third"]
  assert found["reference"] is None and not any("difference" in each for each in found["dev"].values())
  assert "No differences: the first arm, hot, is missing" in (workdir / "ablation.md").read_text()
  assert list(files.read_json(runs / "third-0/results.json")) == ["train1", "train2"]
  before = {name: (runs / name / "evaluate/manifest.json").stat().st_mtime_ns for name in ("second-0", "third-0")}
  assert compared(failing_first) == found
  assert {name: (runs / name / "evaluate/manifest.json").stat().st_mtime_ns for name in before} == before
  # The one arm that pretrains was to show the backbone, and fails when the other has been evaluated.
  found = compared({"fourth": arms["plain"] | {"train.learning_rate": 0.02}, "hot": HOT | {"pretrain.enabled": True}})
  assert list(found["dev"]) == ["BM25", "untuned backbone", "elsewhere", "fourth"] and found["reference"] == "fourth"
  ablate.ablate(config, workdir, arms, [0, 1], ["P 2"], "RR@10")


def test_two_systems_beside_each_other(finished):
  _, _, workdir = finished
  plain, unm = (str(workdir / "runs" / name) for name in ("plain-0", "unm-0"))
  lines = compare.compare([plain, unm, f"{plain}:bm25"], "dev", ["RR@10"]).splitlines()
  found = [np.load(f"{run}/evaluate/per_query/{system}.dev.npz")["RR@10"]
           for run, system in ((plain, "train1"), (unm, "train2"))]  # fmt: skip
  assert len(lines) == 4 and lines[2].startswith(f"| {unm} | RR@10 | {found[0].mean():.4f} | {found[1].mean():.4f} | ")
  assert f"| {measures.randomisation_test(found[1], found[0]):.4f} |" in lines[2]
  assert len(compare.compare([plain, unm], "dev", []).splitlines()) == 4, "both measures"
  for named, split, wanted, message in (
    ([plain], "dev", [], "two systems at least"),
    ([plain, f"{unm}:train7"], "dev", [], "train7.*no such system"),
    ([plain, unm], "dev", ["R@3"], r"not measured in both: \['R@3'\]"),
    ([plain, str(workdir)], "dev", [], "no evaluated run here"),
  ):
    with pytest.raises(InputError, match=message):
      compare.compare(named, split, wanted)


def test_an_arm_with_other_queries_has_no_difference(finished, tmp_path):
  _, _, workdir = finished
  shutil.copytree(workdir / "runs/unm-0", tmp_path / "other")
  files.remove(tmp_path / "other/prepare")
  other = make_config(tmp_path, data__dir=str(tiny.beir(tmp_path / "queries", queries=9)))
  pipeline.run(other, tmp_path / "other", ["prepare"])
  runs = [comparison.Done("plain", 0, 1, workdir / "runs/plain-0")]
  runs += [comparison.Done(name, 0, 2, place) for name, place in (("unm", workdir / "runs/unm-0"),
                                                                 ("other", tmp_path / "other"))]  # fmt: skip
  comparison.write(tmp_path, runs, {"dev": "RR@10"}, {"plain": {}, "unm": {}, "other": {}})
  found = json.loads((tmp_path / "ablation.json").read_text())["dev"]
  assert "difference" in found["unm"] and "difference" not in found["other"]


def test_a_rerun_does_nothing(finished):
  config, arms, workdir = finished
  before = {path: path.stat().st_mtime_ns for path in workdir.glob("runs/*/*/manifest.json")}
  ablate.ablate(config, workdir, arms, [0, 1], ["P 2"], "RR@10")
  assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_arm_that_is_added_leaves_the_baselines_where_they_are_measured(finished):
  config, arms, workdir = finished
  before = {path: path.stat().st_mtime_ns for path in workdir.glob("runs/*/*/manifest.json")}
  ablate.ablate(config, workdir, dict(reversed(arms.items())), [0, 1], ["P 2"], "RR@10")  # BM25 would go to P 2
  assert {path: path.stat().st_mtime_ns for path in before} == before

  def baselines(*names: str) -> dict[str, tuple[bool, bool]]:
    configs = [ablate.configured(config, (arms | ablate.ARMS)[name], 0) for name in names]
    left = ablate._baselines_once(configs, [workdir / "runs" / f"{name.replace(' ', '-')}-0" for name in names])
    return {name: (made.evaluate.bm25, made.evaluate.backbone) for name, made in zip(names, left, strict=True)}

  plain = ablate.configured(config, arms["plain"], 0)
  one, other = ablate._baselines_once([plain, plain], [workdir / "runs/another-0", workdir / "runs/plain-0"])
  assert not one.evaluate.retrievers and other.evaluate.retrievers
  assert baselines("rip", "plain", "P 2") == {"rip": (False, False), "plain": (True, False), "P 2": (False, True)}
  assert baselines("rip", "unm") == {"rip": (True, True), "unm": (False, False)}
  # Only a pretrained arm shows what pretraining makes of the backbone; who shows the untuned one goes on doing so.
  manifest = workdir / "runs/finetune-0/evaluate/manifest.json"
  made = {"key": "k", "made_from": {"config": {"evaluate": {"bm25": False, "backbone": True}}}}
  files.write_json(manifest, made)
  assert baselines("finetune", "rip") == {"finetune": (True, True), "rip": (False, True)}
  files.remove(manifest.parents[1])


def test_all_arms_can_be_run_with_negatives_of_bm25(finished):
  config, _, workdir = finished
  for fields in ablate.chosen(list(ablate.ARMS), []).values():
    order.check(ablate.configured(config, fields, 0))
  with pytest.raises(InputError, match="Success@5"):
    ablate.ablate(config, workdir, ablate.chosen(["plain"], []), [0], [], "Success@5")
  asked = config.copy_and_resolve_references()
  asked.rounds, asked.mine.retrievers = 2, ("backbone",)
  asked.train.update({"sampling": "simans", "simans_source": "backbone"})
  for fields in ablate.chosen(["plain", "unm"], []).values():  # plain mines nothing that has these scores
    order.check(ablate.configured(asked, fields, 0))
  asked.pretrain.update({"enabled": True, "tokenizer": "train"})
  for name in ("plain", "rip"):  # of the backbone that is named, and from nothing
    order.check(ablate.configured(asked, ablate.ARMS[name], 0))
  alike = ablate.chosen([], ["b=-1: rounds=1", "b=+1: rounds=1"])
  with pytest.raises(InputError, match="two arms"):
    ablate.ablate(config, workdir, alike, [0], [], "RR@10")
  with pytest.raises(InputError, match=r"one_seed names arms.*\['pain'\].*Arms: plain"):
    ablate.ablate(config, workdir, ablate.chosen(["plain"], []), [0, 1], ["pain"], "RR@10")
  late = ablate.chosen(["plain"], ["bad: train.sampling=best"])
  with pytest.raises(InputError, match="unknown sampling"):
    ablate.ablate(config, workdir / "other", late, [0], [], "RR@10")
  fewer = ablate.chosen(["plain"], ["fewer: rounds=1, evaluate.measures=('RR@10',)"])
  with pytest.raises(InputError, match="arm fewer: arms are compared by the measures of the config"):
    ablate.ablate(config, workdir / "other", fewer, [0], [], "RR@10")
  odd = ablate.chosen(["plain"], ["odd: rounds=1, train.query_chunk=3, train.queries=40"])
  with pytest.raises(InputError, match="arm odd: train.query_chunk: .* does not divide the 5 rows"):
    ablate.ablate(config, workdir / "other", odd, [0], [], "RR@10")
  assert not (workdir / "other").exists()


@pytest.mark.parametrize(
  ("names", "own", "message"),
  [
    (["nothing"], [], "no such arm"),
    ([], [], "no arms"),
    (["plain"], ["plain: rounds=1"], "a name of its own"),
    ([], ["P8 prompt.length=8"], "NAME: field=value"),
    ([], ["P8: prompt.length"], "field=value"),
    (["plain", "plain"], [], "named twice"),
    ([], ["BM25: rounds=1"], "the table has a row of this name"),
    ([], ["s: seed=3"], "the seeds of --seeds"),
  ],
)
def test_arms_that_cannot_be_read(names, own, message):
  with pytest.raises(InputError, match=message):
    ablate.chosen(names, own)


@pytest.mark.parametrize("texts", [["a"], [], ["0", "1", "0"], ["1.5"]])
def test_seeds_that_cannot_be_read(texts):
  with pytest.raises(InputError, match="seeds are whole numbers"):
    ablate.seeds_of(texts)
  assert ablate.seeds_of(["0", "12"]) == [0, 12]


def test_fields_of_an_arm(finished):
  config, _, workdir = finished
  (fields,) = ablate.chosen([], ["x: evaluate.splits=('dev', 'test'), compute_dtype=float32, train.clip=0.5"]).values()
  assert fields == {"evaluate.splits": ("dev", "test"), "compute_dtype": "float32", "train.clip": 0.5}
  for wrong, message in (
    ("prompt.lenth", 'Did you mean "length"'),
    ("prompt.length", "cannot be casted to type <class"),
  ):
    arms = {"plain": {}, "odd": {wrong: "eight"}}
    with pytest.raises(InputError, match=f"^arm odd: an arm's field cannot be set .*{message}.*: '{wrong}=eight'$"):
      ablate.ablate(config, workdir / "other", arms, [0], [], "RR@10")
