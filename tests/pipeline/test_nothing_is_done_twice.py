"""Nothing is done twice: what rounds, tasks and starts have in common is made once."""

from __future__ import annotations

import collections
import json
import shutil

from support import runs


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


def test_second_task_on_one_corpus_encodes_it_no_second_time(whole, tmp_path, monkeypatch):
  made = whole.copy(tmp_path / "work")
  shutil.copytree(whole.config.data.dir, tmp_path / "data")
  lines = [json.loads(line) for line in (tmp_path / "data/queries.jsonl").read_text().splitlines()]
  for line in lines:
    line["text"] = " ".join(reversed(line["text"].split()))
  (tmp_path / "data/queries.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  for name in ("train", "dev"):
    path = tmp_path / f"data/qrels/{name}.tsv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
  other = made.change(data__dir=str(tmp_path / "data"), rounds=0, evaluate__splits=("dev",), pretrain__enabled=False,
                      cross__enabled=False, evaluate__other_poolings=(), evaluate__retrievers=())  # fmt: skip
  built = runs.watch(monkeypatch)
  graph = runs.Run(other.config, tmp_path / "other").run(store=made.workdir / "store")
  encoded = [graph.nodes[ref].inputs.split for ref in built if ref.kind == "vectors"]
  assert encoded == ["dev"] and not {"corpus", "bm25", "index"} & {ref.kind for ref in built}
  assert [graph.nodes[ref].inputs.split for ref in built if ref.kind == "tokens"] == ["dev"]
