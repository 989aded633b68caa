"""The engine's answers are those of the retrievers, whatever is mixed; and what it refuses and gives up."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import threading
import time

import jax
import numpy as np
import pytest
from support import tiny

from dptdr_jax import Backbone, Retriever
from dptdr_jax.core.errors import InputError
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.serving.engine import Engine
from dptdr_jax.serving.limits import DeadlineExceeded, Limits, Overloaded, TooLarge, Unavailable, UnknownTask

TEXTS = [text for _, text in tiny.sentences(24, 4, seed=1)]
SIZES = dict(slots=3, prompt_length=8, max_tokens=32, batch_tokens=64, longest_wait=0.001)
LIMITS = Limits(texts=64, characters=4000, tokens=600, queued_tokens=2400)


@pytest.fixture(scope="module")
def engine(backbone, retrievers):
  """An engine with fewer slots than tasks."""
  engine = Engine(backbone, **SIZES, limits=LIMITS)
  for name, retriever in retrievers.items():
    engine.add(name, retriever)
  engine.warm()
  yield engine
  engine.stop()


@contextlib.contextmanager
def held(engine):
  """While inside, batches are formed but not sent to the device."""
  send, gate = engine._device.send, threading.Event()

  def wait(batch):
    gate.wait(20)
    return send(batch)

  engine._device.send = wait
  try:
    yield
  finally:
    gate.set()
    engine._device.send = send


def expected(retriever, kind, texts):
  return (retriever.encode_queries if kind == "query" else retriever.encode_passages)(texts)


def check(encoded, retriever, kind, texts):
  np.testing.assert_allclose(encoded.vectors, expected(retriever, kind, texts), rtol=0, atol=2e-5)
  assert encoded.vectors.dtype == np.float32 and encoded.tokens.shape == encoded.cut.shape == (len(texts),)


def test_mixed_batches_give_the_vectors_of_each_retriever_and_compile_nothing(engine, retrievers):
  reports = []
  engine._on_batch = reports.append
  rng = np.random.default_rng(0)
  asked = []
  with held(engine):
    for _ in range(30):
      name, kind = str(rng.choice(list(retrievers))), str(rng.choice(["query", "passage"]))
      texts = [str(text) for text in rng.choice(TEXTS, rng.integers(1, 4))]
      asked.append((name, kind, texts, engine.submit(name, kind, texts)))
    time.sleep(0.1)
  answers = [(name, kind, texts, future.result(30)) for name, kind, texts, future in asked]
  engine._on_batch = None
  assert engine.compilations == 0, "before the retrievers themselves compile"
  for name, kind, texts, encoded in answers:
    check(encoded, retrievers[name], kind, texts)
  assert max(report.tasks for report in reports) == 3 == engine.resident
  assert engine.evictions > 0 and engine.queued_tokens == 0


def test_counter_counts_compilations(engine):
  before = engine.compilations
  jax.jit(lambda x: x * 3.25 + before)(np.zeros(3)).block_until_ready()
  assert engine.compilations > before
  engine.compilations = 0


def test_tasks_are_added_replaced_and_removed_without_compiling_or_stale_vectors(engine, tune):
  texts, versions = TEXTS[:3], [tune(20, pooling="mean"), tune(21)]
  wanted = [expected(version, "passage", texts) for version in versions]
  engine.compilations = 0
  with held(engine):
    engine.add("new", versions[0])
    before = engine.submit("new", "passage", texts)
    time.sleep(0.05)
    engine.add("new", versions[1])
    after = engine.submit("new", "passage", texts)
    engine.remove("new")
    with pytest.raises(UnknownTask, match="no task 'new'"):
      engine.submit("new", "passage", texts)
  for future, vectors in zip((before, after), wanted, strict=True):
    np.testing.assert_allclose(future.result(20).vectors, vectors, rtol=0, atol=2e-5)
  assert engine.compilations == 0 and "new" not in [task.name for task in engine.tasks]


def test_answers_in_asyncio_and_cancellation_frees_the_place(engine, retrievers):
  async def run():
    with held(engine):
      first = asyncio.create_task(engine.encode("tied", "query", TEXTS[:2]))
      await asyncio.sleep(0.1)
      cancelled = asyncio.create_task(engine.encode("tied", "query", TEXTS[2:6]))
      await asyncio.sleep(0.1)
      waiting = engine.queued_tokens
      cancelled.cancel()
      with pytest.raises(asyncio.CancelledError):
        await cancelled
      assert waiting > 0 and engine.queued_tokens == 0
    return await first

  check(asyncio.run(run()), retrievers["tied"], "query", TEXTS[:2])


def test_texts_that_wait_past_their_deadline_are_dropped(engine, retrievers):
  with held(engine):
    first = engine.submit("tied", "query", TEXTS[:1])
    time.sleep(0.1)
    late = engine.submit("tied", "query", TEXTS[1:3], deadline=time.monotonic() + 0.05)
    time.sleep(0.2)
  with pytest.raises(DeadlineExceeded):
    late.result(20)
  check(first.result(20), retrievers["tied"], "query", TEXTS[:1])
  assert engine.queued_tokens == 0


def test_overload_is_refused_at_once_and_says_when_to_retry(engine, retrievers):
  with held(engine):
    first = engine.submit("tied", "passage", TEXTS[:1])
    time.sleep(0.1)
    accepted = [engine.submit("tied", "passage", TEXTS[:8]) for _ in range(8)]
    time.sleep(0.1)
    with pytest.raises(Overloaded, match="tokens are waiting. Try again in") as refused:
      accepted.extend(engine.submit("tied", "passage", TEXTS[:8]) for _ in range(100))
    assert refused.value.retry_after >= 1 and engine.queued_tokens <= LIMITS.queued_tokens
  for future in [first, *accepted]:
    future.result(20)
  check(engine.submit("tied", "query", TEXTS[:1]).result(20), retrievers["tied"], "query", TEXTS[:1])


@pytest.mark.parametrize(
  ("kind", "texts", "error", "message"),
  [
    ("query", ["merge"] * 65, TooLarge, "65 texts in one request; at most 64"),
    ("query", ["x" * 4001], TooLarge, "4001 characters"),
    ("passage", ["merge quick heap stable order " * 4] * 60, TooLarge, "characters in one request; at most 4000"),
    ("passage", ["a b c d e f g h i j k l m n"] * 60, TooLarge, "960 tokens in one request; at most 600"),
    ("query", ["merge", "merge " * 30], TooLarge, "query 1 has 32 tokens, and the task tied reads 16.*truncate"),
    ("query", ["merge", " "], InputError, "query 1 is empty"),
    ("query", "merge", InputError, "list"),
    ("doc", ["merge"], InputError, "unknown kind of text: 'doc'"),
  ],
)
def test_requests_that_cannot_be_answered_are_refused(engine, kind, texts, error, message):
  with pytest.raises(error, match=message):
    engine.submit("tied", kind, texts).result(20)
  assert engine.queued_tokens == 0


def test_truncation_is_reported_and_an_empty_list_is_answered(engine, retrievers):
  texts = ["merge", "merge quick heap " * 9]
  encoded = engine.submit("tied", "query", texts, truncate=True).result(20)
  check(encoded, retrievers["tied"], "query", texts)
  assert encoded.tokens.tolist() == [3, 16] and encoded.cut.tolist() == [0, 13]
  assert engine.submit("tied", "query", []).result(20).vectors.shape == (0, 32)


def test_failed_batch_fails_its_requests_only(engine, retrievers):
  send, failures = engine._device.send, [RuntimeError("out of memory")]

  def fail_once(batch):
    if failures:
      engine._device._bank.prompts.delete()  # as a failed write leaves it
      raise failures.pop()
    return send(batch)

  engine._device.send = fail_once
  with pytest.raises(RuntimeError, match="out of memory"):
    engine.submit("tied", "query", TEXTS[:2]).result(20)
  engine._device.send = send
  for name in ("untied", "long"):
    check(engine.submit(name, "query", TEXTS[:2]).result(20), retrievers[name], "query", TEXTS[:2])


def test_retrievers_that_cannot_be_served_are_refused(engine, backbone, tune, tmp_path):
  other = Retriever.untuned(Backbone.load(tiny.backbone(tmp_path, seed=3)), passage_length=32)
  refused = {
    "trained on another backbone": other,
    "two backbones": dataclasses.replace(tune(5), passage_backbone=other.backbone),
    "shallow prompts cannot share": tune(5, PromptSpec("shallow", 3)),
    "prompts of at most 8, and the task new has one of: 9": tune(5, PromptSpec("deep", 9)),
    "at most 32 tokens of a text, and the task new: 64": tune(5, passage_length=64),
  }
  for message, retriever in refused.items():
    with pytest.raises(InputError, match=message):
      engine.add("new", retriever)
  with pytest.raises(InputError, match="no request of 9 tokens could ever wait: 5"):
    Limits(tokens=9, queued_tokens=5)


def test_stop_answers_what_was_accepted_and_refuses_the_rest(backbone, retrievers):
  engine = Engine(backbone, **SIZES | {"max_tokens": 16})
  engine.add("tied", dataclasses.replace(retrievers["bare"], settings=dataclasses.replace(
    retrievers["bare"].settings, passage_length=16)))  # fmt: skip
  with pytest.raises(Unavailable, match="not ready"):
    engine.submit("tied", "query", TEXTS[:1])
  engine.warm()
  with held(engine):
    accepted = [engine.submit("tied", "query", TEXTS[:4]) for _ in range(10)]
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    time.sleep(0.1)
    with pytest.raises(Unavailable, match="stopping"):
      engine.submit("tied", "query", TEXTS[:1])
  stopping.join(20)
  assert not stopping.is_alive()
  assert all(future.result(0).vectors.shape == (4, 32) for future in accepted)


def test_stop_fails_what_is_left_after_its_timeout(backbone, retrievers):
  engine = Engine(backbone, **SIZES)
  engine.add("tied", retrievers["tied"])
  engine.warm()
  with held(engine):
    first = engine.submit("tied", "query", TEXTS[:1])
    time.sleep(0.1)
    left = engine.submit("tied", "query", TEXTS[:1])
    time.sleep(0.05)
    engine.stop(timeout=0.1)
    with pytest.raises(Unavailable, match="stopped before"):
      left.result(0)
  concurrent.futures.wait([first], 20)
  assert first.done()
