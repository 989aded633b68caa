"""A server among bad clients, poisoned files, a full disk and damaged state: refusals in one line, and others go on."""

import contextlib
import importlib
import json
import pickle
import resource
import shutil
import socket
import struct
import time

import numpy as np
import pytest
from support import forks, server, tiny

from dptdr_jax.backbone import Backbone
from dptdr_jax.serving import catalog
from dptdr_jax.serving.documents import Document
from dptdr_jax.serving.embedded import EmbeddedDocuments

WORD = "a" * 10_000_000
NESTED = "[" * 20_000 + "]" * 20_000
SILENCE_S, DRAIN_S = 1.5, 1.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  made = tmp_path_factory.mktemp("served")
  server.models(made)
  other = Backbone.load(tiny.backbone(made / "backbone2", seed=5))
  server.retriever(other, 0).save(made / "other")
  return made


@pytest.fixture(scope="module")
def running(directory):
  """Task a with a cross-encoder and documents. At the end a client is still sending, and it stops all the same."""
  flags = (f"--task=a={directory / 'a'}", f"--allow={directory}")
  constants = {"guard._SILENCE_S": SILENCE_S, "server._DRAIN_S": DRAIN_S}
  with server.served(directory, *flags, constants=constants) as started:
    files = {name: (directory / "a" / name).read_bytes() for name in ("retriever.json", "prompts.safetensors")}
    files["cross_encoder.json"] = (directory / "cross" / "cross_encoder.json").read_bytes()
    files["cross_prompts.safetensors"] = (directory / "cross" / "prompts.safetensors").read_bytes()
    assert started.client.put("/tasks/a", files=files).status_code == 200
    assert started.client.post("/tasks/a/documents", json={"documents": server.documents(40)}).status_code == 200
    started.encoded("a")
    yield started
    with half_sent(started, "/tasks/a/documents"):
      began = time.monotonic()
      assert started.stop() == 0 and time.monotonic() - began < 25


@pytest.fixture
def alive(running):
  """The server, which must work after the test as before, with nothing in its queue."""
  yield running
  answer = running.client.post("/tasks/a/search", json={"query": "merge sort", "k": 5, "mode": "fused"})
  assert answer.status_code == 200 and len(answer.json()["hits"]) == 5, answer.text
  assert "dptdr_queued_tokens 0.0" in running.client.get("/metrics").text


def refused(answer, *statuses):
  """The message of an error in OpenAI's form, of one line."""
  assert answer.status_code in statuses, (answer.status_code, answer.text[:300])
  message = answer.json()["error"]["message"]
  assert message and "\n" not in message and len(message) < 1000
  return message


@contextlib.contextmanager
def half_sent(running, path, content=b'{"id": "half", "text": "of a'):
  """A request whose body does not end."""
  host, port = running.url.removeprefix("http://").split(":")
  head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
  with socket.create_connection((host, int(port)), timeout=20) as connection:
    connection.sendall(head.encode() + content)
    yield connection


# Clients.


def test_clients_that_send_slowly_are_ended_and_hold_nobody_up(alive):
  with contextlib.ExitStack() as stack:
    slow = [
      stack.enter_context(half_sent(alive, path))
      for path in ("/v1/embeddings", "/tasks/a/search", "/tasks/a/documents", "/v1/rerank") * 20
    ]
    began = time.monotonic()
    for _ in range(5):
      assert alive.client.post("/v1/embeddings", json={"model": "a", "input": "merge"}).status_code == 200
    assert time.monotonic() - began < SILENCE_S
    for connection in slow:
      said = b""
      while part := connection.recv(10_000):
        said += part
      assert b" 408 " in said.splitlines()[0] and b"no part of the body came" in said
  assert alive.client.get("/tasks/a/documents/half").status_code == 404


def test_clients_that_leave_while_they_send_store_nothing_unfinished(alive):
  content = b'{"id": "whole", "text": "of it"}\n{"id": "half", "text": "of a'
  for path in ("/tasks/a/documents", "/v1/embeddings") * 20:
    with half_sent(alive, path, content):
      pass
  assert alive.client.get("/tasks/a/documents/half").status_code == 404
  assert alive.client.delete("/tasks/a/documents/whole").status_code in (200, 404)


