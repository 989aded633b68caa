"""Several servers on one database: equal, following each other, and losing nothing when one or the database dies."""

import threading
import time

import numpy as np
import psycopg
import pytest
from support import server, tiny

from dptdr_jax.backbone import Backbone
from dptdr_jax.core.errors import InputError, OutageError
from dptdr_jax.retriever import Retriever
from dptdr_jax.serving import (
  catalog,
  postgres_documents,
)
from dptdr_jax.serving.collections import Made, Progress, StaleModel, StorageError, StorageUnavailable
from dptdr_jax.serving.documents import Document, check_filter
from dptdr_jax.serving.limits import UnknownTask
from dptdr_jax.serving.postgres import Database
from dptdr_jax.serving.postgres_catalog import PostgresCatalog
from dptdr_jax.serving.postgres_documents import PostgresDocuments

WIDTH = 16


@pytest.fixture
def name(database):
  return database.new()


@pytest.fixture
def stores(database, name):
  """The documents of two servers."""
  opened = [PostgresDocuments(Database(database.url(name), WIDTH)) for _ in range(2)]
  yield opened
  for store in opened:
    store.close()


def both(stores, model="m", approximate=False):
  return [store.open("c", width=WIDTH, model=model, approximate=approximate) for store in stores]


def given(count, seed=0):
  return [Document(f"d{row}", text, topic, {"row": row}) for row, (topic, text) in
          enumerate(tiny.sentences(count, 12, seed))]  # fmt: skip


def vectors(count, seed=0):
  made = np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)
  return made / np.linalg.norm(made, axis=1, keepdims=True)


def test_database_that_cannot_be_used_is_refused_in_one_line_without_the_password(database, name):
  Database(database.url(name), WIDTH).close()
  with pytest.raises(InputError, match="have 16 numbers, and the backbone's: 32"):
    Database(database.url(name), 32)
  plain, latin = database.new(), database.new()
  database.execute("CREATE ROLE plain LOGIN")
  with pytest.raises(InputError, match="pgvector cannot be made"):
    Database(database.url(plain).replace("postgres@", "plain@"), WIDTH)
  database.execute(f"CREATE DATABASE {latin}1 ENCODING 'LATIN1' TEMPLATE template0")
  with pytest.raises(InputError, match="encoding UTF8: 'LATIN1'"):
    Database(database.url(f"{latin}1"), WIDTH)
  for url, error in (
    ("postgresql://me:secret@127.0.0.1:1/x", OutageError),
    ("postgresql://me:s/ecret@x:1/y", InputError),
    ("postgresql://me:s@ecret@x/y", InputError),
    ("postgresql://me:secret/@x/y", InputError),
    ("postgresql://me:secret@/missing?nonsense=1", InputError),
  ):
    with pytest.raises(error) as caught:
      Database(url, WIDTH)
    assert "ecret" not in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_documents_are_claimed_by_one_server_and_by_another_after_the_lease(stores, database, name):
  first, second = both(stores)
  first.upsert(given(10))
  taken = first.take_pending(6)
  assert len(taken) == 6 and len(second.take_pending(10)) == 4 and first.take_pending(10) == []
  first.give_back([taken[0].row])
  assert [one.row for one in second.take_pending(10)] == [taken[0].row]
  first.store("m", [Made(taken[1].row, vectors(1)[0])])
  assert second.take_pending(10) == []
  shift = f"UPDATE dptdr_pending SET until = until - interval '{postgres_documents.LEASE_S + 1} s'"
  database.execute(shift, name)
  assert [one.row for one in second.take_pending(10)] == [one.row for one in taken[2:]]  # it has renewed its own
  second.store("m", [Made(taken[2].row, vectors(1)[0])])
  first.store("m", [Made(taken[2].row, vectors(1, 5)[0], cut=3)])  # late: it has a vector already
  assert first.progress() == second.progress() == Progress(10, 2, 0, 0)


