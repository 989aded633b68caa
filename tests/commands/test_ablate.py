"""Ablation and comparison: five arms with two seeds share what they can, and the table says what they measured."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from ml_collections import ConfigDict
from support import runs, tiny

from dptdr_jax import Backbone, Retriever, ablate, compare
from dptdr_jax.core.errors import DptdrError, InputError
from dptdr_jax.core.store import Ref
from dptdr_jax.pipeline import evaluate, rules, run
from dptdr_jax.reporting import page
from dptdr_jax.retrieval import measures
from dptdr_jax.settings import Settings

NAMED, OWN = ["plain", "rip", "unm", "dptdr"], "with a cross: cross.enabled=True"
ONE_SEED = ["rip", "dptdr"]


class Finished(NamedTuple):
  config: ConfigDict
  arms: dict[str, dict]
  workdir: pathlib.Path
  built: list[Ref]

  def again(self, arms: dict[str, dict], seeds: list[int], one_seed: Sequence[str] = ()) -> dict:
    """Runs other arms in the same directory; returns ablation.json."""
    ablate.ablate(self.config, self.workdir, arms, seeds, list(one_seed), "RR@10")
    return self.written()

  def written(self) -> dict:
    return json.loads((self.workdir / "ablation.json").read_text())

  def values(self, run: str, system: str) -> np.ndarray:
    return measured(self.workdir / "runs" / run, system)


def measured(workdir: pathlib.Path, system: str) -> np.ndarray:
  """RR@10 of each query."""
  trec = workdir / f"evaluate/runs/{system}.dev.trec"
  return evaluate.measured(trec.resolve().parent)[1]["RR@10"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
  directory = tmp_path_factory.mktemp("ablation")
  tiny.backbone(directory / "backbone", hidden=16, layers=1, heads=2)
  config = tiny.config(directory, train__evaluate_every=0, pretrain__evaluate_every=0, cross__evaluate_every=0,
                       evaluate__retrievers=(f"elsewhere={directory}/elsewhere",))  # fmt: skip
  like = {"pooling": "mean", "normalize": True, "passage_length": 32}  # as the baseline, which is compiled once
  Retriever.untuned(Backbone.load(config.backbone.path), **like).save(directory / "elsewhere")
  arms = ablate.chosen(NAMED, [OWN])
  with pytest.MonkeyPatch.context() as patch:
    built = runs.watch(patch)
    patch.setattr(page, "render", lambda *arguments, **options: "drawn elsewhere")
    ablate.ablate(config, directory / "work", arms, [0, 1], ONE_SEED, "RR@10")
  return Finished(config, arms, directory / "work", list(built))


def test_every_artefact_is_built_once(finished):
  assert len(finished.built) == len(set(finished.built))
  assert {str(ref) for ref in finished.built} == runs.stored(finished.workdir)
  # Round 1 of unm and the retriever under the cross-encoder are plain's, round 1 of dptdr is rip's.
  counts = runs.kinds(finished.built)
  assert (counts["corpus"], counts["bm25"], counts["pretrain"], counts["train"], counts["cross"]) == (1, 1, 1, 6, 2)


def test_rerun_builds_nothing_and_one_seed_leaves_out_runs(finished, monkeypatch):
  built, before = runs.watch(monkeypatch), finished.written()
  fewer = finished.again(finished.arms, [0, 1], (*ONE_SEED, "with a cross"))
  assert [fewer["dev"][arm]["seeds"] for arm in finished.arms] == [2, 1, 2, 1, 1]
  assert finished.again(finished.arms, [0, 1], ONE_SEED) == before and not built


def test_table_holds_what_the_runs_measured(finished):
  written = finished.written()
  assert written["reference"] == "plain" and written["arms"]["unm"]["rounds"] == 2
  table = written["dev"]
  baselines = ["BM25", "untuned backbone", "elsewhere", "pretrained backbone", "BM25 fused with the backbone"]
  fused = [f"{arm}, fused" for arm in finished.arms]
  assert sorted(table) == sorted([*baselines, *finished.arms, *fused, "with a cross, reranked"])
  assert table["BM25"]["means"]["RR@10"] == pytest.approx(finished.values("plain-0", "bm25").mean())
  values = {}
  for arm, system in (("plain", "train1"), ("unm", "train2")):
    by_seed = [finished.values(f"{arm}-{seed}", system) for seed in (0, 1)]
    values[arm] = np.mean(by_seed, axis=0)
    assert table[arm]["means"]["RR@10"] == pytest.approx(values[arm].mean())
    assert table[arm]["spread"] == pytest.approx(sorted(one.mean() for one in by_seed))
  assert table["unm"]["difference"]["p"] == measures.randomisation_test(values["unm"], values["plain"])
  assert "difference" not in table["plain"]
  counted = [table[name]["parameters"] for name in ("plain", "with a cross", "with a cross, reranked")]
  prompt, head = 2 * 4 * 16, counted[2] - 2 * counted[1]  # keys and values, P 4, H 16; of both models
  assert counted[:2] == [prompt, prompt] and 16 <= head < 16 * 40
  assert f"{table['unm']['means']['RR@10']:.4f}" in (finished.workdir / "ablation.md").read_text()
  assert "<svg" in (finished.workdir / "ablation.html").read_text()


def test_failing_arm_is_named_and_the_others_are_compared(finished, monkeypatch):
  started = run.run

  def fail(config: ConfigDict, workdir: pathlib.Path, **options):
    if workdir.name == "hot-0":
      raise DptdrError("step 3: loss nan")
    return started(config, workdir, **options)

  monkeypatch.setattr(run, "run", fail)
  arms = {"hot": {"train.learning_rate": 1e30}, "again": finished.arms["plain"], "unm": finished.arms["unm"]}
  with pytest.raises(DptdrError, match="^hot, seed 0 failed: step 3: loss nan$"):
    finished.again(arms, [0])
  written = finished.written()
  assert written["reference"] is None and {"again", "unm"} < written["dev"].keys() and "hot" not in written["dev"]
  assert "No differences: the first arm, hot" in (finished.workdir / "ablation.md").read_text()
  finished.again(finished.arms, [0, 1], ONE_SEED)


def test_compare_tests_each_system_against_the_first(finished):
  plain, unm = (str(finished.workdir / "runs" / name) for name in ("plain-0", "unm-0"))
  lines = compare.compare([plain, unm, f"{plain}:bm25"], "dev", ["RR@10"]).splitlines()
  values = [finished.values("plain-0", "train1"), finished.values("unm-0", "train2")]
  assert len(lines) == 4 and lines[2].startswith(f"| {unm} | RR@10 | {values[0].mean():.4f} | {values[1].mean():.4f} |")
  assert f"| {measures.randomisation_test(values[1], values[0]):.4f} |" in lines[2]
  assert len(compare.compare([plain, unm], "dev", []).splitlines()) == 4, "both measures"
  for named, wanted, message in (
    ([plain], [], "at least two systems"),
    ([plain, f"{unm}:train7"], [], "train7.*no such system"),
    ([plain, unm], ["R@3"], r"not measured in both: \['R@3'\]"),
    ([plain, str(finished.workdir)], [], "no evaluated run here"),
  ):
    with pytest.raises(InputError, match=message):
      compare.compare(named, "dev", wanted)


def test_every_named_arm_suits_a_config_with_options_that_some_have_no_use_for(finished):
  asked = Settings.of(finished.config).replace(**{
    "rounds": 2, "mine.cross_encoder": True, "cross.enabled": True,
    "train.sampling": "simans", "train.simans_source": "dense", "pretrain.enabled": True,
    "pretrain.tokenizer": "train",
  })  # fmt: skip
  for base in (Settings.of(finished.config), asked):
    for fields in ablate.ARMS.values():
      rules.check(ablate.configured(base, fields, 0))


@pytest.mark.parametrize(
  ("names", "own", "options", "message"),
  [
    (["plain"], [], {"measure": "Success@5"}, "Success@5"),
    (["plain"], [], {"one_seed": ["pain"]}, r"one_seed names no arm.*\['pain'\].*Arms: plain"),
    ([], ["b=-1: rounds=1", "b=+1: rounds=1"], {}, "two arms"),
    (["plain"], ["bad: train.sampling=best"], {}, "arm bad: unknown train.sampling: 'best'"),
    (["plain"], ["odd: prompt.lenth=8"], {}, "arm odd: no such setting: 'prompt.lenth'"),
    (["plain"], ["odd: prompt.length=eight"], {}, "arm odd: prompt.length .*: 'eight'"),
    (["plain"], ["few: rounds=1, evaluate.measures=('RR@10',)"], {}, "arm few: arms are compared by the measures"),
    (["plain"], ["odd: rounds=1, train.query_chunk=3, train.queries=40"], {}, "arm odd: train.query_chunk"),
    (["plain"], ["elsewhere: rounds=1"], {}, "one name"),
    (["nothing"], [], {}, "no such arm"),
    ([], [], {}, "no arms"),
    (["plain"], ["plain: rounds=1"], {}, "a name of its own"),
    ([], ["P8 prompt.length=8"], {}, "NAME: setting=value"),
    ([], ["P8: prompt.length"], {}, "setting=value"),
    (["plain", "plain"], [], {}, "named twice"),
    ([], ["BM25: rounds=1"], {}, "the table has a row of this name"),
    ([], ["s: seed=3"], {}, "seeds of an arm are those of --seeds"),
  ],
)
def test_wrong_arms_are_refused_before_any_work(finished, tmp_path, names, own, options, message):
  with pytest.raises(InputError, match=message):
    options = {"one_seed": [], "measure": "RR@10"} | options
    ablate.ablate(finished.config, tmp_path / "other", ablate.chosen(names, own), [0, 1], **options)
  assert not (tmp_path / "other").exists()


def test_folder_of_others_is_refused_untouched(finished, tmp_path):
  (tmp_path / "ablation.md").write_text("mine")
  with pytest.raises(InputError, match="not empty and not a dptdr_jax ablation of ours"):
    ablate.ablate(finished.config, tmp_path, finished.arms, [0], [], "RR@10")
  assert [path.name for path in tmp_path.iterdir()] == ["ablation.md"]


def test_values_of_an_arm_are_literals_or_strings():
  (fields,) = ablate.chosen([], ["x: evaluate.splits=('dev', 'test'), compute_dtype=float32, train.clip=0.5"]).values()
  assert fields == {"evaluate.splits": ("dev", "test"), "compute_dtype": "float32", "train.clip": 0.5}


@pytest.mark.parametrize("texts", [["a"], [], ["0", "1", "0"], ["1.5"]])
def test_wrong_seeds_are_refused(texts):
  with pytest.raises(InputError, match="seeds are whole numbers"):
    ablate.seeds_of(texts)
  assert ablate.seeds_of(["0", "12"]) == [0, 12]
