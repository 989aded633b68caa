"""Kills a server (SIGKILL) while documents stream in and tasks change, and checks what it has acknowledged."""

from __future__ import annotations

import json
import pathlib
import random
import threading
from collections.abc import Callable

import httpx
import numpy as np
from support import server

from dptdr_jax.backbone import Backbone
from dptdr_jax.retriever import Retriever

DOCUMENTS = ("kept", "other")  # tasks that are never removed
WORDS = ("merge", "heap", "pivot", "node", "edge", "prime")


class Ledger:
  """What was acknowledged; what was under way at a death may be the former or the new.

  Attributes:
    documents: task → id → the texts it may have; None: it may be missing.
    tasks: name → the retrievers ('a' or 'b') it may have; None: it may be missing.
  """

  def __init__(self):
    self.documents: dict[str, dict[str, set[str | None]]] = {name: {} for name in DOCUMENTS}
    self.tasks: dict[str, set[str | None]] = {name: {"a"} for name in DOCUMENTS}

  def change(self, known: dict[str, set], new: dict[str, str | None], send: Callable[[], httpx.Response]) -> None:
    """Sends a request that changes some names; raises httpx.TransportError if no answer came."""
    for name, value in new.items():
      known[name] = known.get(name, {None}) | {value}
    send().raise_for_status()
    for name, value in new.items():
      known[name] = {value}


class Deaths:
  """A state, and what its servers have acknowledged.

  Usage: `deaths.life(seconds)` any number of times, then `deaths.last()`.
  """

  def __init__(self, directory: pathlib.Path, backbone: Backbone, state: pathlib.Path, seed: int = 0):
    """`directory` is one of `server.models`."""
    self.ledger, self._directory, self._random = Ledger(), directory, random.Random(seed)
    self._first = [f"--state={state}", *(f"--task={name}={directory / 'a'}" for name in DOCUMENTS)]
    self._number = 0
    self._retrievers = {name: Retriever.load(directory / name, backbone) for name in "ab"}
    self._files = {
      name: {part: (directory / name / part).read_bytes() for part in ("retriever.json", "prompts.safetensors")}
      for name in "ab"
    }

  def life(self, seconds: float) -> None:
    """One server: what the former ones acknowledged is there; then load, until it is killed after some seconds."""
    with server.served(self._directory, *self._flags()) as running:
      self.check(running)
      killing = threading.Timer(seconds, running.kill)
      failed: list[BaseException] = []
      threads = [threading.Thread(target=self._until_dead, args=(running, step, failed))
                 for step in (self._write, self._change)]  # fmt: skip
      for thread in (killing, *threads):
        thread.start()
      for thread in (killing, *threads):
        thread.join()
      if failed:
        raise failed[0]

  def last(self) -> None:
    """A server that is not killed: everything is there, encoded and found."""
    with server.served(self._directory, *self._flags()) as running:
      self.check(running)
      for task in DOCUMENTS:
        self._check_search(running, task)
      assert running.stop() == 0

  def _flags(self) -> list[str]:
    flags, self._first = self._first, self._first[:1]  # later ones find their tasks in the state
    return flags

  def _until_dead(self, running: server.Server, step: Callable, failed: list[BaseException]) -> None:
    try:
      with httpx.Client(base_url=running.url, timeout=30) as client:
        while True:
          step(client)
    except httpx.TransportError:
      pass
    except BaseException as error:
      failed.append(error)

  def _write(self, client: httpx.Client) -> None:
    """Some documents as JSON or lines, or some removed."""
    task = self._random.choice(DOCUMENTS)
    known, path = self.ledger.documents[task], f"/tasks/{task}/documents"
    chosen = [f"d{self._random.randrange(150)}" for _ in range(self._random.choice((1, 5, 20)))]
    if self._random.random() < 0.15:
      self.ledger.change(known, dict.fromkeys(chosen), lambda: client.request("DELETE", path, json={"ids": chosen}))
      return
    texts = {}
    for name in chosen:
      self._number += 1
      texts[name] = f"{self._random.choice(WORDS)} {self._random.choice(WORDS)} version{self._number}"
    given = [{"id": name, "text": text} for name, text in texts.items()]
    lines = "\n".join(map(json.dumps, given)).encode()
    if self._random.random() < 0.5:
      self.ledger.change(known, texts, lambda: client.post(path, content=lines))
    else:
      self.ledger.change(known, texts, lambda: client.post(path, json={"documents": given}))

  def _change(self, client: httpx.Client) -> None:
    """A task added, replaced or removed."""
    name = self._random.choice((*DOCUMENTS, "extra0", "extra1"))
    if name not in DOCUMENTS and self.ledger.tasks.get(name, {None}) in ({"a"}, {"b"}):
      self.ledger.change(self.ledger.tasks, {name: None}, lambda: client.delete(f"/tasks/{name}"))
      return
    one = self._random.choice("ab")
    self.ledger.change(self.ledger.tasks, {name: one}, lambda: client.put(f"/tasks/{name}", files=self._files[one]))

  def check(self, running: server.Server) -> None:
    """Tasks and documents are those that were acknowledged; afterwards nothing is unsure."""
    hashes = {one.hash: name for name, one in self._retrievers.items()}
    found = {one["name"]: hashes[one["hash"]] for one in running.client.get("/tasks").json()["tasks"]}
    assert set(found) <= set(self.ledger.tasks)
    for name, may in self.ledger.tasks.items():
      assert found.get(name) in may, (name, may, found)
      self.ledger.tasks[name] = {found.get(name)}
    for task, known in self.ledger.documents.items():
      for name, may in known.items():
        answer = running.client.get(f"/tasks/{task}/documents/{name}")
        text = answer.json()["text"] if answer.status_code == 200 else None
        assert text in may, (task, name, may, text)
        known[name] = {text}

  def _check_search(self, running: server.Server, task: str) -> None:
    """Both rankings hold every document with its present text and the present retriever's score, and no other."""
    texts = {name: text for name, (text,) in self.ledger.documents[task].items() if text is not None}
    (which,) = self.ledger.tasks[task]
    progress = running.encoded(task)
    assert progress["documents"] == progress["encoded"] == len(texts)
    hits = running.client.post(f"/tasks/{task}/search", json={"query": "merge heap", "k": 1000}).json()["hits"]
    assert {hit["id"]: hit["text"] for hit in hits} == texts and len(hits) == len(texts)
    retriever = self._retrievers[which]
    passages = retriever.encode_passages([hit["text"] for hit in hits])
    scores = passages @ retriever.encode_queries(["merge heap"])[0]
    np.testing.assert_allclose([hit["score"] for hit in hits], scores, rtol=0, atol=1e-5)
    for name, text in texts.items():
      given = {"query": text.split()[-1], "mode": "bm25"}
      assert [hit["id"] for hit in running.client.post(f"/tasks/{task}/search", json=given).json()["hits"]] == [name]
