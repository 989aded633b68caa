"""Mining: pools hold what their sources rank, without positives and what rules remove."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support import runs, tiny

from dptdr_jax import Retriever
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.prepare import Corpus, Split
from dptdr_jax.pipeline import pools
from dptdr_jax.retrieval.candidates import Pool, Reason


def opened(made: runs.Run) -> tuple[Corpus, Split]:
  return Corpus(made.workdir / "prepare/corpus"), Split(made.workdir / "prepare/splits/train", "train")


def scores_of(retriever: Retriever, made: runs.Run) -> np.ndarray:
  """Inner products of all training queries and passages, float32 [Q, C]."""
  corpus, split = opened(made)
  queries = retriever.encode_queries([query.text for query in split.queries.read()])
  return queries @ retriever.encode_passages([(p.title, p.text) for p in corpus.passages.read()]).T


def test_pools_name_their_sources(whole):
  names = {number: Pool.open(whole.workdir / f"mine{number}/pool").names for number in (0, 1)}
  assert names == {0: ("bm25", "other.trec"), 1: ("bm25", "dense", "other.trec")}
  about = json.loads((whole.workdir / "mine1/mining.json").read_text())
  assert about["sources"] == list(names[1]) and len(about["examples"]) == 12
  removed = {step["rule"]: step["removed"] for step in about["denoising"]}
  assert removed["cross-encoder"]["CROSS_ENCODER"]["all"] > 0
  margins = [reasons["RELATIVE_MARGIN"]["all"] for reasons in removed.values() if "RELATIVE_MARGIN" in reasons]
  assert margins and margins[0] > 0


def test_pool_holds_the_best_of_the_retriever_and_no_positive(whole):
  pool, (_, split) = Pool.open(whole.workdir / "mine1/pool"), opened(whole)
  scores = scores_of(Retriever.load(whole.workdir / "train1/retriever"), whole)
  for query in range(len(pool)):
    positives = split.positives(query)
    assert not set(pool.rows[query].tolist()) & set(positives.tolist())
    known = (pool.rows[query] >= 0) & (pool.ranks[query, :, 1] >= 0)
    assert known.sum() >= 20 - len(positives)
    np.testing.assert_allclose(pool.scores[query, known, 1], scores[query, pool.rows[query, known]], atol=1e-4)
    assert pool.positive_scores[query, 1] == pytest.approx(scores[query, positives].max(), abs=1e-4)


def test_margin_removes_what_scores_near_the_positive(whole):
  candidates = Pool.open(whole.path(whole.nodes("candidates")[1]) / "pool")
  above = candidates.scores[:, :, 1] > 0.99 * candidates.positive_scores[:, None, 1]
  removed = candidates.reasons == Reason.RELATIVE_MARGIN
  same = np.isin(candidates.reasons, (Reason.SAME_TEXT, Reason.CONTAINS))
  np.testing.assert_array_equal(removed, above & (candidates.rows >= 0) & ~same)
  assert removed.any()


def test_pool_without_reasons_never_gives_removed_candidates_as_negatives(whole, tmp_path, monkeypatch):
  made = whole.copy(tmp_path / "work")
  node = made.node("mine1")
  (made.path(node) / "pool/reasons.npy").unlink()
  with pytest.raises(InputError, match=r"reasons\.npy: no such file"):
    Pool.open(made.path(node) / "pool")
  built = runs.watch(monkeypatch)
  made.run("mine")
  assert built == [node.ref]
  expected = np.load(whole.path(node) / "pool/reasons.npy")
  np.testing.assert_array_equal(np.load(made.path(node) / "pool/reasons.npy"), expected)


def test_negatives_have_the_scores_that_simans_wants_or_none(whole):
  pool = Pool.open(whole.workdir / "mine1/pool")
  for source in ("bm25", "dense", "absent.trec"):
    negatives = pools.PoolNegatives(pool, source)
    assert negatives.rows(3).tolist() == pool.candidates(3).tolist()
    assert hasattr(negatives, "scores") == (source in pool.names)
  scores, positive = pools.PoolNegatives(pool, "bm25").scores(3)
  expected = pool.candidate_scores(3, "bm25")
  np.testing.assert_array_equal(scores, expected[0])
  np.testing.assert_equal(positive, expected[1])


@pytest.fixture(scope="module")
def mined(tmp_path_factory):
  """A run with a pool of BM25 and of a run file alone, with a margin on the file."""
  directory = tmp_path_factory.mktemp("mined")
  config = tiny.config(directory, mine__runs_relative_margin=0.95, mine__same_text=False,
                       mine__runs=(str(directory / "bm25.0-of-1"),))  # fmt: skip
  made = runs.Run(config, directory / "work")
  (directory / "bm25.0-of-1").touch()  # a name that was once taken for a part of BM25's own search
  made.change(mine__runs=()).run("prepare")
  _, split = opened(made)
  positive = int(split.positives(0)[0])
  others = [row for row in range(9) if row not in split.positives(0)][:3]
  ranked = zip([others[0], positive, *others[1:]], (9, 8, 7.9, 7), strict=True)
  lines = [f"{split.ids[0]} Q0 p{row} 1 {score} other\n" for row, score in ranked]
  for number in (1, 2):
    other = next(row for row in range(9) if row not in split.positives(number))
    lines.append(f"{split.ids[number]} Q0 p{other} 1 9 other\n")
  (directory / "bm25.0-of-1").write_text("\ufeff" + "".join([*lines, "unjudged Q0 p0 1 9 other\n"]))
  made.run("prepare", "mine")
  return made, others


def test_run_file_is_a_source_whatever_its_name_and_first_bytes(mined):
  made, others = mined
  pool = Pool.open(made.workdir / "mine0/pool")
  assert pool.names == ("bm25", "bm25.0-of-1") and pool.manifest["unanswered"]["bm25.0-of-1"] == len(pool) - 3
  removed = pool.rows[0][pool.reasons[0] == Reason.RELATIVE_MARGIN]
  assert sorted(removed.tolist()) == others[:2] and not (pool.reasons[1:] == Reason.RELATIVE_MARGIN).any()


def test_source_that_misses_positives_is_warned_of(mined):
  warnings = json.loads((mined[0].workdir / "mine0/mining.json").read_text())["warnings"]
  assert [line for line in warnings if line.startswith("bm25.0-of-1") and "67%" in line]


def test_wrong_id_in_a_run_file_is_named_by_line(mined, tmp_path):
  made, split = mined[0].copy(tmp_path / "work"), opened(mined[0])[1]
  (tmp_path / "other.trec").write_text(f"{split.ids[0]} Q0 nowhere 1 9 other\n")
  with pytest.raises(InputError, match=f"^{tmp_path}/other.trec:1: unknown passage id: 'nowhere'"):
    made.change(mine__runs=(str(tmp_path / "other.trec"),)).run("mine")
