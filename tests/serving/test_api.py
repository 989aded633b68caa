"""The HTTP interface of a real process: other people's clients, documents, searches, tasks, refusals, sudden death."""

import base64
import json
import socket
import struct
import threading
import time

import httpx
import huggingface_hub
import numpy as np
import openai
import pytest
from support import deaths, server

from dptdr_jax.reranker import CrossEncoder
from dptdr_jax.retrieval.search import search_exact
from dptdr_jax.retriever import Retriever

TEXTS = ["merge sort of an array", "shortest path in a graph", "prime factor"]


@pytest.fixture(scope="module")
def running(directory, backbone):
  with server.served(directory, f"--task=a={directory / 'a'}", f"--task=b={directory / 'b'}",
                     f"--allow={directory}") as started:  # fmt: skip
    yield started
    assert started.stop() == 0


@pytest.fixture(scope="module")
def filled(running):
  """Task a with 200 documents."""
  assert running.client.post("/tasks/a/documents", json={"documents": server.documents(200)}).json()["stored"] == 200
  assert running.encoded("a") == {"documents": 200, "encoded": 200, "pending": 0, "failed": 0, "truncated": 0}
  return running


def search(running, task, query, **given):
  return running.client.post(f"/tasks/{task}/search", json={"query": query, **given})


def refused(answer, status, code):
  error = answer.json()["error"]
  assert (answer.status_code, error["code"]) == (status, code), answer.text
  assert set(error) == {"message", "type", "param", "code"} and error["message"]
  return error["message"]


# Vectors, by clients that nobody here wrote.


def test_openai_client_gets_the_vectors_of_the_retriever(running, directory, backbone):
  client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
  for task in "ab":
    retriever = Retriever.load(directory / task, backbone)
    for kind, encode in (("query", retriever.encode_queries), ("passage", retriever.encode_passages)):
      answers = [  # the client asks for base64 unless it is told otherwise
        client.embeddings.create(model=f"{task}-{kind}", input=TEXTS),
        client.embeddings.create(model=task, input=TEXTS, encoding_format="float", extra_body={"input_type": kind}),
      ]
      for answer in answers:
        vectors = np.array([one.embedding for one in answer.data], np.float32)
        np.testing.assert_allclose(vectors, encode(TEXTS), rtol=0, atol=1e-6)
        assert answer.model == f"{task}-{kind}" and answer.usage.prompt_tokens == answer.usage.total_tokens > 8
  assert [one.id for one in client.models.list().data] == ["a", "b"] and client.models.retrieve("a").id == "a"
  with pytest.raises(openai.NotFoundError, match="no task"):
    client.embeddings.create(model="missing", input="x")


def test_hugging_face_client_gets_the_vectors_of_the_retriever(running, directory, backbone, monkeypatch):
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the server is on this machine
  retriever = Retriever.load(directory / "a", backbone)
  for kind, encode in (("query", retriever.encode_queries), ("passage", retriever.encode_passages)):
    client = huggingface_hub.InferenceClient(model=f"{running.url}/t/a-{kind}/embed")
    np.testing.assert_allclose(client.feature_extraction(TEXTS[0])[0], encode(TEXTS[:1])[0], rtol=0, atol=1e-6)
  answer = running.client.post("/t/a/embed", json={"inputs": TEXTS, "truncate": False, "normalize": True})
  np.testing.assert_allclose(answer.json(), retriever.encode_passages(TEXTS), rtol=0, atol=1e-6)


def test_base64_is_little_endian_float32(running):
  given = {"model": "a", "input": TEXTS[0]}
  plain = running.client.post("/v1/embeddings", json=given).json()["data"][0]["embedding"]
  coded = running.client.post("/v1/embeddings", json={**given, "encoding_format": "base64"}).json()
  raw = base64.b64decode(coded["data"][0]["embedding"])
  np.testing.assert_array_equal(struct.unpack(f"<{len(raw) // 4}f", raw), np.array(plain, np.float32))


