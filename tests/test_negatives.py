"""The two commands that hand negatives over: export of a run's pool, mining for vectors from elsewhere."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys

import fsspec
import numpy as np
import pytest
from test_rounds import make_config

from dptdr_jax import pipeline
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.sources.original_jsonl import OriginalJsonl
from dptdr_jax.retrieval.candidates import Reason
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.stages import handover, sources


def call(*arguments: str) -> tuple[int, str]:
  """Runs the command: exit status and what it says of errors."""
  command = [sys.executable, "-m", "dptdr_jax.negatives", *arguments]
  ended = subprocess.run(command, capture_output=True, text=True, check=False)
  return ended.returncode, ended.stderr


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  directory = tmp_path_factory.mktemp("handover")
  config = make_config(directory, rounds=1, train__negatives="bm25")
  pipeline.run(config, directory / "work", ["prepare", "mine"])
  return directory / "work"


def test_the_exports_are_read_as_they_are_meant(workdir, tmp_path):
  assert handover.export(workdir, 0, tmp_path / "o/train.jsonl", "original", 0)["queries"] == 32
  source = OriginalJsonl(tmp_path / "o")
  assert len(list(source.queries("train"))) == 32
  out = f"--out={tmp_path}/n.jsonl"
  assert call("export", f"--workdir={workdir}", "--round=0", "--format=ntuples", "--count=3", out)[0] == 0
  lines = [json.loads(line) for line in (tmp_path / "n.jsonl").read_text().splitlines()]
  assert lines and all(list(line) == ["anchor", "positive", "negative_1", "negative_2", "negative_3"] for line in lines)


def test_what_was_mined_while_training_and_pseudo_positives_are_exported(workdir, tmp_path):
  copy = tmp_path / "work"
  shutil.copytree(workdir, copy)
  shutil.copytree(copy / "mine0", copy / "train1/generations/2")
  path = copy / "train1/generations/2/pool/reasons.npy"
  reasons = np.load(path)
  reasons[:, 0] = Reason.PSEUDO_POSITIVE
  np.save(path, reasons)

  def exported(**options) -> list[dict]:
    handover.export(copy, options.pop("number", 1), tmp_path / "train.jsonl", "original", 0, **options)
    return [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]

  usual, without = exported(number=0), exported(generation=2)
  about = copy / "train1/generations/2/mining.json"
  about.write_text(json.dumps(json.loads(about.read_text()) | {"pseudo_positives": True}))
  for before, left, line in zip(usual, without, exported(generation=2, separator=" | "), strict=True):
    assert left["positives"] == before["positives"] and left["negatives"] == before["negatives"][1:]
    assert line["positives"] == [text.replace(" ", " | ", 1) for text in (*before["positives"], before["negatives"][0])]


def test_a_round_that_is_not_there(workdir, tmp_path):
  with pytest.raises(InputError, match="round 3 of mining is not done here.*There are mine0"):
    handover.export(workdir, 3, tmp_path / "x.jsonl", "original", 0)
  with pytest.raises(InputError, match="generation 5 of round 1 is not done here"):
    handover.export(workdir, 1, tmp_path / "x.jsonl", "original", 0, generation=5)


def test_vectors_and_pools_on_a_remote(tmp_path, monkeypatch):
  monkeypatch.setenv("DPTDR_CACHE", str(tmp_path / "cache"))
  passages = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
  np.save(tmp_path / "p.npy", passages)
  np.save(tmp_path / "q.npy", passages[:6])
  (tmp_path / "qrels.tsv").write_text("".join(f"{row}\t{row}\t1\n" for row in range(5)))
  places = tmp_path, f"file://{tmp_path}"
  for place, out in zip(places, (tmp_path / "local", "memory://negatives/out"), strict=True):
    vectors = handover.Vectors(f"{place}/p.npy"), handover.Vectors(f"{place}/q.npy")
    counts = handover.mine(*vectors, f"{place}/qrels.tsv", out, depth=10)
    assert (counts["queries"], counts["without a positive"], counts["positives removed"]) == (5, 1, 5)
  memory = fsspec.filesystem("memory")
  assert memory.cat("/negatives/out/negatives.jsonl") == (tmp_path / "local/negatives.jsonl").read_bytes()
  assert memory.cat("/negatives/out/pool/rows.npy") == (tmp_path / "local/pool/rows.npy").read_bytes()


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_the_best_positive_s_score_whatever_is_scored_at_a_time(tmp_path, monkeypatch, block):
  generator = np.random.default_rng(1)
  for name, count in (("q", 9), ("p", 30)):
    np.save(tmp_path / f"{name}.npy", generator.standard_normal((count, 8)).astype(np.float32))
  queries, passages = (handover.Vectors(f"{tmp_path}/{name}.npy") for name in "qp")
  judged = [(row, passage, int(passage != 7)) for row in (1, 2, 5, 8) for passage in range(row, 7 + row // 2)]
  found = Qrels.from_triples(*np.array([*judged, (0, 7, 0)]).T, 9)
  monkeypatch.setattr(sources, "_BLOCK", block)
  scores = queries.matrix @ passages.matrix.T
  wanted = [max((scores[row, at] for one, at, grade in judged if one == row and grade), default=np.nan)
            for row in range(9)]  # fmt: skip
  np.testing.assert_allclose(sources.positive_scores(queries, passages, found), wanted, rtol=1e-5)


def test_vectors_from_elsewhere(tmp_path):
  generator = np.random.default_rng(0)
  passages = generator.standard_normal((50, 8)).astype(np.float32)
  queries = passages[:6] + 0.1 * generator.standard_normal((6, 8)).astype(np.float32)
  np.save(tmp_path / "p.npy", passages.astype(np.float16))
  np.save(tmp_path / "q.npy", queries)
  (tmp_path / "ids.txt").write_text("".join(f"d{row}\n" for row in range(50)))
  judged = "".join(f"{row}\td{row}\t{grade}\n" for row, grade in enumerate((1, 1, 0, 1, 1)))
  (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)  # of the last one nothing is known
  command = ["mine", f"--passages={tmp_path}/p.npy", f"--queries={tmp_path}/q.npy", f"--qrels={tmp_path}/qrels.tsv",
             f"--passage_ids={tmp_path}/ids.txt", f"--out={tmp_path}/out", "--depth=10",
             "--relative_margin=0.5"]  # fmt: skip
  assert call(*command)[0] == 0
  lines = [json.loads(line) for line in (tmp_path / "out/negatives.jsonl").read_text().splitlines()]
  scores = queries @ passages.astype(np.float16).astype(np.float32).T
  for row, line in zip((0, 1, 3, 4), lines, strict=True):
    ranked = np.argsort(-scores[row])[:10]
    wanted = [f"d{passage}" for passage in ranked if passage != row and scores[row, passage] <= 0.5 * scores[row, row]]
    assert line["query"] == str(row) and line["negatives"] == wanted
  status, said = call(*command, "--first=10", f"--out={tmp_path}/other")
  assert status == 2 and "0 ≤ first < depth ≤ 32767: (10, 10)" in said and not (tmp_path / "other").exists()
  # SIGTERM in the middle of the search
  code = (
    "import os, sys; from absl import app; from dptdr_jax import negatives; from dptdr_jax.stages import handover\n"
    "search = handover.search_exact\n"
    f"handover.search_exact = lambda *given: (os.kill(os.getpid(), {int(signal.SIGTERM)}), search(*given))\n"
    "negatives.define(); app.run(negatives.main)"
  )
  ended = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
  assert ended.returncode == 75 and "stopped by SIGTERM: the search will begin again; run" in ended.stderr
  (tmp_path / "qrels.tsv").write_text("0\td0\t1\n7\td1\t1\n")
  status, said = call(*command)
  assert status == 2 and "qrels.tsv:2: unknown query id: '7'" in said
