"""BM25 against the formula and against bm25s' own index."""

from __future__ import annotations

import math

import bm25s
import numpy as np
import pytest
import Stemmer

from dptdr_jax.core import preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval import bm25
from dptdr_jax.retrieval.bm25 import Bm25

TEXTS = ["apple banana apple", "banana cherries", "the apple", "", "cherry cherry cherry apple", "durian"]


def build(texts, path, **options):
  return Bm25.build(iter(texts), path, **options)


def test_scores_are_those_of_the_formula(tmp_path):
  index = build(TEXTS, tmp_path / "i")
  run = index.search(["apples and cherry", "durian durian"], 4)
  # stemmed, without stop words: {apple 2, banana}, {banana, cherry}, {apple}, {}, {cherry 3, apple}, {durian}
  lengths, mean = [3, 2, 1, 0, 4, 1], 11 / 6

  def part(df, tf, row):
    idf = math.log(1 + (6 - df + 0.5) / (df + 0.5))
    return idf * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * lengths[row] / mean))

  expected = {4: part(3, 1, 4) + part(2, 3, 4), 1: part(2, 1, 1), 0: part(3, 2, 0), 2: part(3, 1, 2)}
  best = sorted(expected, key=lambda row: -expected[row])
  assert run.rows[0].tolist() == best
  np.testing.assert_allclose(run.scores[0], [expected[row] for row in best], rtol=1e-6)
  assert run.rows[1].tolist() == [5, -1, -1, -1]  # passages that share no token are left out
  assert run.scores[1, 0] == pytest.approx(2 * part(1, 1, 5))  # a token that is there twice counts twice
  assert (run.scores[1, 1:] == -np.inf).all()


def corpus(count: int) -> list[str]:
  generator = np.random.default_rng(1)
  words = np.array([f"word{i}" for i in range(60)])
  return [" ".join(words[generator.zipf(1.4, generator.integers(0, 9)) % 60]) for _ in range(count)]


@pytest.mark.parametrize("shard_rows", [7, 100, 1000])
def test_shards_rank_as_one_index_and_as_bm25s(tmp_path, shard_rows):
  texts, queries = corpus(300), corpus(40)
  index = build(texts, tmp_path / "i", shard_rows=shard_rows)
  run = index.search(queries, 20)

  def tokenized(some):
    return bm25s.tokenize(some, stopwords="en", stemmer=Stemmer.Stemmer("english"), return_ids=False)

  oracle = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
  oracle.index(tokenized(texts), show_progress=False)
  for query, tokens in enumerate(tokenized(queries)):
    scores = oracle.get_scores(tokens) if tokens else np.zeros(len(texts), np.float32)
    rows = run.rows[query][run.rows[query] >= 0]
    assert len(rows) == min(20, (scores > 0).sum())
    np.testing.assert_allclose(run.scores[query, : len(rows)], np.sort(scores)[::-1][: len(rows)], rtol=2e-6)
    np.testing.assert_allclose(run.scores[query, : len(rows)], scores[rows], rtol=2e-6)
  whole = build(texts, tmp_path / "whole").search(queries, 20)
  assert np.array_equal(run.rows, whole.rows)
  assert np.array_equal(run.scores, whole.scores)


def test_ties_are_ordered_by_row_across_rank_k_and_shards(tmp_path):
  index = build(["same text"] * 10 + ["same text same text"], tmp_path / "i", shard_rows=4)
  assert index.search(["text"], 3).rows[0, 1:].tolist() == [0, 1]
  assert index.search(["text"], 11).rows[0].tolist() == [10, *range(10)]


def test_same_corpus_gives_the_same_files(tmp_path):
  build(corpus(50), tmp_path / "a"), build(corpus(50), tmp_path / "b")
  for path in (tmp_path / "a").iterdir():
    assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_what_has_no_known_token_is_not_found(tmp_path):
  run = build(TEXTS, tmp_path / "i").search(["apple", "xylophone", ""], 50)
  assert run.rows.shape == (3, 50) and run.counts().tolist() == [3, 0, 0] and (run.rows[1:] == -1).all()
  assert build(["the", "and of"], tmp_path / "j").search(["the apple"], 2).rows.tolist() == [[-1, -1]]
  with pytest.raises(InputError, match="no passage"):
    build([], tmp_path / "none")


@pytest.mark.parametrize("name", ["data-00000.npy", "indices-00000.npy", "indptr-00000.npy", "vocabulary.json"])
def test_damage_names_the_file(tmp_path, name):
  build(TEXTS, tmp_path)
  path = tmp_path / name
  whole = path.read_bytes()
  for damaged in (whole[:-4], whole[:9], b"", whole.replace(b"(", b"[", 1), b"[1]", None):
    if damaged != whole:
      path.unlink() if damaged is None else path.write_bytes(damaged)
      with pytest.raises(InputError) as error:
        Bm25(tmp_path)
      assert error.value.path == path
  path.write_bytes(whole)
  for text in ('{"format": 0}', "[]", '{"format": 1, "kind": "bm25", "count": "6", "shard_rows": 9}'):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json: "):
      Bm25(tmp_path)


def test_interrupted_build_is_no_index_and_is_built_again(tmp_path, monkeypatch):
  monkeypatch.setattr(bm25, "_CHUNK", 2)
  build(TEXTS, tmp_path)
  read = []
  monkeypatch.setattr(preemption, "asked", lambda: len(read) > 3)
  with pytest.raises(preemption.Preempted, match="the BM25 index will be built again"):
    Bm25.build((read.append(row) or f"word{row}" for row in range(1000)), tmp_path)
  assert len(read) < 10
  with pytest.raises(InputError, match=r"manifest\.json: no such file"):
    Bm25(tmp_path)
  monkeypatch.undo()
  assert build(TEXTS, tmp_path).count == len(TEXTS) and not list(tmp_path.glob("postings*"))
