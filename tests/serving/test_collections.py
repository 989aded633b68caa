"""Documents on disk and in PostgreSQL: rankings equal the library's, nothing stale is served or lost."""

import functools
import json

import numpy as np
import pytest
from support import tiny

from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval.bm25 import Bm25
from dptdr_jax.retrieval.search import search_exact
from dptdr_jax.serving import search
from dptdr_jax.serving.collections import Made, Progress, Ranked, StaleModel, StorageError
from dptdr_jax.serving.documents import Document, check_filter, from_json, from_line
from dptdr_jax.serving.embedded import EmbeddedDocuments
from dptdr_jax.serving.lexical import Bm25Index
from dptdr_jax.serving.search import VectorIndex

WIDTH = 16


def document(row: int, seed: int = 0) -> Document:
  topic, text = tiny.sentences(row + 1, 12, 100 * seed + row)[row]
  return Document(f"d{row}", text, topic, {"topic": topic, "row": row})


def vectors(count: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


@pytest.fixture(params=["embedded", "postgres"])
def opened(request, tmp_path):
  """Opens the documents of one implementation, again with each call."""
  exact = request.param == "embedded"
  if exact:
    make = functools.partial(EmbeddedDocuments, tmp_path / "documents.sqlite")
  else:
    make = in_postgres(request.getfixturevalue("database"))

  def again(model="m", approximate=False):
    store = make()
    return store, store.open("c", width=WIDTH, model=model, approximate=approximate)

  # SQL sums in another order.
  again.equal = functools.partial(np.testing.assert_allclose, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6)
  return again


def in_postgres(server):
  from dptdr_jax.serving.postgres import Database
  from dptdr_jax.serving.postgres_documents import PostgresDocuments

  url = server.url(server.new())
  return lambda: PostgresDocuments(Database(url, WIDTH))


def encode_all(collection, model="m", seed=0) -> dict[str, np.ndarray]:
  taken = collection.take_pending(10_000)
  made = vectors(len(taken), seed)
  collection.store(model, [Made(one.row, vector) for one, vector in zip(taken, made, strict=True)])
  return {one.document.id: vector for one, vector in zip(taken, made, strict=True)}


def names(collection, ranked) -> list[str]:
  return [one.id for one in collection.documents(ranked.rows.tolist()).values()]


def test_bm25_scores_and_ranks_equal_the_library_after_changes(opened, tmp_path):
  store, collection = opened()
  collection.upsert([document(row) for row in range(120)])
  collection.upsert([document(row, seed=1) for row in range(10, 40)])  # replaced: now last
  collection.delete([f"d{row}" for row in range(0, 120, 7)])
  left = [row for row in (*range(10), *range(40, 120), *range(10, 40)) if row % 7]
  kept = [document(row, seed=int(10 <= row < 40)) for row in left]
  library = Bm25.build((one.searched() for one in kept), tmp_path / "bm25")
  for query in ("merge sort pivot pivot", "shortest path of a graph", "nothing of it"):
    run, own = library.search([query], 20), collection.bm25(query, 20, {})
    known = run.rows[0] >= 0
    assert names(collection, own) == [kept[row].id for row in run.rows[0][known]]
    opened.equal(own.scores, run.scores[0][known])
  store.close()
  store, collection = opened()  # made again of the file
  assert names(collection, collection.bm25("merge sort", 5, {})) == [
    kept[row].id for row in library.search(["merge sort"], 5).rows[0]
  ]
  store.close()


def test_nearest_equals_exact_search_after_changes_and_a_restart(opened):
  store, collection = opened()
  collection.upsert([document(row) for row in range(50)])
  made = encode_all(collection)
  collection.upsert([document(row, seed=1) for row in range(5)])
  collection.delete(["d7", "d8", "missing"])
  query = vectors(1, 9)[0]
  assert not {*names(collection, collection.nearest(query, "m", 50, {}))} & {"d0", "d1", "d7"}
  assert collection.progress() == Progress(48, 43, 0, 0)
  made |= encode_all(collection, seed=1)
  for again in range(2):
    left = [name for name in made if name not in ("d7", "d8")]
    run = search_exact(query[None], np.stack([made[name] for name in left]), 10)
    own = collection.nearest(query, "m", 10, {})
    assert names(collection, own) == [left[row] for row in run.rows[0]]
    opened.equal(own.scores, run.scores[0])
    if not again:
      store.close()
      store, collection = opened()
  store.close()


def test_filters_are_equalities_of_values_with_their_types(opened):
  store, collection = opened()
  collection.upsert([document(row) for row in range(40)])
  encode_all(collection)
  query = vectors(1, 9)[0]
  for filters, wanted in (
    ({"topic": "graphs"}, lambda fields: fields["topic"] == "graphs"),
    ({"topic": "graphs", "row": 9}, lambda fields: fields["row"] == 9),
    ({"row": 9.0}, lambda fields: fields["row"] == 9),
    ({"row": "9"}, lambda fields: False),
    ({"title": "graphs"}, lambda fields: fields["topic"] == "graphs"),
    ({"nofield": 1}, lambda fields: False),
  ):
    expected = {f"d{row}" for row in range(40) if wanted(document(row).fields)}
    assert {*names(collection, collection.nearest(query, "m", 40, check_filter(filters)))} == expected
    found = {*names(collection, collection.bm25("node edge path sorting", 40, check_filter(filters)))}
    assert found <= expected
  store.close()


def test_vector_that_arrives_late_is_not_stored_for_another_text(opened):
  store, collection = opened()
  collection.upsert([document(0), document(1)])
  taken = collection.take_pending(10)
  assert [one.document.id for one in taken] == ["d0", "d1"] and collection.take_pending(10) == []
  collection.upsert([document(0, seed=1)])
  collection.delete(["d1"])
  collection.store("m", [Made(one.row, vector) for one, vector in zip(taken, vectors(2), strict=True)])
  assert collection.progress() == Progress(1, 0, 0, 0)
  assert [one.document for one in collection.take_pending(10)] == [document(0, seed=1)]
  store.close()


def test_other_fields_keep_the_vector_and_another_title_does_not(opened):
  store, collection = opened()
  collection.upsert([document(0)])
  encode_all(collection)
  assert collection.upsert([Document("d0", document(0).text, document(0).title, {"topic": "new"})]) == 0
  assert collection.get("d0").fields == {"topic": "new"} and collection.progress().pending == 0
  assert len(collection.nearest(vectors(1)[0], "m", 5, check_filter({"topic": "new"})).rows) == 1
  assert collection.upsert([Document("d0", document(0).text, "another")]) == 1
  store.close()


def test_replaced_retriever_serves_no_vector_of_the_former_and_reuses_its_own(opened):
  store, collection = opened()
  collection.upsert([document(row) for row in range(6)])
  encode_all(collection)
  query = vectors(1)[0]
  collection.use("other", False)
  with pytest.raises(StaleModel):
    collection.nearest(query, "m", 5, {})
  assert len(collection.nearest(query, "other", 5, {}).rows) == 0 and collection.progress() == Progress(6, 0, 0, 0)
  some = collection.take_pending(2)
  collection.store("m", [Made(some[0].row, query)])  # of the former one
  assert collection.progress().encoded == 0
  collection.store("other", [Made(one.row, query, cut=3) for one in some])
  assert collection.progress() == Progress(6, 2, 0, 2)
  collection.use("m", False)
  assert collection.progress() == Progress(6, 4, 0, 0)
  store.close()


def test_document_that_cannot_be_encoded_is_counted_and_not_tried_again(opened):
  store, collection = opened()
  collection.upsert([document(0), document(1)])
  first, second = collection.take_pending(2)
  collection.store("m", [Made(first.row, None, error="no text")])
  collection.give_back([second.row])
  assert collection.progress() == Progress(2, 0, 1, 0)
  store.close()
  store, collection = opened()
  assert [one.row for one in collection.take_pending(10)] == [second.row]
  store.close()


def test_given_vectors_are_stored_with_their_documents(opened):
  store, collection = opened()
  given = vectors(8)
  assert collection.upsert([document(row) for row in range(8)], given) == 0
  assert names(collection, collection.nearest(given[3], "m", 1, {})) == ["d3"]
  assert collection.upsert([document(row) for row in range(8)], given) == 0  # again: nothing changes
  assert collection.progress() == Progress(8, 8, 0, 0)
  store.close()


def test_collections_do_not_see_each_other_and_a_dropped_one_is_gone(opened):
  store, first = opened()
  second = store.open("d", width=WIDTH, model="m", approximate=False)
  first.upsert([document(0)])
  second.upsert([document(0, seed=1), document(1)])
  assert first.delete(["d1"]) == 0 and first.get("d0") == document(0) and sorted(store.names()) == ["c", "d"]
  store.drop("d")
  assert store.names() == ["c"] and first.get("d0") == document(0)
  assert store.open("d", width=WIDTH, model="m", approximate=False).progress().documents == 0
  store.close()


def test_full_disk_changes_nothing_and_the_next_write_succeeds(tmp_path):
  store = EmbeddedDocuments(tmp_path / "documents.sqlite")
  collection = store.open("c", width=WIDTH, model="m", approximate=False)
  collection.upsert([document(0)])
  pages = store._writer.execute("PRAGMA page_count").fetchone()[0]
  store._writer.execute(f"PRAGMA max_page_count = {pages + 1}")  # as a full disk does
  with pytest.raises(StorageError, match="full"):
    collection.upsert([Document(f"big{row}", "word " * 2000) for row in range(50)])
  assert collection.progress().documents == 1 and len(collection.bm25("word", 5, {}).rows) == 0
  store._writer.execute("PRAGMA max_page_count = 1000000")
  collection.upsert([document(1)])
  store.close()
  store = EmbeddedDocuments(tmp_path / "documents.sqlite")
  assert store.open("c", width=WIDTH, model="m", approximate=False).progress().documents == 2
  store.close()


def test_damaged_file_is_an_error_of_one_line(tmp_path):
  (tmp_path / "documents.sqlite").write_bytes(b"no database at all" * 1000)
  with pytest.raises(StorageError, match="documents.sqlite: file is not a database"):
    EmbeddedDocuments(tmp_path / "documents.sqlite")


def test_indexes_drop_what_was_removed_when_it_is_half(tmp_path):
  index, lexical, given = VectorIndex(WIDTH, False), Bm25Index(), vectors(3000)
  given /= np.linalg.norm(given, axis=1, keepdims=True)
  texts = [f"word{row % 50} other{row}" for row in range(3000)]
  index.add(np.arange(3000), given)
  lexical.add(range(3000), texts)
  index.remove(list(range(1700)))
  lexical.remove(range(1700))
  assert index._flat.ntotal == len(index) == 1300 and len(lexical._rows) == len(lexical) == 1300
  assert index.search(given[2000], 1).rows.tolist() == [2000]
  assert lexical.search("other2000", 5).rows.tolist() == [2000] and "other3" not in lexical._postings
  assert set(lexical.search("word7", 100).rows) == {row for row in range(1700, 3000) if row % 50 == 7}


def test_graph_finds_nearly_what_exact_search_finds_and_filters_exactly_when_few_are_left():
  given = vectors(2000)
  given /= np.linalg.norm(given, axis=1, keepdims=True)
  graph, exact = VectorIndex(WIDTH, True), VectorIndex(WIDTH, False)
  for index in (graph, exact):
    index.add(np.arange(2000), given)
    index.remove(list(range(0, 2000, 10)))
  shares = []
  for query in vectors(20, 5):
    found, true = (set(index.search(query, 10).rows.tolist()) for index in (graph, exact))
    shares.append(len(found & true) / 10)
    few = np.arange(5, 60)
    assert graph.search(query, 10, few).rows.tolist() == exact.search(query, 10, few).rows.tolist()
  assert np.mean(shares) > 0.95


def test_equal_scores_are_ordered_by_row_across_rank_k():
  index = VectorIndex(WIDTH, False)
  index.add(np.arange(30), np.repeat(vectors(1), 30, axis=0))
  assert index.search(vectors(1)[0], 7).rows.tolist() == list(range(7))


def test_fusion_by_reciprocal_rank_and_by_weight():
  first = Ranked(np.array([1, 2, 3 << 40]), np.array([9.0, 5.0, 1.0]))
  second = Ranked(np.array([2, 4]), np.array([20.0, 10.0]))
  fused = search.fused(first, second, None)
  assert fused.rows.tolist() == [2, 1, 4, 3 << 40]
  np.testing.assert_allclose(fused.scores, [1 / 62 + 1 / 61, 1 / 61, 1 / 62, 1 / 63], rtol=1e-6)
  weighted = search.fused(first, second, 0.6)
  assert weighted.rows.tolist() == [2, 1, 4, 3 << 40]
  np.testing.assert_allclose(weighted.scores, [0.6 * 0.5 + 0.4, 0.6, 0.0, 0.0], rtol=1e-6)
  assert search.fused(first, Ranked(np.zeros(0, int), np.zeros(0)), 0.6).rows.tolist() == [1, 2, 3 << 40]


@pytest.mark.parametrize(
  "given, message",
  [
    ([], "not an object"),
    ({"text": "x"}, "id must be a text"),
    ({"id": "a"}, "text must be a text"),
    ({"id": "a", "text": "  "}, "text is empty"),
    ({"id": "a\n", "text": "x"}, "control character"),
    ({"id": "a", "text": "x", "title": 3}, "title must be a text"),
    ({"id": "a" * 513, "text": "x"}, "513 characters"),
    ({"id": "a", "text": "\ud800"}, "surrogate"),
    ({"id": "a", "text": "x", "score": 1}, "a field cannot have this name"),
    ({"id": "a", "text": "x", "field name": 1}, "a field cannot have this name"),
    ({"id": "a", "text": "x", "large": "y" * 70_000}, "bytes; at most"),
    ({"id": "a", "text": "x", "field": float("inf")}, "not a finite number"),
    ({"id": "a", "text": "x", "field": json.loads("[" * 40 + "]" * 40)}, "nested deeper than 32"),
  ],
)
def test_document_that_is_not_valid_is_named_with_its_place(given, message):
  with pytest.raises(InputError, match=message) as caught:
    from_json({"documents": [{"id": "fine", "text": "x"}, given]})
  assert str(caught.value).startswith("documents[1]")


def test_lines_are_parsed_strictly():
  assert from_line(b'{"_id": 7, "text": "x", "title": null, "tag": "y"}', 1) == Document("7", "x", "", {"tag": "y"})
  for line in (b"{", b'{"id": NaN}', b"\xff", b"[" * 100_000, b'{"id": "a", "text": 1e999}', b"9" * 5000):
    with pytest.raises(InputError, match="line 3"):
      from_line(line, 3)
  for wrong in ({"a": [1]}, {"a": None}, {"a": "x" * 300}):
    with pytest.raises(InputError, match="filter"):
      check_filter(wrong)