@pytest.mark.parametrize(
  "given, status, code",
  [
    ({"input": [1, 2, 3]}, 422, "token_ids"),
    ({"input": [[1, 2], [3]]}, 422, "token_ids"),
    ({"input": []}, 422, "invalid"),
    ({"input": ["fine", ""]}, 422, "invalid"),
    ({"input": {"a": 1}}, 422, "invalid"),
    ({"input": "x", "model": "missing"}, 404, "task_not_found"),
    ({"input": "x", "model": "../a"}, 404, "task_not_found"),
    ({"input": "x", "model": "a-query", "input_type": "passage"}, 422, "invalid"),
    ({"input": "x", "dimensions": 8}, 422, "invalid"),
    ({"input": "x", "unknown": 8}, 422, "invalid"),
    ({"input": "merge " * 100}, 413, "too_large"),
    ({"input": ["x"] * 2000}, 413, "too_large"),
    ({"input": "a" * 10_000_000}, 413, "too_large"),
    ({"input": "\ud800"}, 422, "invalid"),
  ],
)
def test_embeddings_that_cannot_be_made_are_refused(running, given, status, code):
  content = json.dumps({"model": "a", **given})
  refused(running.client.post("/v1/embeddings", content=content, headers={"content-type": "application/json"}),
          status, code)  # fmt: skip


def test_truncation_is_reported(running):
  answer = running.client.post("/v1/embeddings", json={"model": "a", "input": "merge " * 100, "truncate": True}).json()
  assert answer["data"][0]["truncated_tokens"] == 70 and answer["usage"]["prompt_tokens"] == 32


# Documents and searches.


def test_hits_are_those_of_the_retriever_with_texts_and_fields(filled, directory, backbone):
  retriever, given = Retriever.load(directory / "a", backbone), server.documents(200)
  passages = retriever.encode_passages(given)
  for query in TEXTS:
    answer = search(filled, "a", query, k=5).json()
    run = search_exact(retriever.encode_queries([query]), passages, 5)
    np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], run.scores[0], rtol=0, atol=1e-5)
    best = given[run.rows[0, 0]]
    assert {name: answer["hits"][0][name] for name in best} == best
    assert set(answer["seconds"]) == {"encode", "vector", "total"} and answer["progress"]["pending"] == 0


def test_modes_and_filters(filled):
  words = search(filled, "a", "merge pivot heap", mode="bm25", k=5).json()["hits"]
  assert len(words) == 5 and all(hit["topic"] == "sorting" for hit in words)
  fused = search(filled, "a", "merge pivot heap", mode="fused", k=5).json()
  assert len(fused["hits"]) == 5 and set(fused["seconds"]) == {"encode", "vector", "bm25", "total"}
  for mode in ("vector", "bm25", "fused"):
    found = search(filled, "a", "merge pivot heap node", mode=mode, k=200, filter={"topic": "graphs"}).json()["hits"]
    assert found and {hit["topic"] for hit in found} == {"graphs"}
  assert search(filled, "a", "zzzz", mode="bm25").json()["hits"] == []
  assert search(filled, "a", "merge " * 60).json()["truncated_tokens"] > 0
  refused(search(filled, "a", "merge " * 60, truncate=False), 413, "too_large")
  refused(search(filled, "a", "merge", mode="reranked"), 422, "invalid")
  for wrong in ({"k": 0}, {"k": 5000}, {"mode": "x"}, {"filter": {"a": [1]}}, {"query": ""}, {"other": 1}):
    refused(filled.client.post("/tasks/a/search", json={"query": "x", **wrong}), 422, "invalid")
  refused(search(filled, "missing", "x"), 404, "task_not_found")


def test_documents_come_as_lines_are_replaced_and_removed(running):
  lines = "\n".join(json.dumps(one) for one in server.documents(30)) + "\n\n"
  answer = running.client.post("/tasks/b/documents", content=lines, headers={"content-type": "application/x-ndjson"})
  assert answer.json()["stored"] == 30
  plain = running.client.post("/tasks/b/documents", content=b'{"documents": [{"id": "../../x", "text": "unique"}]}')
  assert plain.json()["documents"] == 31
  running.encoded("b")
  assert search(running, "b", "unique", mode="bm25").json()["hits"][0]["id"] == "../../x"
  assert running.client.get("/tasks/b/documents/..%2F..%2Fx").json()["text"] == "unique"
  changed = {"documents": [{"id": "d3", "text": "changed entirely", "kind": "new"}]}
  assert running.client.post("/tasks/b/documents", json=changed).json()["documents"] == 31
  assert running.client.get("/tasks/b/documents/d3").json() == {
    "id": "d3", "title": "", "text": "changed entirely", "kind": "new"
  }  # fmt: skip
  removed = running.client.request("DELETE", "/tasks/b/documents", json={"ids": ["d1", "d2", "none"]})
  assert removed.json() == {"removed": 2}
  assert running.client.delete("/tasks/b/documents/..%2F..%2Fx").json() == {"removed": 1}
  refused(running.client.get("/tasks/b/documents/d1"), 404, "document_not_found")
  assert running.encoded("b")["documents"] == 28
  hits = search(running, "b", "changed entirely", k=50).json()["hits"]
  assert len(hits) == 28 and not {"d1", "d2", "../../x"} & {hit["id"] for hit in hits}


