"""Nothing is forgotten: each setting and each file from outside makes again what depends on it, and nothing else."""

from __future__ import annotations

import fnmatch
import json
import pathlib
import shutil

import pytest
from support import formats, runs, tiny

from dptdr_jax import Backbone, Retriever
from dptdr_jax.core.fingerprints import Fingerprints
from dptdr_jax.core.store import is_neutral, refs_of
from dptdr_jax.pipeline import reference
from dptdr_jax.pipeline.graph import Graph
from dptdr_jax.pipeline.outside import Outside
from dptdr_jax.settings import Settings, declared

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table():
  return reference.changes()


def test_table_in_docs_is_the_generated_one(table, monkeypatch):
  monkeypatch.setattr(reference, "changes", lambda: table)
  assert (ROOT / "docs/configuration.md").read_text() == reference.document()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with all files that the settings of this test may name."""
  directory = tmp_path_factory.mktemp("settings")
  data = formats.nq(tiny.beir(directory / "data"))
  for split in ("test", "trainx", "devx"):
    shutil.copy(data / "qrels/dev.tsv", data / f"qrels/{split}.tsv")
  tiny.backbone(directory / "backbone")
  for name in ("data", "backbone"):
    shutil.copytree(directory / name, directory / f"{name}x")
  for name in ("a", "b"):
    (directory / f"{name}.trec").write_text(f"q1 Q0 p1 1 9 {name}\n")
  shutil.copytree(ROOT / "tests/fixtures/golden/bert_prefix", directory / "saved")
  return directory


def test_setting_changes_what_the_table_says_and_what_is_made_from_it(place, table):
  outside = Outside(Fingerprints(place / "inputs.json"))
  changed = {name: set() for name in table}

  def nodes(settings):
    names = (f"{place}/{pathlib.Path(path).name}" for path in settings.mine.runs)
    return Graph(settings.replace(**{"mine.runs": tuple(names)}), outside).nodes

  for mode in reference.MODES.values():
    settings = Settings().replace(**{"data.dir": f"{place}/data", "backbone.path": f"{place}/backbone"}, **mode)
    before = nodes(settings)
    for name, info in declared():
      if name == "data.download":
        continue  # it would
      value = reference.other_value(name, info, settings.get(name))
      value = (f"other={place}/saved",) if name == "evaluate.retrievers" else value
      after = nodes(settings.replace(**{name: value}))
      new = {ref: node for ref, node in after.items() if ref not in before}
      for ref, node in new.items():
        assert ref.kind in table[name] or any(one in new for one in refs_of(node.inputs)), (name, ref)
      changed[name] |= {ref.kind for ref in {*before, *after} if (ref in before) != (ref in after)}
      if is_neutral(info) and not table[name]:
        assert list(after) == list(before), name
  assert not {name: kinds for name in table if (kinds := set(table[name]) - changed[name])}


# Artefacts that have no link; some candidates have one.
UNSEEN = {"tokens", "span_tokens", "bm25", "bm25_run", "file_run", "vectors", "index", "dense_run", "pair_scores"}
TEXT = (
  "prepare/*",
  "mine0",
  "evaluate/runs/bm25.*",
  "evaluate/runs/elsewhere.*",
)  # which hashes its backbone
NOT_TRAIN = ("prepare/corpus", "prepare/splits/dev", "prepare/splits/test", "pretrain",
             *(f"evaluate/runs/{name}.*" for name in ("bm25", "*backbone*", "pretrain*", "elsewhere")))  # fmt: skip


@pytest.mark.parametrize(
  ("name", "old", "new", "links", "kinds"),
  [
    ("backbone/model.safetensors", "", "", TEXT, {"tokens", "span_tokens", "bm25", "bm25_run", "file_run"}),
    ("backbone/config.json", "1e-12", "1e-11", TEXT, {"tokens", "span_tokens", "bm25", "bm25_run", "file_run"}),
    ("backbone/config.json", '"gelu"', '"relu"', TEXT, {"tokens", "span_tokens", "bm25", "bm25_run", "file_run"}),
    ("backbone/tokenizer.json", '"merge"', '"mErge"', TEXT, {"bm25", "bm25_run", "file_run"}),
    ("data/corpus.jsonl", " s", " t", (), set()),
    ("data/queries.jsonl", " s", " t", ("prepare/corpus",), {"span_tokens", "bm25"}),
    ("data/qrels/train.tsv", "\t1\n", "\t2\n", NOT_TRAIN, {"span_tokens", "bm25"}),
    ("data/qrels/dev.tsv", "\t1\n", "\t2\n",  # pretraining is tried on it
     ("prepare/corpus", "prepare/splits/t*", "mine0", *(f"evaluate/runs/{name}.test.trec" for name in
      ("bm25", "backbone*", "elsewhere"))), {"span_tokens", "bm25", "file_run"}),
    ("data/qrels/test.tsv", "\t1\n", "\t2\n",
     ("prepare/corpus", "prepare/splits/train", "prepare/splits/dev", "pretrain", "mine?", "cross", "train?",
      "retriever", "evaluate/runs/*.dev.trec"), {"span_tokens", "bm25", "file_run", "index"}),
    ("other.trec", "Q0", "Q1", (*NOT_TRAIN, "prepare/*"), {"tokens", "span_tokens", "bm25", "bm25_run"}),
    ("elsewhere/retriever.json", "48", "49",
     ("prepare/*", "pretrain", "mine?", "cross", "train?", "retriever",
      *(f"evaluate/runs/{name}.*" for name in ("bm25", "backbone*", "pretrain*", "train?", "fused*", "reranked"))),
     {"tokens", "span_tokens", "bm25", "bm25_run", "file_run", "pair_scores"}),
  ],
)  # fmt: skip
def test_changed_file_changes_what_depends_on_it_under_verify(whole, tmp_path, name, old, new, links, kinds):
  directory = whole.workdir.parent
  for part in ("data", "backbone", "elsewhere"):
    shutil.copytree(directory / part, tmp_path / part)
  shutil.copy(directory / "other.trec", tmp_path)
  made = runs.Run(runs.everything(tmp_path), tmp_path / "work")
  before = made.plan().nodes
  runs.rewrite(tmp_path / name, old, new)
  assert list(made.plan().nodes) == list(before), "size and time are as they were"
  after = made.plan(verify=True).nodes
  stays = {link for ref, node in before.items() if ref in after for link in node.links}
  everywhere = {link for node in before.values() for link in node.links}
  assert stays == {link for link in everywhere if any(fnmatch.fnmatch(link, pattern) for pattern in links)}
  gone = {ref.kind for ref in before if ref not in after}
  assert UNSEEN - gone == kinds


def test_changed_judgements_make_again_what_is_measured_by_them(whole, tmp_path, monkeypatch):
  shutil.copytree(whole.workdir.parent / "data", tmp_path / "data")
  made = whole.copy(tmp_path / "work").change(data__dir=str(tmp_path / "data"))
  built, there, stages = runs.watch(monkeypatch), runs.stored(made.workdir), ("prepare", "encode", "evaluate")
  new = {str(ref) for ref in made.plan().nodes} - there
  assert [name.partition("/")[0] for name in new] == ["report"], "a copy is the same input; the report names its place"
  line = (tmp_path / "data/qrels/test.tsv").read_text().splitlines()[1]
  query, passage, _ = line.split("\t")
  other = f"{passage[:-1]}{(int(passage[-1]) + 1) % 10}"
  runs.rewrite(tmp_path / "data/qrels/test.tsv", line, f"{query}\t{other}\t1")
  made.run(*stages)
  assert not built
  made.run(*stages, verify=True)
  new = runs.stored(made.workdir) - there
  assert new == {str(ref) for ref in built} == {str(r) for r in made.plan().nodes if r.kind != "report"} - there
  assert runs.kinds(built) == {"split": 1, "tokens": 1, "vectors": 7, "bm25_run": 1, "dense_run": 7, "pair_scores": 1,
                               "reranked_run": 1, "fused_run": 2, "measures": 11, "recommended": 1}  # fmt: skip


def test_config_of_a_backbone_that_format_1_did_not_hash_is_an_input(tmp_path):
  config = tiny.config(tmp_path, rounds=0, evaluate__baselines=(), evaluate__retrievers=(f"old={tmp_path}/old",))
  backbone = Backbone.load(tmp_path / "backbone")
  Retriever.untuned(backbone, passage_length=32).save(tmp_path / "old")
  about = json.loads((tmp_path / "old/retriever.json").read_text())
  about |= {"format": 1, "backbone": {"path": backbone.path, "hash": backbone.tensor_hash}}
  (tmp_path / "old/retriever.json").write_text(json.dumps(about))
  made = runs.Run(config, tmp_path / "work")
  before = {node.ref for node in made.nodes("vectors")}
  runs.rewrite(tmp_path / "backbone/config.json", '"gelu"', '"relu"')
  assert not before & {node.ref for node in made.plan(verify=True).nodes.values()}
