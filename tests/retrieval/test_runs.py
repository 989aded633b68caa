"""Runs in memory, as shards and as files."""

from __future__ import annotations

import gzip
import pathlib

import numpy as np
import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval import runs
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import Run, read_trec, write_msmarco, write_run, write_trec

PASSAGES = ["p-zero", "p-one", "p-two", "p-three"]
QUERIES = ["q0", "q1", "q2"]


def rows_of(names):
  return lambda ids: np.array([names.index(name) if name in names else -1 for name in ids])


KNOWN = rows_of(QUERIES), rows_of(PASSAGES), len(QUERIES)


@pytest.fixture
def run() -> Run:
  rows = np.array([[3, 0, 2], [-1, -1, -1], [1, 2, -1]], np.int32)
  scores = np.array([[1 / 3, 1e-20, -7.1], [-np.inf] * 3, [2.5, 2.5, -np.inf]], np.float32)
  return Run(rows, scores)


def same(a: Run, b: Run) -> bool:
  return np.array_equal(a.rows, b.rows) and np.array_equal(a.scores, b.scores)


def test_ranked_orders_by_score_then_row_with_fills_last():
  got = Run.ranked(np.array([[5, -1, 2, 9, 1]]), np.array([[1.0, 99.0, 3.0, 1.0, 3.0]]))
  assert got.rows.tolist() == [[1, 2, 5, 9, -1]]
  assert got.scores.tolist() == [[3.0, 3.0, 1.0, 1.0, -np.inf]]
  assert Run.ranked(np.array([[5, 4]]), np.array([[1.0, 1.0]]), 1).rows.tolist() == [[4]]
  assert got.counts().tolist() == [4]


def test_saved_run_is_opened_and_replaced(run, tmp_path):
  other = Run(run.rows[::-1].copy(), run.scores[::-1].copy())
  for some in (run, other, Run.empty(0, 3), Run.empty(2, 0)):
    some.save(tmp_path)
    got = Run.open(tmp_path)
    assert same(got, some) and (len(got), got.depth) == (len(some), some.depth)
    assert got.counts().tolist() == some.counts().tolist()


def test_search_in_shards_goes_on_and_reads_as_one_run(run, tmp_path):
  searched = []

  def search(queries: range) -> Run:
    searched.append(list(queries))
    return Run(run.rows[list(queries)], run.scores[list(queries)])

  got = write_run(tmp_path, 3, 3, search, size=2)
  (tmp_path / "scores-00001.npy").unlink()
  with pytest.raises(InputError, match=r"scores-00001\.npy: no such file"):
    Run.open(tmp_path)
  assert same(write_run(tmp_path, 3, 3, search, size=2), run) and searched == [[0, 1], [2], [2]]
  assert np.array_equal(got.rows[1:, :2], run.rows[1:, :2])
  (tmp_path / "manifest.json").write_text('{"kind": "run", "count": 3, "shard_rows": 2, "depth": "3"}')
  with pytest.raises(InputError, match=r"manifest\.json: depth must be a number"):
    Run.open(tmp_path)


def test_trec_round_trip_is_exact(run, tmp_path):
  write_trec(tmp_path / "a.trec", run, QUERIES, PASSAGES, "ours")
  lines = (tmp_path / "a.trec").read_text().splitlines()
  assert lines[0] == "q0 Q0 p-three 1 0.333333343 ours"
  assert len(lines) == 5
  by_line = [
    f"{QUERIES[query]} Q0 {PASSAGES[row]} {rank} {score:.9g} ours"
    for query in range(3)
    for rank, (row, score) in enumerate(zip(run.rows[query].tolist(), run.scores[query].tolist(), strict=True), 1)
    if row >= 0
  ]
  assert lines == by_line
  assert same(read_trec(tmp_path / "a.trec", *KNOWN), run)
  cut = read_trec(tmp_path / "a.trec", *KNOWN, depth=1)
  assert cut.rows.tolist() == [[3], [-1], [1]]


def test_msmarco_s_lines_are_query_passage_and_rank(run, tmp_path):
  write_msmarco(tmp_path / "a.tsv", run, QUERIES, PASSAGES)
  assert (tmp_path / "a.tsv").read_text().splitlines() == [
    "q0\tp-three\t1", "q0\tp-zero\t2", "q0\tp-two\t3", "q2\tp-one\t1", "q2\tp-two\t2"
  ]  # fmt: skip


def test_ids_with_format_signs_are_written_as_they_are(run, tmp_path):
  write_trec(tmp_path / "a", run, ["%s", "q", "{}"], ["a%d", "b%", "c", "d"], "100%")
  assert (tmp_path / "a").read_text().splitlines()[1] == "%s Q0 a%d 2 9.99999968e-21 100%"


def test_queries_are_written_in_blocks(tmp_path, monkeypatch):
  run = Run.ranked(np.arange(70).reshape(7, 10) % 13, np.random.default_rng(0).normal(size=(7, 10)))
  for name, size in (("whole", 100), ("blocks", 2)):
    monkeypatch.setattr(runs, "_QUERIES", size)
    write_trec(tmp_path / name, run, [f"q{i}" for i in range(7)], [f"p{i}" for i in range(13)], "x")
  assert (tmp_path / "whole").read_bytes() == (tmp_path / "blocks").read_bytes()