def test_wrong_line_is_named_and_those_before_it_are_stored(running):
  lines = b'{"id": "l1", "text": "one"}\n{"id": "l2"}\n{"id": "l3", "text": "three"}\n'
  message = refused(running.client.post("/tasks/b/documents", content=lines), 422, "invalid_line")
  assert "line 2" in message and "1 documents before it are stored" in message
  assert running.client.get("/tasks/b/documents/l1").status_code == 200
  assert running.client.get("/tasks/b/documents/l3").status_code == 404
  message = refused(running.client.post("/tasks/b/documents", content=b"x" * 3_000_000), 413, "invalid_line")
  running.client.request("DELETE", "/tasks/b/documents", json={"ids": ["l1"]})


@pytest.mark.parametrize(
  "content", [b"[]", b"{", b"\xff\xfe", b"[" * 200_000, b'{"documents": 3}', b'{"documents": [{"id": "a"}]}', b"NaN"]
)
def test_json_that_holds_no_documents_is_refused(running, content):
  headers = {"content-type": "application/json"}
  refused(running.client.post("/tasks/b/documents", content=content, headers=headers), 422, "invalid")
  for path in ("/v1/embeddings", "/tasks/b/search"):
    assert running.client.post(path, content=content, headers=headers).status_code in (400, 422)


# Tasks while the server runs.


def form(directory, cross=None):
  parts = {name: (directory / name).read_bytes() for name in ("retriever.json", "prompts.safetensors")}
  if cross:
    parts["cross_encoder.json"] = (cross / "cross_encoder.json").read_bytes()
    parts["cross_prompts.safetensors"] = (cross / "prompts.safetensors").read_bytes()
  return parts


def test_task_is_added_replaced_and_removed_while_it_runs(running, directory, backbone):
  client, before = running.client, compilations(running)
  answer = client.put("/tasks/new", files=form(directory / "a"))
  assert answer.status_code == 201 and answer.json()["replaced"] is False
  client.post("/tasks/new/documents", json={"documents": server.documents(60)})
  running.encoded("new")
  first = {hit["id"]: hit["score"] for hit in search(running, "new", TEXTS[0], k=60).json()["hits"]}
  answer = client.put("/tasks/new", json={"path": str(directory / "b"), "index": "hnsw"})
  assert answer.status_code == 200 and answer.json()["replaced"] and answer.json()["index"] == "hnsw"
  retriever = Retriever.load(directory / "b", backbone)
  query, passages = retriever.encode_queries(TEXTS[:1]), retriever.encode_passages(server.documents(60))
  for _ in range(3):  # while it is encoded again: only the new one's vectors
    for hit in search(running, "new", TEXTS[0], k=60).json()["hits"]:
      assert abs(hit["score"] - float(query[0] @ passages[int(hit["id"][1:])])) < 1e-5 != first[hit["id"]]
  assert running.encoded("new")["encoded"] == 60
  assert len(search(running, "new", TEXTS[0], k=60).json()["hits"]) == 60
  assert (
    client.put("/tasks/new", files=form(directory / "b"), data={"index": "hnsw"}).json()["documents"]["pending"] == 0
  )
  assert compilations(running) == before
  assert client.delete("/tasks/new").json() == {"name": "new", "removed": True}
  refused(search(running, "new", "x"), 404, "task_not_found")
  refused(client.delete("/tasks/new"), 404, "task_not_found")
  client.put("/tasks/new", files=form(directory / "a"))
  assert client.get("/tasks/new").json()["documents"]["documents"] == 0  # the former one's documents are gone
  client.delete("/tasks/new")


