"""The engine: texts of many tasks to vectors, in batches that all tasks share, on one backbone.

`submit` tokenizes in a small pool of threads and puts the texts in line. One thread forms batches and sends them to the
devices, another fetches results. Every program is compiled by `warm`; tasks are added and removed without compiling.
There is no HTTP here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from dptdr_jax.backbone import Backbone
from dptdr_jax.core.errors import InputError
from dptdr_jax.models import bank, prompts
from dptdr_jax.retriever import Retriever
from dptdr_jax.serving.device import Device
from dptdr_jax.serving.limits import DeadlineExceeded, Limits, Overloaded, Unavailable, UnknownTask
from dptdr_jax.serving.shapes import Shapes
from dptdr_jax.serving.tasks import Task
from dptdr_jax.serving.waiting import Batch, Request, Waiting

log = logging.getLogger(__name__)

_COMPILED = "/jax/core/compile/backend_compile_duration"  # jax.monitoring's event: a program was compiled or loaded
_SPEED_GAIN = 0.1  # weight of the newest batch in the measured speed
_TOKENIZERS = 2  # threads; the tokenizer itself uses more for a list
_LENGTH_STEP = 8  # prompt lengths of a bank are multiples of it, as fused attention wants even numbers of keys


@dataclasses.dataclass(frozen=True)
class Encoded:
  """The answer to one request.

  Attributes:
    vectors: float32 [n, H].
    tokens: int32 [n], tokens that were read of each text, with special tokens.
    cut: int32 [n], tokens of each text that were cut off; zeros unless `truncate` was set.
    queued, seconds: from submission to the first batch, and to the vectors.
  """

  vectors: np.ndarray
  tokens: np.ndarray
  cut: np.ndarray
  queued: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class BatchReport:
  """What one batch was, for metrics: rows and tokens are without padding, `padded_tokens` is width × size."""

  rows: int
  tokens: int
  padded_tokens: int
  tasks: int  # prompts
  seconds: float


class Engine:
  """Many tasks on one backbone.

  Usage: `engine = Engine(backbone)`, `engine.add(name, retriever)`, `engine.warm()`, then `await engine.encode(…)` or
  `engine.submit(…).result()`, and at the end `engine.stop()`.

  Attributes:
    ready: `warm` is done and `stop` was not called.
    compilations: programs that this process compiled since `warm`.
  """

  def __init__(
    self,
    backbone: Backbone,
    *,
    slots: int = 64,
    prompt_length: int = 64,
    max_tokens: int = 512,
    batch_tokens: int | None = None,
    longest_wait: float = 0.002,
    limits: Limits | None = None,
    on_batch: Callable[[BatchReport], None] | None = None,
  ):
    """Sets up an engine; nothing is compiled yet.

    Args:
      slots: prompts in the bank on the device; further tasks wait on the host.
      prompt_length: of the longest prompt that can be added.
      max_tokens: of the longest text that a task can read, special tokens included.
      batch_tokens: of a device's full batch, padding included. None: 2,048 on a CPU, 32,768 on an accelerator.
      longest_wait: seconds that a text waits for others to fill its batch.
      on_batch: called after each batch, from a thread of the engine.

    Raises:
      InputError: an architecture that a bank does not support.
    """
    bank.check_backbone(backbone.config)
    on_cpu = jax.default_backend() == "cpu"
    self.backbone, self.ready, self.compilations = backbone, False, 0
    longest = prompts.longest_input(backbone.config, prompts.PromptSpec("none")) or max_tokens
    batch_tokens = batch_tokens or (2048 if on_cpu else 32768)
    self._shapes = Shapes(min(max_tokens, longest), batch_tokens, backbone.mesh.size)
    self._device = Device(backbone, self._shapes, slots, -(-prompt_length // _LENGTH_STEP) * _LENGTH_STEP)
    self._longest_wait, self._limits, self._on_batch = longest_wait, limits or Limits(), on_batch
    self._tasks: dict[str, Task] = {}
    self._waiting = Waiting(self._shapes, slots)
    self._reserved = 0  # guessed tokens of requests in the tokenizer
    self._speed = 0.0  # tokens a second
    self._stopping = self._stopped = False
    self._changed = threading.Condition()  # its lock guards the tasks and everything that waits
    # Batches on the device: a second one would compete for a CPU's cores, and keeps an accelerator from waiting.
    self._room = threading.Semaphore(1 if on_cpu else 2)
    self._under_way: queue.SimpleQueue = queue.SimpleQueue()
    self._tokenizers = ThreadPoolExecutor(_TOKENIZERS, "tokenize")
    self._threads = [threading.Thread(target=run, name=run.__name__, daemon=True) for run in (self._send, self._fetch)]

  def warm(self) -> None:
    """Compiles every program, or loads it from JAX's persistent cache; measures the speed; starts to answer."""
    started = time.monotonic()
    self._device.compile()
    self._speed = self._device.measure()
    log.info("%d programs ready in %.1f s", len(self._shapes.all()), time.monotonic() - started)
    jax.monitoring.register_event_duration_secs_listener(self._count_compilation)
    for thread in self._threads:
      thread.start()
    self.ready = True

  def add(self, name: str, retriever: Retriever) -> None:
    """Adds a task, or replaces the one of this name: later requests use the new one.

    Raises:
      InputError: a retriever of another backbone, or one that this engine cannot serve.
    """
    task = Task.of(name, retriever, self.backbone)
    for kind, entry in task.entries.items():
      if len(entry.prompt) > self._device.length:
        raise InputError(
          f"this engine holds prompts of at most {self._device.length}, and the task {name} has one of",
          value=len(entry.prompt), fix="Raise prompt_length of the engine",
        )  # fmt: skip
      if task.settings.limit(kind) > self._shapes.longest:
        raise InputError(
          f"this engine reads at most {self._shapes.longest} tokens of a text, and the task {name}",
          value=task.settings.limit(kind), fix="Raise max_tokens of the engine",
        )  # fmt: skip
    with self._changed:
      former, self._tasks[name] = self._tasks.get(name), task
    if former is not None:
      self._device.unload(former.entries.values())

  def remove(self, name: str) -> None:
    """Removes a task; requests that were accepted before are still answered.

    Raises:
      UnknownTask: there is none of this name.
    """
    with self._changed:
      task = self.task(name)
      del self._tasks[name]
    self._device.unload(task.entries.values())

  def task(self, name: str) -> Task:
    """The task of a name.

    Raises:
      UnknownTask: there is none.
    """
    if (task := self._tasks.get(name)) is None:
      raise UnknownTask(f"there is no task {name!r}")
    return task

  @property
  def tasks(self) -> tuple[Task, ...]:
    """All tasks, in the order in which they were added."""
    return tuple(self._tasks.values())

  @property
  def queued_tokens(self) -> int:
    """Tokens that wait, those in the tokenizer included (guessed)."""
    return self._waiting.tokens + self._reserved

  @property
  def resident(self) -> int:
    """Prompts that are in the bank."""
    return len(self._device.slots)

  @property
  def evictions(self) -> int:
    """Prompts that left the bank to make room for others."""
    return self._device.slots.evictions

  async def encode(
    self, task: str, kind: str, texts: Iterable[Any], *, deadline: float | None = None, truncate: bool = False
  ) -> Encoded:
    """Vectors of texts. Cancelling the call takes its texts out of the queue. Arguments as in `submit`."""
    return await asyncio.wrap_future(self.submit(task, kind, texts, deadline=deadline, truncate=truncate))

  def submit(
    self, task: str, kind: str, texts: Iterable[Any], *, deadline: float | None = None, truncate: bool = False
  ) -> Future[Encoded]:
    """Puts texts in line.

    Args:
      task: its name.
      kind: 'query' or 'passage'.
      texts: as `Retriever.encode_queries` or `.encode_passages` takes them.
      deadline: in seconds of time.monotonic(). Texts that still wait then are dropped.
      truncate: cut texts off at the task's length and report by how much; else a longer text is an error.

    Returns:
      A future; cancelling it takes the texts out of the queue. It may raise TooLarge, DeadlineExceeded or Unavailable.

    Raises:
      UnknownTask, InputError (a text that is none), TooLarge, Overloaded, Unavailable.
    """
    found = self.task(task)
    prepared = found.texts(kind, texts)
    self._limits.check_texts(prepared)
    guess = min(found.guess_tokens(kind, prepared), self._limits.tokens)
    with self._changed:
      if not self.ready:
        raise Unavailable("the engine is not ready" if not self._stopping else "the engine is stopping")
      if (waiting := self.queued_tokens) + guess > self._limits.queued_tokens:
        raise Overloaded(waiting, max(1.0, waiting / self._speed))
      self._reserved += guess
    future: Future[Encoded] = Future()
    arguments = found, kind, prepared, truncate, guess, time.monotonic(), deadline, future
    self._tokenizers.submit(self._tokenize, *arguments)
    return future

  def stop(self, timeout: float = 30.0) -> None:
    """Refuses new requests, answers those that were accepted, and stops. Requests left after `timeout` s fail."""
    with self._changed:
      started, self.ready, self._stopping = self.ready, False, True
      self._changed.notify_all()
    end = time.monotonic() + timeout
    if started:
      for thread in self._threads:
        thread.join(max(0.0, end - time.monotonic()))
      jax.monitoring.unregister_event_duration_listener(self._count_compilation)
    with self._changed:
      self._stopped = True
      left = self._waiting.all()
      for request in left:
        self._waiting.remove(request)
    for request in left:
      _resolve(request.future, Unavailable("the engine stopped before these texts were encoded"))
    self._tokenizers.shutdown(wait=False)

  def _tokenize(self, task, kind, texts, truncate, guess, arrived, deadline, future) -> None:
    """Runs in a thread of the pool: texts to a request in line."""
    try:
      ids, cut = task.tokenize(kind, [] if future.cancelled() else texts, truncate)
      request = Request(task.entries[kind], kind, ids, cut, arrived, deadline, future)
      request.vectors = np.empty((len(ids), self.backbone.config.hidden_size), np.float32)
      self._limits.check_tokens(int(request.lengths.sum()))
    except Exception as error:  # whatever it is, somebody waits for it
      ids = []
      _resolve(future, error)
    with self._changed:
      self._reserved -= guess
      accepted = bool(ids) and not self._stopped
      if accepted:
        self._waiting.put(request)
      self._changed.notify_all()
    if accepted:
      future.add_done_callback(lambda _: self._drop(request))  # when cancelled; otherwise none of it waits by then
    elif ids:
      _resolve(future, Unavailable("the engine stopped before these texts were encoded"))
    elif not future.done():
      self._finish(request)

  def _drop(self, request: Request) -> None:
    with self._changed:
      self._waiting.remove(request)

  def _send(self) -> None:
    """Runs in a thread: forms batches and sends them to the devices."""
    while True:
      self._room.acquire()  # a batch is formed when the device can take it, so that late queries are in it
      batch = self._next_batch()
      if batch is None:
        self._under_way.put(None)
        return
      started = time.monotonic()
      for row in batch.rows:
        row.request.started = row.request.started or started
      try:
        self._under_way.put((batch, started, self._device.send(batch)))
      except Exception as error:  # such as no memory: the next batch may be smaller
        self._room.release()
        self._fail(batch, error)

  def _next_batch(self) -> Batch | None:
    """Waits for the rows of the next batch. None: the engine stops, and nothing waits."""
    while True:
      with self._changed:
        now = time.monotonic()
        expired = self._waiting.expired(now)
        for request in expired:
          self._waiting.remove(request)
        delay = self._waiting.delay(now, 0.0 if self._stopping else self._longest_wait)
        if delay == 0 and not expired:
          return self._waiting.take()
        if delay is None and self._stopping and not self._reserved:
          return None
        if not expired:
          self._changed.wait(delay)
      for request in expired:
        _resolve(request.future, DeadlineExceeded("the deadline passed while these texts waited"))

  def _fetch(self) -> None:
    """Runs in a thread: fetches vectors and resolves futures."""
    while (item := self._under_way.get()) is not None:
      batch, started, result = item
      try:
        vectors = np.asarray(result)
      except Exception as error:  # computed asynchronously: errors of the device appear here
        self._fail(batch, error)
        continue
      finally:
        self._room.release()
      seconds = time.monotonic() - started
      for (request, place), vector in zip(batch.rows, vectors, strict=False):
        request.vectors[place] = vector
        request.left -= 1
        if not request.left:
          self._finish(request)
      self._report(batch, seconds)

  def _finish(self, request: Request) -> None:
    now = time.monotonic()
    queued = (request.started or now) - request.arrived
    _resolve(request.future, Encoded(request.vectors, request.lengths, request.cut, queued, now - request.arrived))

  def _fail(self, batch: Batch, error: Exception) -> None:
    log.error("a batch of %d texts failed: %s", len(batch.rows), error)
    for request in dict.fromkeys(row.request for row in batch.rows):
      self._drop(request)
      _resolve(request.future, error)

  def _report(self, batch: Batch, seconds: float) -> None:
    tokens = sum(int(request.lengths[place]) for request, place in batch.rows)
    self._speed += _SPEED_GAIN * (tokens / seconds - self._speed)
    if self._on_batch is not None:
      count = len({row.request.entry for row in batch.rows})
      try:
        self._on_batch(BatchReport(len(batch.rows), tokens, batch.width * batch.size, count, seconds))
      except Exception:
        log.exception("on_batch failed")

  def _count_compilation(self, event: str, seconds: float, **_: Any) -> None:
    if event == _COMPILED:
      self.compilations += 1


def _resolve(future: Future, result: Encoded | Exception) -> None:
  """Answers a request, unless it was cancelled."""
  with contextlib.suppress(InvalidStateError):
    if isinstance(result, Exception):
      future.set_exception(result)
    else:
      future.set_result(result)
