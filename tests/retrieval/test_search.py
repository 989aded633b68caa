"""Exact search and FAISS indexes against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from support.vectors import embeddings, gaussian, integers, same

from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval import index, search
from dptdr_jax.retrieval.index import Index
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retrieval.search import search_exact

COUNT, WIDTH, QUERIES = 1037, 16, 41


def by_hand(queries: np.ndarray, passages: np.ndarray, k: int) -> Run:
  run, rows = Run.empty(len(queries), k), np.tile(np.arange(len(passages)), (len(queries), 1))
  best = Run.ranked(rows, queries @ passages.T, k)
  run.rows[:, : best.depth], run.scores[:, : best.depth] = best.rows, best.scores
  return run


@pytest.mark.parametrize("k", [1, 10, 150, COUNT, COUNT + 9])
@pytest.mark.parametrize("block_rows", [64, 100, 5000])
@pytest.mark.parametrize("queries", [3, QUERIES])  # faiss computes few queries another way
def test_exact_search_with_ties_is_that_of_numpy(tmp_path, monkeypatch, k, block_rows, queries):
  monkeypatch.setattr(search, "_PASSAGES", block_rows)
  passages, queries = integers((COUNT, WIDTH), 0), integers((queries, WIDTH), 1)
  queries[0] = 0  # ties with everything
  expected = by_hand(queries, passages, k)
  for source in (passages, embeddings(tmp_path / "e", passages)):
    same(search_exact(queries, source, k), expected)


def test_exact_search_of_real_numbers(tmp_path, monkeypatch):
  monkeypatch.setattr(search, "_PASSAGES", 100)
  passages, queries = gaussian((COUNT, WIDTH), 0), gaussian((QUERIES, WIDTH), 1)
  expected = by_hand(queries, passages, 20)
  got = search_exact(queries, embeddings(tmp_path / "e", passages, 256), 20)
  assert np.array_equal(got.rows, expected.rows)
  np.testing.assert_allclose(got.scores, expected.scores, rtol=1e-5)
  halves = search_exact(queries, embeddings(tmp_path / "h", passages, dtype="float16"), 20)
  np.testing.assert_allclose(halves.scores, expected.scores, atol=0.02)


def test_wrong_queries_are_named(tmp_path):
  passages = gaussian((20, WIDTH), 0)
  index = Index.build(embeddings(tmp_path / "e", passages))
  for find in (lambda q, k: search_exact(q, passages, k), index.search):
    with pytest.raises(InputError, match="passages have width 16"):
      find(np.zeros((2, 15), np.float32), 3)
    with pytest.raises(InputError, match="a query vector has a number that is not finite: 'row 1'"):
      find(np.array([[0.0], [np.nan]], np.float32) * np.ones(WIDTH, np.float32), 3)
    with pytest.raises(ValueError, match="not a depth"):
      find(np.zeros((2, WIDTH), np.float32), 0)


def test_passage_that_is_not_finite_is_named(monkeypatch):
  monkeypatch.setattr(search, "_PASSAGES", 6)
  passages = gaussian((20, WIDTH), 0)
  passages[13, 5] = np.inf
  with pytest.raises(InputError, match="a passage vector has a number that is not finite: 'row 13'"):
    search_exact(np.zeros((2, WIDTH), np.float32), passages, 3)


@pytest.mark.parametrize("k", [1, 30, COUNT + 5])
def test_flat_index_is_the_exact_search(tmp_path, monkeypatch, k):
  monkeypatch.setattr(index, "_PASSAGES", 128)
  monkeypatch.setattr(index, "_QUERIES", 7)
  passages, queries = integers((COUNT, WIDTH), 2), integers((QUERIES, WIDTH), 3)
  flat = Index.build(embeddings(tmp_path / "e", passages))
  same(flat.search(queries, k), by_hand(queries, passages, k))


@pytest.mark.parametrize(
  ("factory", "parameters", "recall"),
  [
    ("IVF16,Flat", {"nprobe": 16}, 1.0),
    ("IVF16,PQ8", {"nprobe": 16}, 0.45),
    ("OPQ8,IVF16,PQ8", {"nprobe": 16}, 0.45),
    ("HNSW16", {"efSearch": 200}, 0.9),
  ],
)
def test_approximate_indexes_retrieve_save_and_load(tmp_path, factory, parameters, recall):
  passages, queries = gaussian((COUNT, WIDTH), 0), gaussian((QUERIES, WIDTH), 1)
  stored = embeddings(tmp_path / "e", passages)
  index = Index.build(stored, factory, sample=700)
  index.save(tmp_path / "i")
  loaded = Index.load(tmp_path / "i")
  assert loaded.manifest == index.manifest
  assert (loaded.manifest["factory"], loaded.manifest["source"], len(loaded)) == (factory, {"made": "here"}, COUNT)
  again = [] if "HNSW" in factory else [Index.build(stored, factory, sample=700)]
  for some in (index, loaded, *again):
    some.set_parameters(parameters)
  run = index.search(queries, 10)
  truth = by_hand(queries, passages, 10)
  share = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(run.rows, truth.rows, strict=True)])
  assert share >= recall
  for other in (loaded, *again):
    assert np.array_equal(other.search(queries, 10).rows, run.rows)
  assert (np.diff(run.scores, axis=1) <= 0).all()


@pytest.mark.parametrize("factory", ["IVF16,Flat", "HNSW16", "Flat"])
def test_missing_results_are_fills_at_the_end(tmp_path, factory):
  index = Index.build(embeddings(tmp_path / "e", gaussian((100, WIDTH), 0)), factory)  # IVF probes one list
  run = index.search(gaussian((5, WIDTH), 1), 200)
  counts = run.counts()
  assert run.rows.shape == (5, 200)
  assert (counts <= 100).all() and (counts >= 1).all()
  for query, count in enumerate(counts):
    assert (run.rows[query, :count] >= 0).all() and (run.rows[query, count:] == -1).all()
    assert (run.scores[query, count:] == -np.inf).all()
    assert len(set(run.rows[query, :count].tolist())) == count


def test_bad_factories_and_parameters_are_named(tmp_path):
  stored = embeddings(tmp_path / "e", gaussian((100, WIDTH), 0))
  for factory, says in (("Flut", "'Flut'"), ("IVF4,PQ5", "PQ5"), ("IDMap,Flat", "'IDMap,Flat'")):
    for refuse in (lambda name: Index.build(stored, name), lambda name: Index.check(WIDTH, name, {})):
      with pytest.raises(InputError, match=says):
        refuse(factory)
  with pytest.raises(InputError, match="cannot train on 100 passages"):
    Index.build(stored, "IVF512,Flat")
  for name in ("efSearch", "ht"):
    with pytest.raises(InputError, match=f"'{name}'"):
      Index.check(WIDTH, "IVF4,Flat", {name: 3})
  with pytest.raises(InputError, match="nprobe is not a whole number"):
    Index.check(WIDTH, "IVF4,Flat", {"nprobe": 0})


def test_damage_names_the_file(tmp_path):
  index, directory = Index.build(embeddings(tmp_path / "e", gaussian((100, WIDTH), 0)), "IVF4,Flat"), tmp_path / "i"
  index.save(directory)
  path, whole = directory / "index.faiss", (directory / "index.faiss").read_bytes()
  flipped = [whole[:at] + bytes([whole[at] ^ 128]) + whole[at + 1 :] for at in (0, 7, 15)]  # kind, width, passages
  for damaged in (whole[: len(whole) // 2], whole[:9], b"", *flipped, None):
    path.unlink() if damaged is None else path.write_bytes(damaged)
    with pytest.raises(InputError) as error:
      Index.load(directory)
    assert error.value.path == path
  index.save(directory)
  for text in ("[]", '{"format": 99}', (directory / "manifest.json").read_text().replace("100", "101")):
    (directory / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json: "):
      Index.load(directory)
  with pytest.raises(InputError, match="no such file"):
    Index.load(tmp_path / "none")