@pytest.mark.parametrize(
  "path, given",
  [
    ("/t/a/embed", {"inputs": WORD}),
    ("/v1/embeddings", {"model": "a", "input": WORD, "truncate": True}),
    ("/v1/embeddings", {"model": WORD, "input": "x"}),
    ("/tasks/a/search", {"query": WORD}),
    ("/tasks/a/search", {"query": "x", "filter": {WORD: 1}}),
    ("/tasks/a/documents", {"documents": [{"id": "w", "text": WORD}]}),
    ("/tasks/a/documents", {"documents": [{"id": WORD, "text": "x"}]}),
    ("/tasks/a/documents", {"documents": [{"id": "w", "text": "x", WORD: 1}]}),
    ("/v1/rerank", {"model": "a", "query": WORD, "documents": ["x"]}),
    ("/v1/rerank", {"model": "a", "query": "x", "documents": [WORD]}),
    ("/v1/rerank", {"model": "a", "query": "x", "documents": ["a " * 500_000]}),
    ("/v1/rerank", {"model": "a", "query": "x", "documents": [{"title": WORD, "text": "x"}]}),
  ],
)
def test_word_of_ten_million_letters_is_refused_at_once(alive, path, given):
  began = time.monotonic()
  refused(alive.client.post(path, json=given), 404, 413, 422)
  assert time.monotonic() - began < 10


@pytest.mark.parametrize(
  "path, content",
  [
    ("/tasks/a/search", f'{{"query": "x", "filter": {{"a": {NESTED}}}}}'),
    ("/v1/embeddings", f'{{"model": "a", "input": {NESTED}}}'),
    ("/t/a/embed", f'{{"inputs": {NESTED}}}'),
    ("/v1/rerank", f'{{"model": "a", "query": "x", "documents": [{{"text": {NESTED}}}]}}'),
    ("/tasks/a/documents", f'{{"documents": [{{"id": "n", "text": "x", "field": {NESTED}}}]}}'),
    ("/v1/rerank", '{"model": "a", "query": "x", "documents": [{"text": [[["x"]]]}]}'),
    ("/v1/rerank", '{"model": "a", "query": "x", "documents": [{"title": "no text"}]}'),
    ("/v1/rerank", '{"model": "a", "query": "x", "documents": ["\\ud800"]}'),
    ("/v1/rerank", '{"model": "a", "query": "\\ud800", "documents": ["x"]}'),
    ("/tasks/a/search", '{"query": "\\ud800", "mode": "bm25"}'),
    ("/tasks/a/search", '{"query": "\\ud800", "mode": "fused"}'),
    ("/v1/embeddings", '{"model": "\\ud800", "input": "x"}'),
    ("/v1/embeddings", b'{"model": "a", "input": "\xff\xfe"}'),
    ("/tasks/a/documents", b'{"documents": [{"id": "\xff", "text": "x"}]}'),
  ],
  ids=range(14),
)
def test_nested_or_broken_content_is_refused(alive, path, content):
  headers = {"content-type": "application/json"}
  refused(alive.client.post(path, content=content, headers=headers), 400, 404, 422)


