"""Encodes documents in the background: takes those without a vector, a few batches at a time, task after task."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from dptdr_jax.core.errors import DptdrError, InputError
from dptdr_jax.serving.collections import Collection, Made, Pending, StorageError
from dptdr_jax.serving.engine import Encoded, Engine
from dptdr_jax.serving.limits import Overloaded, TooLarge, Unavailable, UnknownTask
from dptdr_jax.serving.tasks import Task

log = logging.getLogger(__name__)

_BATCH = 64  # documents of one request to the engine
_AHEAD = 3  # requests under way: the engine has the next batch when one ends
_RETRY_S = 5.0  # after the disk is full, say


class Encoding:
  """One thread. It stops between two batches, and loses nothing: what has no vector in the store is taken again."""

  def __init__(self, engine: Engine, on_stored: Callable[[str, int], None] = lambda task, count: None):
    """`on_stored` is told the task and how many documents have a vector since."""
    self._engine, self._on_stored = engine, on_stored
    self._tasks: dict[str, Collection] = {}
    self._changed = threading.Condition()
    self._stopping = False
    self._under_way: dict[Future[Encoded], tuple[str, Task, Collection, list[Pending]]] = {}
    self._not_before: dict[str, float] = {}
    self._thread = threading.Thread(target=self._run, name="documents", daemon=True)

  def start(self) -> None:
    """Starts the thread."""
    self._thread.start()

  def watch(self, name: str, collection: Collection) -> None:
    """Encodes the documents of a task from now on; call it again after documents came."""
    with self._changed:
      self._tasks[name] = collection
      self._changed.notify_all()

  def forget(self, name: str) -> None:
    """The task is gone."""
    with self._changed:
      self._tasks.pop(name, None)

  def stop(self, timeout: float = 10.0) -> None:
    """Waits until the batches under way are stored."""
    with self._changed:
      self._stopping = True
      self._changed.notify_all()
    if self._thread.is_alive():
      self._thread.join(timeout)

  def _run(self) -> None:
    while not self._stopping or self._under_way:
      try:
        self._fill()
        if not self._under_way:
          with self._changed:
            if not self._stopping:
              self._changed.wait(1.0 if not self._not_before else 0.2)
          continue
        done, _ = concurrent.futures.wait(self._under_way, 0.5, concurrent.futures.FIRST_COMPLETED)
        for future in done:
          self._take(future, *self._under_way.pop(future))
      except DptdrError as error:
        log.warning("encoding documents: %s", error)
        time.sleep(1.0)
      except Exception:  # whatever it is, the other tasks' documents still have to be encoded
        log.exception("encoding documents")
        time.sleep(1.0)

  def _fill(self) -> None:
    """Sends the next batches, one of each task in turn."""
    sent = True
    while sent and not self._stopping:
      sent = False
      with self._changed:
        tasks = list(self._tasks.items())
      for name, collection in tasks:
        if len(self._under_way) >= _AHEAD:
          return
        if self._not_before.get(name, 0.0) > time.monotonic():
          continue
        self._not_before.pop(name, None)
        try:
          taken = collection.take_pending(_BATCH)
        except (StorageError, UnknownTask) as error:  # a database that is away; a task that another server removed
          log.info("%s: no documents are read: %s", name, error)
          self._not_before[name] = time.monotonic() + _RETRY_S
          continue
        if taken:
          self._submit(name, collection, taken)
          sent = True
          with self._changed:  # to the end of the line
            if name in self._tasks:
              self._tasks[name] = self._tasks.pop(name)

  def _submit(self, name: str, collection: Collection, taken: list[Pending]) -> None:
    texts = [{"title": one.document.title, "text": one.document.text} for one in taken]
    rows = [one.row for one in taken]
    try:
      task = self._engine.task(name)
      future = self._engine.submit(name, "passage", texts, truncate=True)
    except (Overloaded, Unavailable, UnknownTask) as error:
      collection.give_back(rows)
      self._not_before[name] = time.monotonic() + min(getattr(error, "retry_after", 0.5), 2.0)
    except (TooLarge, InputError) as error:
      self._refused(name, self._engine.task(name), collection, taken, error)
    except BaseException:
      collection.give_back(rows)
      raise
    else:
      self._under_way[future] = name, task, collection, taken

  def _refused(self, name: str, task: Task, collection: Collection, taken: list[Pending], error: DptdrError) -> None:
    """One document of several may be at fault: each is tried alone, and the one at fault is marked."""
    if len(taken) > 1:
      for one in taken:
        self._submit(name, collection, [one])
    else:
      self._store(name, task, collection, [Made(taken[0].row, None, error=str(error))])

  def _take(self, future: Future[Encoded], name: str, task: Task, collection: Collection, taken: list[Pending]) -> None:
    rows = [one.row for one in taken]
    try:
      encoded = future.result()
    except (TooLarge, InputError) as error:
      self._refused(name, task, collection, taken, error)
    except BaseException as error:
      collection.give_back(rows)
      self._not_before[name] = time.monotonic() + 0.5
      if not isinstance(error, DptdrError | concurrent.futures.CancelledError):
        raise
    else:
      if self._engine_has(name, task):
        parts = zip(rows, encoded.vectors, encoded.cut, strict=True)
        self._store(name, task, collection, [Made(row, vector, int(cut)) for row, vector, cut in parts])
      else:
        collection.give_back(rows)

  def _engine_has(self, name: str, task: Task) -> bool:
    """Whether the batch was encoded by this task: it may have been replaced between `task` and `submit`."""
    try:
      return self._engine.task(name) is task
    except UnknownTask:
      return False

  def _store(self, name: str, task: Task, collection: Collection, made: list[Made]) -> None:
    try:
      collection.store(task.hash, made)
    except StorageError as error:
      log.warning("%s: vectors are not stored: %s", name, error)
      collection.give_back([one.row for one in made])
      self._not_before[name] = time.monotonic() + _RETRY_S
    else:
      self._on_stored(name, len(made))