def compilations(running) -> int:
  lines = running.client.get("/metrics").text.splitlines()
  return int(float(next(line.split()[1] for line in lines if line.startswith("dptdr_compilations_total"))))


def test_task_that_is_refused_leaves_the_former_one(running, directory):
  client, poisoned = running.client, form(directory / "a")
  former = client.get("/tasks/a").json()["hash"]
  poisoned["prompts.safetensors"] = b"\x80\x04\x95 a pickle of some length"
  for files in (poisoned, {"retriever.json": b"{}"}, form(directory / "a") | {"evil.bin": b"x"}):
    refused(client.put("/tasks/a", files=files), 422, "invalid")
  for place in ("/etc", str(directory / ".." / ".."), "http://127.0.0.1:1/x"):
    message = refused(client.put("/tasks/a", json={"path": place}), 422, "invalid")
    assert "does not allow" in message
  for name in ("A", "a%2Fb", "a-query", "x" * 65):
    assert client.put(f"/tasks/{name}", files=form(directory / "a")).status_code in (404, 405, 422)
  refused(client.put("/tasks/a", content=b"x", headers={"content-type": "text/plain"}), 415, "media_type")
  assert client.get("/tasks/a").json()["hash"] == former


def test_reranked_mode_and_cohere_shape_give_the_cross_encoders_scores(running, directory, backbone):
  client, given = running.client, server.documents(40)
  assert client.put("/tasks/ranked", files=form(directory / "a", directory / "cross")).status_code == 201
  assert client.get("/tasks/ranked").json()["modes"][-1] == "reranked"
  cross = CrossEncoder.load(directory / "cross", backbone)
  texts = [one["text"] for one in given[:20]]
  answer = client.post("/v1/rerank", json={"model": "ranked", "query": TEXTS[0], "documents": texts, "top_n": 7,
                                           "return_documents": True}).json()  # fmt: skip
  scores = cross.score([TEXTS[0]] * 20, texts)
  order = np.argsort(-scores, kind="stable")[:7]
  assert [one["index"] for one in answer["results"]] == order.tolist()
  np.testing.assert_allclose([one["relevance_score"] for one in answer["results"]], scores[order], atol=1e-5)
  assert answer["results"][0]["document"]["text"] == texts[order[0]]
  client.post("/tasks/ranked/documents", json={"documents": given})
  running.encoded("ranked")
  found = search(running, "ranked", TEXTS[0], mode="reranked", k=40).json()
  own = cross.score([TEXTS[0]] * 40, [(one["title"], one["text"]) for one in given])
  np.testing.assert_allclose([hit["score"] for hit in found["hits"]], np.sort(own)[::-1], atol=1e-5)
  assert "rerank" in found["seconds"]
  refused(client.post("/v1/rerank", json={"model": "a", "query": "x", "documents": ["y"]}), 422, "no_cross_encoder")
  refused(client.post("/v1/rerank", json={"model": "ranked", "query": "x", "documents": ["y"] * 600}), 413, "too_large")
  client.delete("/tasks/ranked")


# Connections.


def test_pages_of_other_sites_and_names_of_other_hosts_are_refused(running):
  given = {"documents": [{"id": "evil", "text": "x"}]}
  refused(running.client.post("/tasks/b/documents", json=given, headers={"origin": "http://evil.example"}), 403,
          "wrong_origin")  # fmt: skip
  refused(running.client.get("/tasks", headers={"host": "evil.example"}), 403, "wrong_host")
  assert running.client.get("/tasks", headers={"origin": running.url}).status_code == 200


def test_body_that_is_too_large_is_refused_before_it_is_read(running):
  host, port = running.url.removeprefix("http://").split(":")
  with socket.create_connection((host, int(port))) as connection:
    connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: 99999999999\r\n\r\n")  # fmt: skip
    assert b" 413 " in connection.recv(100)

  def chunks():
    for _ in range(40):
      yield b" " * 1_000_000

  answer = running.client.post("/v1/embeddings", content=chunks(), headers={"content-type": "application/json"})
  refused(answer, 413, "too_large")


