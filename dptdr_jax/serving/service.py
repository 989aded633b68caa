"""Tasks, their documents and searches: everything that the server does, without HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import pathlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from dptdr_jax.core.errors import InputError
from dptdr_jax.serving import documents as given_documents
from dptdr_jax.serving import lexical
from dptdr_jax.serving import search as rankings
from dptdr_jax.serving.catalog import Entry, Loaded
from dptdr_jax.serving.collections import Busy, Collection, Progress, Ranked, StaleModel, StorageError
from dptdr_jax.serving.documents import Document
from dptdr_jax.serving.encoding import Encoding
from dptdr_jax.serving.engine import Encoded, Engine
from dptdr_jax.serving.following import Following
from dptdr_jax.serving.limits import UnknownTask
from dptdr_jax.serving.metrics import Metrics
from dptdr_jax.serving.reranking import Reranker
from dptdr_jax.serving.state import State
from dptdr_jax.serving.tasks import Task

log = logging.getLogger(__name__)

MODES = ("vector", "bm25", "fused", "reranked")
RERANKED_DEPTH = 50
_THREADS = 8  # of searches and writes
_MOST_CALLS = 512  # of them that may wait
T = TypeVar("T")


@dataclasses.dataclass
class Served:
  """A task with what belongs to it."""

  entry: Entry
  collection: Collection
  reranker: Reranker | None
  weight: float | None


@dataclasses.dataclass(frozen=True)
class Hit:
  """A document with its score."""

  score: float
  document: Document


@dataclasses.dataclass(frozen=True)
class Found:
  """The answer to a search.

  Attributes:
    seconds: by part: encode, vector, bm25, rerank, total.
    truncated: tokens of the query that were cut off for the vectors.
  """

  hits: list[Hit]
  seconds: dict[str, float]
  progress: Progress
  truncated: int


class Service:
  """One backbone, its tasks and their documents. Other servers may share the state: their changes are followed."""

  def __init__(self, engine: Engine, state: State, *, metrics: Metrics, allowed: Sequence[str] = ()):
    """Adds the tasks of the state to the engine; closes the state at the end.

    Args:
      allowed: directories and URLs below which clients may name retrievers.

    Raises:
      InputError: a task is damaged, or cannot be served.
    """
    self.engine, self.metrics, self.allowed = engine, metrics, tuple(allowed)
    self._catalog, self._documents, self._exit = state.catalog, state.documents, state.exit
    self._encoding = Encoding(engine, metrics.documents)
    self._served: dict[str, Served] = {}
    self._changing = threading.Lock()
    self._threads, self._calls = ThreadPoolExecutor(_THREADS, "search"), 0  # those that wait or run
    self._following = Following(self._catalog, self._catch_up)
    with self._catalog.reading():
      self._catalog.refresh()
      for entry in self._catalog:
        self._serve(self._catalog.load(entry))
      self._catalog.sweep()
    metrics.show(engine, self.progress)

  def start(self) -> None:
    """Compiles, and starts to encode documents. Requests are answered from now on."""
    for served in list(self._served.values()):
      if served.reranker:
        served.reranker.warm()
    lexical.tokenize(["warm"])  # its library compiles something for itself
    self.engine.warm()
    self._encoding.start()
    self._following.start()
    self._threads.submit(self._drop_orphans)

  def _drop_orphans(self) -> None:
    """Removes documents whose task was removed by a process that was killed in between."""
    with self._changing, self._catalog.changing():
      self._catalog.refresh()
      needed = {entry.collection for entry in self._catalog}
      for name in self._documents.names():
        if name not in needed:
          self._documents.drop(name)

  def stop(self, timeout: float = 20.0) -> None:
    """Answers what was accepted, and closes the state."""
    self._following.stop()
    self._encoding.stop(timeout / 2)
    self.engine.stop(timeout / 2)
    self._threads.shutdown(wait=True, cancel_futures=True)
    self._exit.close()

  # Tasks.

  def tasks(self) -> list[Served]:
    """All tasks, by name."""
    return [self._served[name] for name in sorted(self._served)]

  def served(self, name: str) -> Served:
    """A task.

    Raises:
      UnknownTask: there is none of this name.
    """
    if (served := self._served.get(name)) is None:
      raise UnknownTask(f"there is no task {name[:100]!r}")
    return served

  def put(self, name: str, given: Mapping[str, pathlib.Path], approximate: bool = False) -> tuple[Served, bool]:
    """Adds a task, or replaces the one of this name: its documents stay and are encoded again.

    Returns:
      The task, and whether there was one.

    Raises:
      InputError: see `Catalog.prepare`, or a prompt that the engine cannot serve; the former task stays.
    """
    with self._exclusively():
      former = self._catalog.get(name)
      loaded = self._catalog.prepare(name, given, approximate)
      if former == loaded.entry and name in self._served:
        return self._served[name], True
      try:
        self.engine.add(name, loaded.retriever)  # before anybody else sees the task: it may be refused
        self._catalog.put(loaded.entry)
        served = self._open(loaded)
      except BaseException:
        self._restore(name, former)
        raise
      finally:
        self._catalog.sweep()
    if served.reranker:
      self._threads.submit(served.reranker.warm)
    return served, former is not None

  @contextlib.contextmanager
  def _exclusively(self) -> Iterator[None]:
    """While inside, nobody else changes tasks, here or in another server, and all earlier changes are followed."""
    with self._changing, self._catalog.changing():
      self._catalog.refresh()
      self._follow(())
      yield

  def _catch_up(self, names: Sequence[str]) -> int:
    """Follows the changes of other servers; tasks of some names are opened again in any case."""
    with self._changing, self._catalog.reading():
      version = self._catalog.refresh()
      self._follow(names)
      return version

  def _follow(self, names: Sequence[str]) -> None:
    for name in [name for name in self._served if self._catalog.get(name) is None]:
      self._withdraw(name)
    for entry in self._catalog:
      served = self._served.get(entry.name)
      if served is not None and entry.name not in names:
        served.entry = dataclasses.replace(served.entry, imported=entry.imported)
        if served.entry == entry:
          continue
      try:
        served = self._serve(self._catalog.load(entry))
      except InputError as error:  # such as a prompt that another server's engine is large enough for
        log.error("the task %s cannot be served: %s", entry.name, error)
        self._withdraw(entry.name)
      else:
        if served.reranker:
          self._threads.submit(served.reranker.warm)
    self._catalog.sweep()

  def _serve(self, loaded: Loaded) -> Served:
    self.engine.add(loaded.entry.name, loaded.retriever)
    return self._open(loaded)

  def _open(self, loaded: Loaded) -> Served:
    entry = loaded.entry
    width, model = self.engine.backbone.config.hidden_size, loaded.retriever.hash
    collection = self._documents.open(entry.collection, width=width, model=model, approximate=entry.approximate)
    reranker = Reranker(loaded.cross_encoder) if loaded.cross_encoder else None
    served = self._served[entry.name] = Served(entry, collection, reranker, loaded.weight)
    self._encoding.watch(entry.name, collection)
    return served

  def _restore(self, name: str, former: Entry | None) -> None:
    """After a task that could not be put. What the state does not answer now is followed later."""
    with contextlib.suppress(StorageError):
      if former is None:
        self._withdraw(name)
        if self._catalog.get(name) is not None:
          self._catalog.remove(name)
      else:
        loaded = self._catalog.load(former)
        self.engine.add(name, loaded.retriever)
        if self._catalog.get(name) != former:
          self._catalog.put(former)
        self._open(loaded)

  def _withdraw(self, name: str) -> None:
    """Serves a task no more."""
    self._served.pop(name, None)
    self._encoding.forget(name)
    with contextlib.suppress(UnknownTask):
      self.engine.remove(name)
    self.metrics.forget(name)

  def remove(self, name: str) -> None:
    """Removes a task and its documents.

    Raises:
      UnknownTask: there is none of this name.
    """
    with self._exclusively():
      served = self.served(name)
      self._catalog.remove(name)
      self._withdraw(name)
      self._catalog.sweep()
    self._documents.drop(served.entry.collection)

  # Documents.

  def upsert(self, name: str, documents: Sequence[Document], vectors: np.ndarray | None = None) -> int:
    """Adds or replaces documents, on the disk when this returns; returns how many will be encoded."""
    served = self.served(name)
    more = {} if vectors is None else {"vectors": vectors}
    waiting = served.collection.upsert(documents, **more)
    if waiting:
      self._encoding.watch(name, served.collection)
    return waiting

  def imported(self, name: str, what: str) -> None:
    """Notes what was imported as a whole into a task's documents."""
    with self._exclusively():
      served = self.served(name)
      served.entry = dataclasses.replace(served.entry, imported=what)
      self._catalog.put(served.entry)

  def progress(self) -> dict[str, Progress]:
    """How far the documents of all tasks are encoded."""
    return {name: served.collection.progress() for name, served in list(self._served.items())}

  # Vectors and searches.

  async def encode(
    self, name: str, kind: str, texts: Sequence[Any], *, deadline: float | None = None, truncate: bool = False
  ) -> tuple[Task, Encoded]:
    """Vectors, and the task whose they are: it cannot have been replaced in between."""
    while True:
      task = self.engine.task(name)
      encoded = await self.engine.encode(name, kind, texts, deadline=deadline, truncate=truncate)
      if self.engine.task(name) is task:
        self.metrics.encoded(name, kind, encoded)
        return task, encoded

  async def run(self, function: Callable[..., T], *arguments: Any) -> T:
    """Calls what reads or writes documents, or takes long, in a thread.

    Raises:
      Busy: too many calls are waiting already.
    """
    if self._calls >= _MOST_CALLS:
      raise Busy(self._calls)
    self._calls += 1
    try:
      return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)
    finally:
      self._calls -= 1

  async def search(
    self, name: str, query: str, *, k: int = 10, mode: str = "vector", filters: Mapping[str, Any] | None = None,
    deadline: float | None = None, truncate: bool = False,
  ) -> Found:  # fmt: skip
    """Searches the documents of a task.

    Args:
      mode: 'vector' (inner product), 'bm25', 'fused' (both: by search.json's weight, or reciprocal rank), 'reranked'
        (the best 50 of 'fused', by the cross-encoder).
      filters: field → value, all of which must be equal.

    Raises:
      UnknownTask, InputError, TooLarge, Overloaded, DeadlineExceeded, StorageError.
    """
    served, seconds, started = self.served(name), {}, time.monotonic()
    checked = given_documents.check_filter(dict(filters or {}))
    if mode not in MODES:
      raise InputError("unknown mode", value=mode, fix=f"Known: {', '.join(MODES)}")
    if mode == "reranked" and served.reranker is None:
      raise InputError(f"the task {name} has no cross-encoder", value=mode, fix="Use vector, bm25 or fused")
    depth = k if mode in ("vector", "bm25") else max(k, rankings.FUSED_DEPTH)
    ranked: list[Ranked] = []
    truncated = 0
    if mode != "bm25":
      nearest, truncated = await self._nearest(name, query, depth, checked, deadline, truncate, seconds)
      ranked.append(nearest)
    if mode != "vector":
      async with _timed(seconds, "bm25"):
        ranked.append(await self.run(served.collection.bm25, query, depth, checked))
    best = ranked[0] if len(ranked) == 1 else rankings.fused(*ranked, served.weight)
    hits, progress = await self.run(self._hits, served, best, max(k, RERANKED_DEPTH) if mode == "reranked" else k)
    if mode == "reranked":
      async with _timed(seconds, "rerank"):
        hits = (await self.run(self._reranked, served.reranker, query, hits))[:k]
    seconds["total"] = time.monotonic() - started
    return Found(hits, seconds, progress, truncated)

  async def _nearest(
    self, name: str, query: str, depth: int, filters: dict[str, str], deadline: float | None, truncate: bool,
    seconds: dict[str, float],
  ) -> tuple[Ranked, int]:  # fmt: skip
    """The ranking by vectors, and how many tokens of the query were cut off."""
    while True:
      async with _timed(seconds, "encode"):
        task, encoded = await self.encode(name, "query", [query], deadline=deadline, truncate=truncate)
      try:
        async with _timed(seconds, "vector"):
          collection = self.served(name).collection
          ranked = await self.run(collection.nearest, encoded.vectors[0], task.hash, depth, filters)
        return ranked, int(encoded.cut[0])
      except StaleModel:  # between the new task in the engine and in its collection
        self._following.wake(name)
        await asyncio.sleep(0.01)

  def _hits(self, served: Served, ranked: Ranked, k: int) -> tuple[list[Hit], Progress]:
    rows, scores = ranked.rows[:k].tolist(), ranked.scores[:k].tolist()
    documents = served.collection.documents(rows)
    hits = [Hit(score, documents[row]) for row, score in zip(rows, scores, strict=True) if row in documents]
    return hits, served.collection.progress()

  def _reranked(self, reranker: Reranker, query: str, hits: list[Hit]) -> list[Hit]:
    if not hits:
      return []
    scores = reranker.scores(query, [(hit.document.title, hit.document.text) for hit in hits])
    order = np.argsort(-scores, kind="stable")
    return [Hit(float(scores[place]), hits[place].document) for place in order]


@contextlib.asynccontextmanager
async def _timed(seconds: dict[str, float], part: str) -> AsyncIterator[None]:
  started = time.monotonic()
  try:
    yield
  finally:
    seconds[part] = seconds.get(part, 0.0) + time.monotonic() - started