def test_totals_are_those_of_the_tables_after_writes_of_two_servers_at_once(stores, database, name):
  collections = both(stores)

  def write(number):
    rng = np.random.default_rng(number)
    for turn in range(12):
      some = rng.choice(30, 8, replace=False)
      collection = collections[number % 2]
      collection.upsert([given(30, seed=int(rng.integers(3)))[row] for row in some])
      taken = collection.take_pending(5)
      collection.store("m", [Made(one.row, vectors(1)[0], cut=turn % 2) for one in taken[:4]])
      collection.give_back([one.row for one in taken[4:]])
      collection.delete([f"d{row}" for row in rng.choice(30, 3)])

  run_all([lambda number=number: write(number) for number in range(4)])
  tables = database.execute("""SELECT (SELECT count(*) FROM dptdr_documents), (SELECT count(vector) FROM dptdr_vectors),
    0::bigint, (SELECT count(*) FROM dptdr_vectors WHERE cut > 0)""", name)  # fmt: skip
  progress = collections[0].progress()
  assert [(progress.documents, progress.encoded, progress.failed, progress.truncated)] == tables
  waiting, lengths, tokens, postings = database.execute("""SELECT (SELECT count(*) FROM dptdr_pending),
    (SELECT sum(length) FROM dptdr_documents), (SELECT tokens FROM dptdr_collections),
    (SELECT sum(count) FROM dptdr_postings)""", name)[0]  # fmt: skip
  assert waiting == progress.pending and lengths == tokens == postings


def run_all(functions):
  errors = []

  def run(function):
    try:
      function()
    except BaseException as error:
      errors.append(error)

  threads = [threading.Thread(target=run, args=[function]) for function in functions]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not errors, errors


def test_graph_has_the_vectors_of_one_retriever_and_filters_exactly(stores):
  collection, other = both(stores, approximate=True)
  made = vectors(700)
  collection.upsert([Document(f"d{row}", f"text {row}", fields={"group": row % 50, "half": row % 2})
                     for row in range(700)], made)  # fmt: skip
  shares = []
  for query in vectors(10, 5):
    scores = made @ query
    found = other.documents(other.nearest(query, "m", 10, {}).rows.tolist()).values()
    shares.append(len({one.id for one in found} & {f"d{row}" for row in np.argsort(-scores)[:10]}) / 10)
    for field, step in (("group", 50), ("half", 2)):  # few are left, and many
      ranked, best = collection.nearest(query, "m", 10, check_filter({field: 1})), np.sort(scores[1::step])[::-1][:10]
      np.testing.assert_allclose(ranked.scores, best, rtol=0, atol=1e-5 if step > 2 else 0.1)
      assert {one.fields[field] for one in collection.documents(ranked.rows.tolist()).values()} == {1}
  assert np.mean(shares) > 0.9
  both(stores, model="new", approximate=True)
  taken = collection.take_pending(3)
  collection.store("new", [Made(one.row, vectors(1)[0]) for one in taken])
  assert collection.nearest(made[0], "new", 50, {}).rows.tolist() == [one.row for one in taken]
  with pytest.raises(StaleModel):
    other.nearest(made[0], "m", 5, {})


def test_texts_that_a_database_cannot_hold_as_they_are(stores):
  collection, _ = both(stores)
  odd = [Document("a", "nul \0 here", "t\0", {"z": "\0", "n": 10**400}), Document("b", "x" * 5000 + " word")]
  collection.upsert(odd)
  assert [collection.get(one.id) for one in odd] == odd and collection.get("no\0") is collection.get("\ud800") is None
  assert collection.delete(["no\0", "\ud800"]) == 0
  taken = [one.row for one in collection.take_pending(5)]
  assert collection.bm25("x" * 5000, 5, {}).rows.tolist() == taken[1:]
  assert collection.bm25("nul", 5, check_filter({"z": "\0"})).rows.tolist() == taken[:1]
  assert collection.bm25("nul", 5, check_filter({"z\0": 1})).rows.tolist() == []
  collection.store("m", [Made(taken[0], None, error="no\0")])
  assert collection.progress() == Progress(2, 0, 1, 0)


