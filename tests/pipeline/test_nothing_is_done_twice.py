"""Nothing is done twice: what arms, seeds, rounds, tasks and starts have in common is made once."""

from __future__ import annotations

import collections
import json
import shutil

import pytest
from ml_collections import ConfigDict
from support import runs, tiny

from dptdr_jax import ablate
from dptdr_jax.core.store import Store
from dptdr_jax.pipeline import run
from dptdr_jax.reporting import page
from dptdr_jax.settings import Settings


def test_rerun_builds_nothing_and_ends_with_the_table(whole, tmp_path, monkeypatch, capsys):
  made, built = whole.copy(tmp_path / "work"), runs.watch(monkeypatch)
  before = {path: path.stat().st_mtime_ns for path in made.workdir.glob("store/*/*/*") if path.is_file()}
  made.run()
  assert not built and before == {path: path.stat().st_mtime_ns for path in before}
  said = capsys.readouterr().out
  assert "trained retriever, round 2" in said and f"report: {made.workdir}/report.html" in said


def test_everything_of_a_run_is_built_once(whole):
  nodes = whole.plan().nodes
  assert runs.stored(whole.workdir) == {str(ref) for ref in nodes}
  kinds = collections.Counter(ref.kind for ref in nodes)
  assert kinds["corpus"] == kinds["bm25"] == kinds["pretrain"] == kinds["span_tokens"] == kinds["cross"] == 1
  assert kinds["tokens"] == 4, "corpus, train, dev, test"
  corpus = [node for node in whole.nodes("vectors") if not node.inputs.split]
  assert len(corpus) == 7, "two backbones by two poolings, two rounds, and the saved one"


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
  """(directory, config, arms, what was built) of five arms with two seeds."""
  directory = tmp_path_factory.mktemp("ablated")
  tiny.backbone(directory / "backbone", hidden=16, layers=1, heads=2)
  config = tiny.config(directory, train__steps=1, train__evaluate_every=0, pretrain__steps=1,
                       pretrain__evaluate_every=0, mine__dense__depth=10)  # fmt: skip
  arms = ablate.chosen(["plain", "rip", "unm", "dptdr", "unm-bm25"], [])
  with pytest.MonkeyPatch.context() as patch:
    built = runs.watch(patch)
    patch.setattr(page, "render", lambda *arguments, **options: "drawn elsewhere")
    ablate.ablate(config, directory / "work", arms, [0, 1], [], "RR@10")
  return directory, config, arms, built


def test_five_arms_with_two_seeds_build_every_artefact_once(ablated):
  directory, config, arms, built = ablated
  store, keys = Store(directory / "work/store"), set()
  for fields in arms.values():
    for seed in (0, 1):
      keys |= set(run.plan(ablate.configured(Settings.of(config), fields, seed), store).nodes)
  assert len(built) == len(set(built)) and set(built) == keys
  count = runs.kinds(built)
  assert (count["corpus"], count["bm25"], count["candidates"]) == (1, 1, 1 + 2 * 2), "BM25's pool is one"
  assert (count["pretrain"], count["train"]) == (2, 2 * (2 + 3)), "unm and unm-bm25 begin as plain does, dptdr as rip"
  written = json.loads((directory / "work/ablation.json").read_text())
  assert set(arms) <= set(written["dev"]) and written["dev"]["unm"]["seeds"] == 2


def test_second_task_on_one_corpus_encodes_it_no_second_time(ablated, tmp_path, monkeypatch):
  directory, config, _, _ = ablated
  shutil.copytree(directory / "data", tmp_path / "data")
  lines = [json.loads(line) for line in (tmp_path / "data/queries.jsonl").read_text().splitlines()]
  for line in lines:
    line["text"] = " ".join(reversed(line["text"].split()))
  (tmp_path / "data/queries.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  for name in ("train", "dev"):
    path = tmp_path / f"data/qrels/{name}.tsv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
  other = config.copy_and_resolve_references()
  other.update_from_flattened_dict({"data.dir": str(tmp_path / "data"), "rounds": 0})
  built = runs.watch(monkeypatch)
  graph = runs.Run(ConfigDict(other.to_dict()), tmp_path / "other").run(store=directory / "work/store")
  encoded = [graph.nodes[ref].inputs.split for ref in built if ref.kind == "vectors"]
  assert encoded == ["dev"] and not {"corpus", "bm25", "index"} & {ref.kind for ref in built}
  assert [graph.nodes[ref].inputs.split for ref in built if ref.kind == "tokens"] == ["dev"]
