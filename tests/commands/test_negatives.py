"""`dptdr_jax.negatives`: a run's negatives for other trainers, and mining for vectors made elsewhere."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal

import fsspec
import numpy as np
import pytest
from commands.common import call, run_command
from support import forks, runs, tiny

from dptdr_jax.core.errors import InputError
from dptdr_jax.pipeline import export_negatives, mine
from dptdr_jax.pipeline.export_negatives import Vectors, export
from dptdr_jax.pipeline.export_negatives import mine as mine_vectors
from dptdr_jax.retrieval.candidates import Reason
from dptdr_jax.retrieval.qrels import Qrels


def read(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  directory = tmp_path_factory.mktemp("negatives")
  made = runs.Run(tiny.config(directory), directory / "work")
  made.run("prepare", "mine")
  return made.workdir


def test_exports_are_read_by_the_trainers_that_they_are_for(workdir, tmp_path):
  assert export(workdir, 0, tmp_path / "o/train.jsonl", "original", 0)["queries"] == 32
  lines = read(tmp_path / "o/train.jsonl")
  assert len(lines) == 32 and all(line["query"] and line["positives"] and line["negatives"] for line in lines)
  given = f"--workdir={workdir}", "--round=0", "--format=ntuples", "--count=3", f"--out={tmp_path}/n.jsonl"
  assert call(tmp_path / "said", "negatives", "export", *given)[0] == 0
  lines = read(tmp_path / "n.jsonl")
  assert lines and all(list(line) == ["anchor", "positive", "negative_1", "negative_2", "negative_3"] for line in lines)


def test_export_of_a_generation_with_pseudo_positives(workdir, tmp_path):
  copy, out = tmp_path / "work", tmp_path / "train.jsonl"
  shutil.copytree(workdir, copy, symlinks=True)
  place = copy / "train1/generations/2"  # as mined after step 2 of round 1
  shutil.copytree((workdir / "mine0").resolve(), place)
  reasons = np.load(place / "pool/reasons.npy")
  reasons[:, 0] = Reason.PSEUDO_POSITIVE
  np.save(place / "pool/reasons.npy", reasons)

  def exported(number: int, **options) -> list[dict]:
    export(copy, number, out, "original", 0, **options)
    return read(out)

  whole, without = exported(0), exported(1, generation=2)
  about = json.loads((place / "mining.json").read_text()) | {"pseudo_positives": True}
  (place / "mining.json").write_text(json.dumps(about))
  for before, left, line in zip(whole, without, exported(1, generation=2, separator=" | "), strict=True):
    assert left["positives"] == before["positives"] and left["negatives"] == before["negatives"][1:]
    assert line["positives"] == [text.replace(" ", " | ", 1) for text in (*before["positives"], before["negatives"][0])]


def test_missing_round_or_generation_names_those_that_are_there(workdir, tmp_path):
  with pytest.raises(InputError, match="round 3 of mining is not done here.*There are mine0"):
    export(workdir, 3, tmp_path / "x.jsonl", "original", 0)
  with pytest.raises(InputError, match="generation 5 of round 1 is not done here"):
    export(workdir, 1, tmp_path / "x.jsonl", "original", 0, generation=5)


@pytest.fixture
def vectors(tmp_path):
  """A directory with 50 passages (float16), 6 queries near the first of them, ids, and qrels of 5 queries."""
  generator = np.random.default_rng(0)
  passages = generator.standard_normal((50, 8)).astype(np.float16)
  np.save(tmp_path / "p.npy", passages)
  np.save(tmp_path / "q.npy", (passages[:6] + 0.1 * generator.standard_normal((6, 8))).astype(np.float32))
  (tmp_path / "ids.txt").write_text("".join(f"d{row}\n" for row in range(50)))
  judged = "".join(f"{row}\td{row}\t{grade}\n" for row, grade in enumerate((1, 1, 0, 1, 1)))
  (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
  return tmp_path


def test_mined_negatives_are_ranked_and_below_the_margin(vectors):
  both = Vectors(f"{vectors}/p.npy", f"{vectors}/ids.txt"), Vectors(f"{vectors}/q.npy")
  counts = mine_vectors(*both, vectors / "qrels.tsv", vectors / "out", depth=10, margin=0.5)
  assert (counts["queries"], counts["without a positive"]) == (4, 2)
  scores = both[1].matrix @ both[0].matrix.astype(np.float32).T
  for row, line in zip((0, 1, 3, 4), read(vectors / "out/negatives.jsonl"), strict=True):
    ranked = np.argsort(-scores[row])[:10]
    wanted = [f"d{passage}" for passage in ranked if passage != row and scores[row, passage] <= 0.5 * scores[row, row]]
    assert line["query"] == str(row) and line["negatives"] == wanted


def test_vectors_and_pools_may_be_remote(vectors, tmp_path, monkeypatch):
  monkeypatch.setenv("DPTDR_CACHE", str(tmp_path / "cache"))
  for place, out in ((vectors, tmp_path / "local"), (f"file://{vectors}", "memory://negatives/out")):
    both = Vectors(f"{place}/p.npy", f"{place}/ids.txt"), Vectors(f"{place}/q.npy")
    mine_vectors(*both, f"{place}/qrels.tsv", out, depth=10)
  memory = fsspec.filesystem("memory")
  for name in ("negatives.jsonl", "pool/rows.npy"):
    assert memory.cat(f"/negatives/out/{name}") == (tmp_path / "local" / name).read_bytes()


def stopped(given: list[str]) -> None:
  """The command, with SIGTERM in the middle of the search."""
  search = export_negatives.search_exact

  def stop(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return search(*arguments)

  export_negatives.search_exact = stop
  run_command("negatives", given)


def test_wrong_files_are_one_line_and_sigterm_has_its_own_status(vectors):
  both = [f"--passages={vectors}/p.npy", f"--queries={vectors}/q.npy", f"--passage_ids={vectors}/ids.txt"]
  command = ["mine", *both, f"--qrels={vectors}/qrels.tsv", f"--out={vectors}/out"]
  status, said = forks.Job(stopped, command, said=vectors / "stopped").end()
  assert status == 75 and "\nstopped: " in said and "Traceback" not in said, said
  (vectors / "qrels.tsv").write_text("0\td0\t1\n7\td1\t1\n")
  assert call(vectors / "said", "negatives", *command) == (2, f"error: {vectors}/qrels.tsv:2: unknown query id: '7'\n")
  np.savez(vectors / "p.npz", rows=np.zeros((2, 2)))
  for name, first, message in (
    ("p.npy", 10, r"0 ≤ first < depth ≤ 32767: \(10, 10\)"),
    ("p.npz", 0, "p.npz: a matrix of floats in a .npy file is wanted, not an archive"),
    ("qrels.tsv", 0, "qrels.tsv: not a .npy file"),
  ):
    given = Vectors(f"{vectors}/{name}"), Vectors(f"{vectors}/q.npy")
    with pytest.raises(InputError, match=message):
      mine_vectors(*given, vectors / "qrels.tsv", vectors / "x", depth=10, first=first)
  assert not (vectors / "out").exists() and not (vectors / "x").exists()


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_best_positive_score_does_not_depend_on_the_block(tmp_path, monkeypatch, block):
  generator = np.random.default_rng(1)
  for name, count in (("q", 9), ("p", 30)):
    np.save(tmp_path / f"{name}.npy", generator.standard_normal((count, 8)).astype(np.float32))
  queries, passages = (Vectors(f"{tmp_path}/{name}.npy") for name in "qp")
  judged = [(row, passage, int(passage != 7)) for row in (1, 2, 5, 8) for passage in range(row, 7 + row // 2)]
  qrels = Qrels.from_triples(*np.array([*judged, (0, 7, 0)]).T, 9)
  monkeypatch.setattr(mine, "_BLOCK", block)
  scores = queries.matrix @ passages.matrix.T
  wanted = [max((scores[row, at] for one, at, grade in judged if one == row and grade), default=np.nan)
            for row in range(9)]  # fmt: skip
  np.testing.assert_allclose(mine.positive_scores(queries, passages, qrels), wanted, rtol=1e-5)