def test_gzip_is_read_and_a_byte_order_mark_is_not_part_of_the_first_id(run, tmp_path):
  write_trec(tmp_path / "plain", run, QUERIES, PASSAGES, "x")
  (tmp_path / "bom.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + (tmp_path / "plain").read_bytes()))
  assert same(read_trec(tmp_path / "bom.gz", *KNOWN), run)


def test_order_is_that_of_the_scores_in_full_precision(tmp_path):
  (tmp_path / "a").write_text("q0 Q0 p-two 1 1.00000001 x\nq0 Q0 p-one 2 1.000000009 x\n")  # equal in float32
  assert read_trec(tmp_path / "a", *KNOWN).rows[0].tolist() == [2, 1]


def test_lines_in_any_order_are_sorted(tmp_path):
  (tmp_path / "a").write_text("q2 Q0 p-two 1 1.0 x\nq0 Q0 p-two 2 5 x\n\nq2 Q0 p-one 9 1.0 x\nq0 Q0 p-one 1 6 x\n")
  assert read_trec(tmp_path / "a", *KNOWN).rows.tolist() == [[1, 2], [-1, -1], [1, 2]]


@pytest.mark.parametrize("depth", [None, 3, 1])
def test_long_file_is_read_block_by_block(tmp_path, monkeypatch, depth):
  rng = np.random.default_rng(0)
  passages = [f"p{row}" for row in range(40)]
  pairs = [(query, row) for query in range(5) for row in rng.choice(40, rng.integers(1, 12), replace=False)]
  scores = {pair: float(rng.integers(4)) for pair in pairs}  # many ties
  known = rows_of([f"q{query}" for query in range(6)]), rows_of(passages), 6
  for name, order in ("together", pairs), ("mixed", rng.permutation(pairs).tolist()):
    lines = [f"q{query} Q0 p{row} 1 {scores[query, row]} x\n" for query, row in map(tuple, order)]
    (tmp_path / name).write_text("".join(lines))
  monkeypatch.setattr(runs, "_BLOCK", 10**6)
  whole = read_trec(tmp_path / "together", *known, depth)
  assert whole.depth == (depth or max(np.bincount([query for query, _ in pairs]))) and whole.counts()[5] == 0
  monkeypatch.setattr(runs, "_BLOCK", 7)
  assert same(read_trec(tmp_path / "together", *known, depth), whole)
  assert same(read_trec(tmp_path / "mixed", *known, depth), whole)
  (tmp_path / "mixed").write_text("".join([*lines, lines[0]]))
  if depth is None:
    with pytest.raises(InputError, match=f"mixed:{len(lines) + 1}: passage is listed twice"):
      read_trec(tmp_path / "mixed", *known, depth)


@pytest.mark.parametrize(
  ("line", "says"),
  [
    ("q0 Q0 p-one 1 2.0", "5 columns where a TREC run has 6"),
    ("q0 Q0 p-one first 2.0 x", "rank is not a whole number"),
    ("q0 Q0 p-one -1 2.0 x", "rank is not a whole number"),
    ("q0 Q0 p-one 1 two x", "score is not a number"),
    ("q0 Q0 p-one 1 nan x", "score is not finite"),
    ("q0 Q0 p-one 1 1e39 x", "score is not finite"),
    ("q1 Q0 p-two 2 2.5 x", "the score is higher than that of an earlier rank"),
    ("q0 Q0 p-nine 1 2.0 x", "unknown passage id: 'p-nine'"),
    ("q1 Q0 p-one 7 9.0 x", "passage is listed twice"),
  ],
)
def test_bad_trec_lines_are_named(tmp_path, line, says):
  path = tmp_path / "bad.trec"
  path.write_text(f"q1 Q0 p-one 1 2.0 x\n{line}\nq2 Q0 p-one 1 2.0 x\n")
  with pytest.raises(InputError, match=says) as error:
    read_trec(path, *KNOWN)
  assert f"{path}:2: " in str(error.value)


def test_unknown_queries_are_skipped(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(runs, "_BLOCK", 2)  # one block has unknown ones alone
  caplog.set_level("INFO", "dptdr_jax")
  lines = [f"{query} Q0 {passage} 1 2.0 x\n" for query in ("q8", "q1", "q9") for passage in ("p-two", "p-one")]
  (tmp_path / "a.trec").write_text("".join(lines))
  assert read_trec(tmp_path / "a.trec", *KNOWN).rows.tolist() == [[-1, -1], [1, 2], [-1, -1]]
  (said,) = [record.getMessage() for record in caplog.records]
  assert said == f"{tmp_path}/a.trec: 2 queries are unknown here and skipped"
  (tmp_path / "b.trec").write_text("".join(lines[:2]))
  with pytest.raises(InputError, match="no query of this run is known here: 'q8'"):
    read_trec(tmp_path / "b.trec", *KNOWN)


def test_truncated_gzip_file_is_named(tmp_path):
  lines = "".join(f"q0 Q0 p-{i} {i} {np.sin(i)} x\n" for i in range(2000))
  whole = gzip.compress(lines.encode())
  (tmp_path / "a.gz").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(InputError, match=r"a\.gz:\d+: cannot be read any further"):
    read_trec(tmp_path / "a.gz", *KNOWN)


def test_failed_write_leaves_the_old_file(run, tmp_path):
  path = tmp_path / "a.trec"
  write_trec(path, run, QUERIES, PASSAGES, "first")
  before = path.read_text()
  with pytest.raises(IndexError):
    write_trec(path, run, QUERIES, PASSAGES[:2], "second")
  assert path.read_text() == before
  assert [file.name for file in pathlib.Path(tmp_path).iterdir()] == ["a.trec"]


def test_qrels_are_sorted_and_the_last_judgement_counts():
  qrels = Qrels.from_triples(np.array([2, 0, 2, 2]), np.array([7, 1, 3, 7]), np.array([1, 1, 2, 0]), 4)
  assert qrels.offsets.tolist() == [0, 1, 1, 3, 3]
  assert [part.tolist() for part in qrels.of(2)] == [[3, 7], [2, 0]]
  assert qrels.judged().tolist() == [0, 2]
  assert len(qrels) == 4