def test_full_disk_and_a_dropped_collection(stores, monkeypatch):
  first, second = both(stores)
  first.upsert(given(2))

  def full(*_, **__):
    raise psycopg.errors.DiskFull("could not extend file: No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(first, "_count", full)
    with pytest.raises(StorageError, match="full"):
      first.upsert(given(9))
  assert first.progress().documents == 2 and first.upsert(given(9)) == 7
  stores[0].drop("c")
  for call in (lambda: second.upsert(given(1)), lambda: second.nearest(vectors(1)[0], "m", 5, {}),
               lambda: second.bm25("merge", 5, {}), lambda: second.take_pending(5), lambda: second.get("d0"),
               lambda: second.store("m", [Made(1, vectors(1)[0])])):  # fmt: skip
    with pytest.raises(UnknownTask):
      call()
  assert stores[1].names() == [] and second.progress() == Progress(0, 0, 0, 0)


def test_statement_that_waits_too_long_ends(stores, monkeypatch):
  first, second = both(stores)
  with first._database.transaction() as cursor:
    first._lock(cursor)
    lock = second._lock

    def impatient(cursor):
      cursor.execute("SET LOCAL lock_timeout = '50ms'")
      return lock(cursor)

    monkeypatch.setattr(second, "_lock", impatient)
    with pytest.raises(StorageUnavailable):
      second.upsert(given(1))


# Tasks.


def test_catalogs_follow_each_other_and_check_what_they_fetch(database, name, directory, backbone, tmp_path):
  databases = [Database(database.url(name), 32) for _ in range(2)]
  first, second = (PostgresCatalog(one, tmp_path / str(number), backbone) for number, one in enumerate(databases))
  version = second.refresh()
  with first.changing():
    for task in ("one", "two"):
      first.put(first.prepare(task, catalog.files_of(directory / "a", directory / "cross"), task == "two").entry)
  assert second.version() > version and [entry.name for entry in second] == []
  second.refresh()
  assert [entry.name for entry in second] == ["one", "two"] and second.get("two").approximate
  loaded = second.load(second.get("one"))
  assert loaded.retriever.hash == Retriever.load(directory / "a", backbone).hash and loaded.cross_encoder
  assert database.execute("SELECT count(*), count(DISTINCT content) FROM dptdr_files", name) == [(4, 1)]
  with second.changing():
    second.refresh()
    second.put(second.prepare("one", catalog.files_of(directory / "b"), False).entry)
    second.remove("two")
  database.execute("UPDATE dptdr_files SET bytes = bytes || '!' WHERE name = 'retriever.json'", name)
  first.refresh()
  with pytest.raises(InputError, match="damaged in the database"):
    first.load(first.get("one"))
  with pytest.raises(InputError, match="on another backbone"):
    PostgresCatalog(databases[0], tmp_path, Backbone.load(tiny.backbone(tmp_path / "other", seed=5)))
  for one in databases:
    one.close()


# Processes.


@pytest.fixture(scope="module")
def pair(database, directory, backbone):
  """Two servers on one database."""
  name = database.new()
  flags = [f"--backbone={directory / 'backbone'}", f"--state={database.url(name)}", f"--allow={directory}"]
  started = []
  try:
    for _ in range(2):  # the second loads what the first has compiled
      started.append(server.Server([*flags, *server.FLAGS]))
      started[-1].wait()
    yield name, *started
  finally:
    for one in started:
      if not one.client.is_closed:
        one.end(0)


def search(running, task, query, **more):
  return running.client.post(f"/tasks/{task}/search", json={"query": query, **more})


def until(check, seconds):
  """Calls until it is true; returns the seconds."""
  started = time.monotonic()
  while not check():
    assert time.monotonic() < started + seconds
    time.sleep(0.05)
  return time.monotonic() - started


def test_tasks_and_documents_of_one_server_are_served_by_the_other(pair, directory):
  _, first, second = pair
  for task, index in (("a", "exact"), ("c", "hnsw")):
    put = {"path": str(directory / "a"), "index": index}
    assert first.client.put(f"/tasks/{task}", json=put).status_code == 201
  until(lambda: second.client.get("/tasks/c").status_code == 200, 3)
  assert [one["name"] for one in second.client.get("/tasks").json()["tasks"]] == ["a", "c"]
  assert second.client.post("/tasks/a/documents", json={"documents": server.documents(60)}).json()["stored"] == 60
  assert first.client.get("/tasks/a/documents/d7").json()["id"] == "d7"
  assert first.encoded("a") == second.encoded("a")
  given = {"mode": "fused", "filter": {"topic": "graphs"}, "k": 60}
  answers = [search(one, "a", "merge node edge", **given).json()["hits"] for one in (first, second)]
  assert answers[0] == answers[1] and len(answers[0]) > 5
  assert second.client.delete("/tasks/c").status_code == 200
  until(lambda: first.client.get("/tasks/c").status_code == 404, 3)
  assert search(first, "a", "merge").status_code == 200


def test_replaced_task_serves_no_vector_of_the_former_at_either_server(pair, directory, backbone):
  _, first, second = pair
  given = server.documents(60)
  for turn in range(3):
    retriever = Retriever.load(directory / "ba"[turn % 2], backbone)
    scores = retriever.encode_passages(given) @ retriever.encode_queries(["merge sort"])[0]
    assert first.client.put("/tasks/a", json={"path": str(directory / "ba"[turn % 2])}).status_code == 200
    full = time.monotonic() + 20
    while time.monotonic() < full:
      answer = search((first, second)[turn % 2 == 0], "a", "merge sort", k=60)
      assert answer.status_code == 200, answer.text
      hits = answer.json()["hits"]
      own = [scores[hit["row"]] for hit in hits]
      np.testing.assert_allclose([hit["score"] for hit in hits], own, rtol=0, atol=1e-5)
      if len(hits) == 60:
        break
    assert len(hits) == 60
    until(lambda hash_=retriever.hash: second.client.get("/tasks/a").json()["hash"] == hash_, 3)


def test_database_that_stops_under_load_is_a_503_and_nothing_acknowledged_is_lost(pair, database):
  _, *servers = pair
  accepted, statuses, done = {}, [], threading.Event()

  def write(number):
    turn = 0
    while not done.is_set():
      turn += 1
      some = [{"id": f"s{number}-{turn}-{one}", "text": f"merge heap{number}x{turn}"} for one in range(3)]
      answer = servers[number % 2].client.post("/tasks/a/documents", json={"documents": some})
      statuses.append((answer.status_code, answer.json().get("error", {}).get("code")))
      if answer.status_code == 200:
        accepted.update({one["id"]: one["text"] for one in some})

  def read(number):
    while not done.is_set():
      answer = search(servers[number % 2], "a", "merge", mode=("vector", "bm25")[number // 2])
      statuses.append((answer.status_code, answer.json().get("error", {}).get("code")))

  def outage():
    try:
      time.sleep(1)
      database.stop()
      time.sleep(1)
      assert servers[0].client.get("/health").status_code == 200
      assert "dptdr_ready 1.0" in servers[0].client.get("/metrics").text
      database.start()
      until(lambda: all(search(one, "a", "merge").status_code == 200 for one in servers), 15)
      time.sleep(1)
    finally:
      done.set()

  run_all([outage, *(lambda n=n: write(n) for n in range(3)), *(lambda n=n: read(n) for n in range(4))])
  assert set(statuses) == {(200, None), (503, "storage_unavailable")}
  assert len(accepted) > 20
  for place, (document, text) in enumerate(accepted.items()):
    assert servers[place % 2].client.get(f"/tasks/a/documents/{document}").json()["text"] == text
  progress = servers[0].encoded("a")
  assert progress["encoded"] == progress["documents"] >= 60 + len(accepted)


def test_killed_server_s_documents_are_encoded_by_the_other(pair, database):
  name, first, second = pair
  before = second.encoded("a")["documents"]
  for part in range(4):
    many = [{**one, "id": f"k{part}-{one['id']}"} for one in server.documents(400, part)]
    first.client.post("/tasks/a/documents", json={"documents": many}).raise_for_status()
  first.kill()
  assert second.client.get("/tasks/a/documents").json()["pending"] > 0, "killed too late for this test"
  database.execute(f"UPDATE dptdr_pending SET until = until - interval '{postgres_documents.LEASE_S - 3} s'", name)
  progress = second.encoded("a", 45)
  assert progress["encoded"] == progress["documents"] == before + 1600
  second.process.terminate()
  status, text = second.end()
  assert status == 0 and "Traceback" not in text, text
