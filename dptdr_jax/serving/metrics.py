"""What /metrics shows, in Prometheus' form. Labels are tasks of this server and routes, never texts of clients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import prometheus_client
from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dptdr_jax.serving.collections import Progress, StorageError
from dptdr_jax.serving.engine import BatchReport, Encoded, Engine

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKENS = (16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768)
_TASKS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
  """Counters and histograms of one server."""

  def __init__(self):
    self.registry = registry = prometheus_client.CollectorRegistry()
    by = {"registry": registry, "namespace": "dptdr"}
    self._requests = Counter("requests", "HTTP requests.", ["route", "status"], **by)
    self._request_seconds = Histogram("request_seconds", "From a request's headers to the end of its answer.",
                                      ["route"], buckets=_SECONDS, **by)  # fmt: skip
    self._queue = Histogram("queue_seconds", "From a request for vectors to its first batch.", ["task", "kind"],
                            buckets=_SECONDS, **by)  # fmt: skip
    self._inference = Histogram("inference_seconds", "From the first batch of a request to its vectors.",
                                ["task", "kind"], buckets=_SECONDS, **by)  # fmt: skip
    self._tokens = Counter("tokens", "Tokens encoded for requests, without padding.", ["task", "kind"], **by)
    self._batch_seconds = Histogram("batch_seconds", "A batch on the device.", buckets=_SECONDS, **by)
    self._batch_tokens = Histogram("batch_tokens", "Tokens of a batch, without padding.", buckets=_TOKENS, **by)
    self._batch_tasks = Histogram("batch_tasks", "Prompts of a batch.", buckets=_TASKS, **by)
    self._padding = Counter("padding_tokens", "Tokens of batches that were padding.", **by)
    self._documents = Counter("documents_encoded", "Documents that got a vector.", ["task"], **by)

  def show(self, engine: Engine, progress: Callable[[], dict[str, Progress]]) -> None:
    """Adds what is read at each scrape."""
    self.registry.register(_Live(engine, progress))

  def request(self, route: str, status: int, seconds: float) -> None:
    """One answer."""
    self._requests.labels(route, str(status)).inc()
    self._request_seconds.labels(route).observe(seconds)

  def encoded(self, task: str, kind: str, encoded: Encoded) -> None:
    """Vectors of one request."""
    self._queue.labels(task, kind).observe(encoded.queued)
    self._inference.labels(task, kind).observe(encoded.seconds - encoded.queued)
    self._tokens.labels(task, kind).inc(int(encoded.tokens.sum()))

  def batch(self, report: BatchReport) -> None:
    """One batch of the engine."""
    self._batch_seconds.observe(report.seconds)
    self._batch_tokens.observe(report.tokens)
    self._batch_tasks.observe(report.tasks)
    self._padding.inc(report.padded_tokens - report.tokens)

  def documents(self, task: str, count: int) -> None:
    """Documents that got a vector."""
    self._documents.labels(task).inc(count)

  def forget(self, task: str) -> None:
    """Removes a task's series."""
    for metric in (self._queue, self._inference, self._tokens):
      for kind in ("query", "passage"):
        with contextlib.suppress(KeyError):  # there was no such request
          metric.remove(task, kind)
    with contextlib.suppress(KeyError):
      self._documents.remove(task)

  def text(self) -> bytes:
    """The answer to a scrape."""
    return prometheus_client.generate_latest(self.registry)


class _Live(Collector):
  def __init__(self, engine: Engine, progress: Callable[[], dict[str, Progress]]):
    self._engine, self._progress = engine, progress

  def describe(self) -> Iterator[Metric]:
    """Nothing: registration must not read the documents."""
    return iter(())

  def collect(self) -> Iterator[Metric]:
    """What the engine and the documents say now."""
    engine = self._engine
    yield GaugeMetricFamily("dptdr_ready", "1: requests are answered.", float(engine.ready))
    yield GaugeMetricFamily("dptdr_tasks", "Tasks.", len(engine.tasks))
    yield GaugeMetricFamily("dptdr_queued_tokens", "Tokens that wait.", engine.queued_tokens)
    yield GaugeMetricFamily("dptdr_bank_prompts", "Prompts on the device.", engine.resident)
    yield CounterMetricFamily("dptdr_bank_evictions", "Prompts that made room for others.", engine.evictions)
    yield CounterMetricFamily("dptdr_compilations", "Programs compiled since the server was ready.",
                              engine.compilations)  # fmt: skip
    states = GaugeMetricFamily("dptdr_documents", "Documents by state.", labels=["task", "state"])
    with contextlib.suppress(StorageError):  # a database that is away hides its own numbers alone
      for name, progress in self._progress().items():
        for state in ("encoded", "pending", "failed", "truncated"):
          states.add_metric([name, state], getattr(progress, state))
    yield states
