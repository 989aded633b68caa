"""Which artefacts another setting makes again, and which stay."""

from __future__ import annotations

import shutil

import pytest
from support import runs, tiny


@pytest.fixture(scope="module")
def usual(whole):
  """The run of two rounds without what it mines while round 1 trains, and its artefacts."""
  made = whole.change(train__refresh_every=0)
  return made, made.plan()


def new(usual, **fields) -> tuple[set[str], set[str]]:
  """Links and kinds of the artefacts that another value makes again."""
  made, before = usual
  nodes = [node for ref, node in made.change(**fields).plan().nodes.items() if ref not in before.nodes]
  return {link for node in nodes for link in node.links}, {node.kind.name for node in nodes}


def runs_of(*systems: str) -> set[str]:
  return {f"evaluate/runs/{system}.{split}.trec" for system in systems for split in ("dev", "test")}


RESULTS = {"results.json", "report.html", "summary.json"}
LATER = {"train2", "retriever", *runs_of("train2", "fused", "reranked"), "recommended.json", *RESULTS}


def test_changed_margin_reuses_encoded_vectors(usual):
  links, kinds = new(usual, mine__dense__relative_margin=0.9)
  assert links == {"mine1", *LATER}
  first = {node.ref for node in usual[1].nodes.values() if node.stage == "mine1" and node.kind.name == "dense_run"}
  assert first <= set(usual[0].change(mine__dense__relative_margin=0.9).plan().nodes)
  assert "bm25_run" not in kinds


@pytest.mark.parametrize(
  "fields",
  [{"mine__dense__depth": 10}, {"mine__negative_below": 0.4}, {"mine__sources": ("dense",)}],
)
def test_what_mining_with_a_retriever_reads_changes_no_first_round(usual, fields):
  assert new(usual, **fields)[0] == {"mine1", *LATER}


def test_negatives_of_round_1_change_all_that_is_trained(usual):
  links, kinds = new(usual, mine__bm25__depth=5)
  assert links == {"mine0", "mine1", "cross", "train1", *runs_of("train1"), *LATER}
  assert not kinds & {"pretrain", "tokens", "bm25", "file_run"}


def test_another_measure_searches_nothing_again(usual):
  links, kinds = new(usual, evaluate__measures=("RR@10", "R@5"))
  assert kinds == {"measures", "recommended", "report"}
  assert {link for link in links if not link.startswith("evaluate")} == {"recommended.json", *RESULTS}


def test_another_split_encodes_the_corpus_no_second_time(usual, tmp_path):
  data = shutil.copytree(usual[0].config.data.dir, tmp_path / "data")
  shutil.copy(data / "qrels/dev.tsv", data / "qrels/more.tsv")
  made = usual[0].change(data__dir=str(data), evaluate__splits=("dev", "test", "more"))
  later = [node for ref, node in made.plan().nodes.items() if ref not in usual[1].nodes and ref.kind == "vectors"]
  assert len(later) == 7 and {node.inputs.split for node in later} == {"more"}


def test_another_place_of_the_same_files_changes_the_report_alone(usual, tmp_path):
  for name in ("data", "backbone"):
    shutil.copytree(getattr(usual[0].config, name)["dir" if name == "data" else "path"], tmp_path / name)
  (tmp_path / "backbone/README.md").write_text("not read")
  links, kinds = new(usual, data__dir=str(tmp_path / "data"), backbone__path=str(tmp_path / "backbone"))
  assert kinds == {"report"} and links == RESULTS


@pytest.mark.parametrize(
  ("usual_fields", "fields"),
  [
    ({"rounds": 2}, {"mine__negative_below": 0.05, "mine__positive_above": 0.95, "cross__depth": 9}),
    ({"rounds": 0}, {"data__train_split": "none", "train__steps": 9, "mine__bm25__depth": 9, "prompt__length": 9}),
    ({}, {"pretrain__vocabulary": 999, "pretrain__learning_rate": 1.0, "index__device_dtype": "bfloat16"}),
  ],
)
def test_what_is_not_read_makes_nothing_again(tmp_path, usual_fields, fields):
  made = runs.Run(tiny.config(tmp_path, **usual_fields), tmp_path / "work")
  assert list(made.change(**fields).plan().nodes) == list(made.plan().nodes)


def test_stages_and_their_artefacts(usual, tmp_path):
  def stages(**fields):
    return runs.Run(tiny.config(tmp_path, **fields), tmp_path / "work").plan().stages

  assert stages() == ["prepare", "mine0", "train1", "encode", "evaluate", "report"]
  assert stages(train__passages=1) == ["prepare", "train1", "encode", "evaluate", "report"], "no negative is drawn"
  assert stages(rounds=0) == ["prepare", "encode", "evaluate", "report"]
  assert stages(rounds=0, evaluate__baselines=("bm25",)) == ["prepare", "evaluate", "report"]
  assert usual[1].stages == ["prepare", "pretrain", "mine0", "train1", "cross", "mine1", "train2", "encode",
                             "evaluate", "report"]  # fmt: skip
  kinds = [node.kind.name for node in usual[1].nodes.values()]
  assert kinds.count("bm25") == kinds.count("span_tokens") == kinds.count("pretrain") == 1