def test_lines_that_are_not_unicode_and_bytes_that_are_no_request(alive):
  message = refused(alive.client.post("/tasks/a/documents", content=b'{"id": "\xff", "text": "x"}\n'), 422)
  assert "line 1: not UTF-8" in message
  host, port = alive.url.removeprefix("http://").split(":")
  for raw in (b"\x00\xff\xfe\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"POST /v1/embeddings HTTP/1.1\r\nHost: \xff\r\n\r\n",
              b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n"):  # fmt: skip
    with socket.create_connection((host, int(port)), timeout=20) as connection:
      connection.sendall(raw)
      assert connection.recv(100).split()[1:2] in ([b"400"], [b"403"])


ROUTES = (
  ("GET", "/tasks/{}"), ("DELETE", "/tasks/{}"), ("PUT", "/tasks/{}"), ("POST", "/tasks/{}/search"),
  ("POST", "/tasks/{}/documents"), ("POST", "/t/{}/embed"), ("GET", "/v1/models/{}"), ("GET", "/static/{}"),
)  # fmt: skip


@pytest.mark.parametrize("name", ["..%2F..%2Fetc", "%2e%2e", "..%5Ca", "a%00", "%ff", "A", "another", "%F0%9F%8D%8E"])
def test_names_of_no_task_reach_nothing(alive, name):
  client = alive.client
  for method, path in ROUTES:
    given = {"query": "x"} if path.endswith("search") else {"inputs": "x"} if path.endswith("embed") else {"path": "/"}
    answer = client.request(method, path.format(name), json=given if method in ("POST", "PUT") else None)
    assert 400 <= answer.status_code < 500, (method, path, answer.text)
    assert "Traceback" not in answer.text


def test_ids_are_never_paths(alive, directory):
  given = ["../../state/tasks.json", "/etc/passwd", "..", "a/../b", "%2e%2e", "c:\\x"]
  documents = [{"id": name, "text": "merge"} for name in given]
  before = sorted(path.name for path in directory.iterdir())
  assert alive.client.post("/tasks/a/documents", json={"documents": documents}).json()["stored"] == len(given)
  assert alive.client.get("/tasks/a/documents/..%2F..%2Fstate%2Ftasks.json").json()["text"] == "merge"
  assert alive.client.request("DELETE", "/tasks/a/documents", json={"ids": given}).json()["removed"] == len(given)
  assert sorted(path.name for path in directory.iterdir()) == before and (directory / "state" / "tasks.json").exists()


# Retrievers.


def header(length: int, rest: bytes) -> bytes:
  return struct.pack("<Q", length) + rest


def entry(shape, ends, kind="F32"):
  return json.dumps({"query.prompt": {"dtype": kind, "shape": shape, "data_offsets": ends}}).encode()


POISON = {
  "huge header": {"prompts.safetensors": header(1 << 62, b"{" + b" " * 100)},
  "deep header": {"prompts.safetensors": header(40_000, NESTED.encode())},
  "deep in an object": {"prompts.safetensors": header(40_005, b'{"a":' + NESTED.encode()[:-1] + b"}")},
  "huge shape": {"prompts.safetensors": header(len(entry([1 << 40], [0, 4])), entry([1 << 40], [0, 4]) + b"abcd")},
  "pickle": {"prompts.safetensors": pickle.dumps(list(range(100)))},
  "deep description": {"retriever.json": NESTED.encode()},
  "no object": {"retriever.json": b"[1, 2]"},
  "not unicode": {"retriever.json": b'{"a": "\xff"}'},
  "empty": {"retriever.json": b"", "prompts.safetensors": b""},
  "large description": {"retriever.json": b" " * 200_000},
  "wrong weight": {"search.json": b'{"weight": 1e999}'},
  "deep weight": {"search.json": b"[" * 10_000},
}


@pytest.mark.parametrize("what", POISON)
def test_poisoned_retriever_is_refused_and_the_former_stays(alive, directory, what):
  former = alive.client.get("/tasks/a").json()["hash"]
  files = {name: (directory / "a" / name).read_bytes() for name in ("retriever.json", "prompts.safetensors")}
  message = refused(alive.client.put("/tasks/a", files=files | POISON[what]), 422)
  assert str(directory) not in message
  assert alive.client.get("/tasks/a").json()["hash"] == former


def test_retriever_of_another_backbone_or_beside_a_pickle_is_refused_by_its_path(alive, directory):
  assert "another backbone" in refused(alive.client.put("/tasks/b", json={"path": str(directory / "other")}), 422)
  pickled = directory / "pickled"
  pickled.mkdir()
  for name in ("retriever.json", "prompts.safetensors"):
    (pickled / name).write_bytes((directory / "a" / name).read_bytes())
  (pickled / "pytorch_model.bin").write_bytes(pickle.dumps({}))
  assert "may run code" in refused(alive.client.put("/tasks/b", json={"path": str(pickled)}), 422)
  assert alive.client.get("/tasks/b").status_code == 404


# The disk.


def test_full_disk_stores_nothing_and_everything_works_when_there_is_room(alive, directory):
  pid, client = alive.process.pid, alive.client
  documents = [{"id": f"full{row}", "text": "merge " * 2000} for row in range(200)]
  files = {name: (directory / "b" / name).read_bytes() for name in ("retriever.json", "prompts.safetensors")}
  former = resource.prlimit(pid, resource.RLIMIT_FSIZE)
  resource.prlimit(pid, resource.RLIMIT_FSIZE, (2048, former[1]))  # writing beyond fails, as with a quota
  try:
    assert "the disk is full" in refused(client.post("/tasks/a/documents", json={"documents": documents}), 507)
    lines = "\n".join(map(json.dumps, documents))
    assert "full" in refused(client.post("/tasks/a/documents", content=lines), 507)
    assert "the disk is full" in refused(client.put("/tasks/b", files=files), 507)
    assert client.get("/tasks/b").status_code == 404 and client.get("/tasks/a/documents/full0").status_code == 404
    assert client.post("/v1/embeddings", json={"model": "a", "input": "merge"}).status_code == 200
  finally:
    resource.prlimit(pid, resource.RLIMIT_FSIZE, former)
  assert client.post("/tasks/a/documents", json={"documents": documents}).status_code == 200
  assert client.put("/tasks/b", files=files).status_code == 201
  assert alive.encoded("a")["failed"] == 0
  client.request("DELETE", "/tasks/a/documents", json={"ids": [one["id"] for one in documents]})
  client.delete("/tasks/b")


@pytest.fixture(scope="module")
def state(directory):
  """What a server leaves: two tasks, and documents of the first."""
  made, backbone = directory / "kept", Backbone.load(directory / "backbone")
  (made / "dptdr.json").parent.mkdir()
  (made / "dptdr.json").write_text('{"kind": "server", "format": 1}')
  opened = catalog.DirectoryCatalog(made, backbone)
  for name in "ab":
    loaded = opened.prepare(name, catalog.files_of(directory / name), False)
    opened.put(loaded.entry)
  store = EmbeddedDocuments(made / "documents.sqlite")
  collection = store.open(opened.get("a").collection, width=32, model="m", approximate=False)
  collection.upsert([Document(f"d{row}", "merge sort " * 50) for row in range(200)])
  store.close()
  return made


def cut_manifest(path):
  manifest = path / "tasks.json"
  manifest.write_bytes(manifest.read_bytes()[:-100])


def overwritten(path):
  (path / "documents.sqlite").write_bytes(b"no database at all" * 1000)


def damaged_in_the_middle(path):
  with open(path / "documents.sqlite", "r+b") as stream:
    stream.seek(8192)
    stream.write(b"\xff" * 40_000)


def tasks_as_a_list(path):
  manifest = path / "tasks.json"
  manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"tasks": []}))