def test_client_that_leaves_frees_its_place(running):
  host, port = running.url.removeprefix("http://").split(":")
  content = json.dumps({"model": "a", "input": ["merge sort " * 6] * 1000}).encode()
  head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
  head += f"Content-Length: {len(content)}\r\n\r\n"
  for _ in range(8):
    with socket.create_connection((host, int(port))) as connection:
      connection.sendall(head.encode() + content)
      time.sleep(0.05)
  end = time.monotonic() + 20
  while "dptdr_queued_tokens 0.0" not in running.client.get("/metrics").text:
    assert time.monotonic() < end
    time.sleep(0.1)


def test_deadline_of_a_request(running):
  refused(running.client.post("/v1/embeddings", json={"model": "a", "input": "x"}, headers={"request-timeout": "x"}),
          422, "invalid")  # fmt: skip
  answer = running.client.post("/v1/embeddings", json={"model": "a", "input": ["merge sort " * 6] * 1000},
                               headers={"request-timeout": "0.0001"})  # fmt: skip
  refused(answer, 504, "deadline_exceeded")


def test_metrics_and_descriptions(filled):
  text = filled.client.get("/metrics").text
  for name in ("dptdr_requests_total", "dptdr_queue_seconds_bucket", "dptdr_inference_seconds_bucket",
               "dptdr_bank_prompts", "dptdr_batch_tasks_bucket", "dptdr_padding_tokens_total",
               'dptdr_documents{state="encoded",task="a"}',
               "dptdr_bank_evictions_total", 'route="/tasks/{name}/search"'):  # fmt: skip
    assert name in text
  paths = filled.client.get("/openapi.json").json()["paths"]
  assert {"/v1/embeddings", "/tasks/{name}/search", "/health", "/metrics"} <= set(paths)
  assert "/v1/embeddings" in filled.client.get("/docs").text
  refused(filled.client.get("/nothing"), 404, "no_such_route")
  refused(filled.client.put("/tasks"), 405, "method_not_allowed")


# Processes of their own.


def test_keys_limits_and_a_full_queue(directory, backbone, tmp_path):
  keys = tmp_path / "keys"
  keys.write_text("# two roles\nread: reader-0123456789\nadmin: keeper-0123456789\n")
  flags = (f"--task=a={directory / 'a'}", f"--api-key-file={keys}", f"--state={tmp_path / 'state'}", "--host=0.0.0.0",
           "--queued-tokens=4096")  # fmt: skip
  with server.served(directory, *flags, key="keeper-0123456789") as running:
    reader = httpx.Client(base_url=running.url, headers={"authorization": "Bearer reader-0123456789"}, timeout=60)
    nobody = httpx.Client(base_url=running.url)
    assert nobody.get("/health").status_code == nobody.get("/").status_code == 200
    for path in ("/tasks", "/metrics", "/v1/models", "/tasks/a/documents/x"):
      refused(nobody.get(path), 401, "invalid_api_key")
      refused(nobody.get(path, headers={"authorization": "Bearer keeper-012345678"}), 401, "invalid_api_key")
    assert reader.get("/tasks").status_code == 200
    assert reader.post("/v1/embeddings", json={"model": "a", "input": "x"}).status_code == 200
    refused(reader.post("/tasks/a/documents", json={"documents": []}), 403, "permission_denied")
    refused(reader.delete("/tasks/a"), 403, "permission_denied")
    assert running.client.post("/tasks/a/documents", json={"documents": server.documents(3)}).status_code == 200
    answers = overload(reader)
    statuses = {answer.status_code for answer in answers}
    assert statuses == {200, 429}
    late = next(answer for answer in answers if answer.status_code == 429)
    assert int(late.headers["retry-after"]) >= 1 and late.json()["error"]["code"] == "overloaded"
    assert running.stop() == 0


def overload(client) -> list[httpx.Response]:
  answers = []

  def ask():
    answers.append(client.post("/v1/embeddings", json={"model": "a", "input": ["merge heap " * 8] * 100}))

  threads = [threading.Thread(target=ask) for _ in range(12)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return answers


def test_nothing_accepted_is_lost_by_sudden_deaths(directory, backbone, tmp_path):
  mortal = deaths.Deaths(directory, backbone, tmp_path / "state")
  for seconds in (0.4, 0.7, 1.0):
    mortal.life(seconds)
  mortal.last()
  assert sum(map(len, mortal.ledger.documents.values())) > 10