def retriever_gone(path):
  for one in (path / "retrievers").iterdir():
    (one / "prompts.safetensors").unlink()


@pytest.mark.parametrize(
  "damage, file",
  [
    (cut_manifest, "tasks.json"),
    (tasks_as_a_list, "tasks.json"),
    (overwritten, "documents.sqlite"),
    (damaged_in_the_middle, "documents.sqlite"),
    (retriever_gone, "prompts.safetensors"),
  ],
)
def test_damaged_state_is_one_line_and_status_2(directory, state, tmp_path, damage, file):
  copied = tmp_path / "state"
  shutil.copytree(state, copied)
  damage(copied)
  flags = [f"--backbone={directory / 'backbone'}", f"--state={copied}", *server.FLAGS]
  ends_with_one_line(flags, file)


@pytest.mark.parametrize("what, message", [("pickled", "may run code"), ("other", "trained on another backbone")])
def test_poisoned_retriever_at_the_start_is_one_line_and_status_2(directory, tmp_path, what, message):
  given = directory / what
  if what == "pickled":
    given = tmp_path / what
    given.mkdir()
    (given / "model.pkl").write_bytes(pickle.dumps({}))
  flags = [f"--backbone={directory / 'backbone'}", f"--state={tmp_path / 'state'}", f"--task=a={given}", *server.FLAGS]
  ends_with_one_line(flags, message)


def ends_with_one_line(flags, message):
  status, said = server.Server(flags).end(300)
  lines = [line for line in said.splitlines() if line.startswith("error: ")]
  assert status == 2 and len(lines) == 1 and message in lines[0] and "Traceback" not in said, said[-2000:]


# A short form of benchmarks/serving_soak.py.


def test_mixed_load_has_no_error_of_the_server(alive, directory, monkeypatch):
  monkeypatch.syspath_prepend(forks.ROOT / "benchmarks")
  soak = importlib.import_module("serving_soak")
  files = [
    {name: (directory / one / name).read_bytes() for name in ("retriever.json", "prompts.safetensors")} for one in "ab"
  ]
  for number, given in enumerate((*files, *files, *files)):  # more than the bank has slots
    assert alive.client.put(f"/tasks/soak{number}", files=given).status_code == 201
  load = soak.Load(alive.url, [f"soak{number}" for number in range(6)], files, ["merge sort", "shortest path"])
  load.run(5.0, 0.01)
  answered = {kind for kind, status in load.statuses if status == 200}
  assert not load.failed() and len(answered) == 6, load.statuses
  for number in range(6):
    alive.client.delete(f"/tasks/soak{number}")


def test_slope_of_memory_is_that_of_the_second_half(monkeypatch):
  monkeypatch.syspath_prepend(forks.ROOT / "benchmarks")
  soak = importlib.import_module("serving_soak")
  rising = [(second, 1e6 * max(second, 1800) / 3600) for second in range(0, 3600, 60)]
  np.testing.assert_allclose(soak.slope(rising)[0], 1e6, rtol=1e-6)
