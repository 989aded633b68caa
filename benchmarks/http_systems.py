"""Servers as processes of their own for serving_http.py and serving_soak.py: start, wait, memory, load by locust."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

HERE = pathlib.Path(__file__).parent
MB = 1e6


@dataclasses.dataclass(frozen=True)
class Memory:
  """Of some processes, in bytes: resident, and with every shared page divided by its users."""

  rss: int
  pss: int


class Server:
  """One or several processes that answer /v1/embeddings.

  Attributes:
    name: in tables.
    targets: {"url", "model"} of every task.
    ready_s: from the start until /health said ready, of the slowest.
  """

  def __init__(self, name: str, commands: Sequence[Sequence[str]], ports: Sequence[int], models: Sequence[str]):
    """Starts a command a port; with one port all models are there, with several each has one."""
    self.name, self._ports = name, ports
    self.urls = [f"http://127.0.0.1:{port}" for port in ports]
    urls = self.urls * len(models) if len(ports) == 1 else self.urls
    self.targets = [{"url": url, "model": model} for url, model in zip(urls, models, strict=True)]
    self._said = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the processes)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "JAX_PLATFORMS": "cpu",
                                "TOKENIZERS_PARALLELISM": "true"}  # fmt: skip
    environment["PYTHONPATH"] = str(HERE.parent)
    started = time.monotonic()
    self._processes = [
      subprocess.Popen(command, stdout=self._said, stderr=self._said, env=environment) for command in commands
    ]
    try:
      for url in self.urls:
        self._wait(url, started + 900)
    except BaseException:
      self.stop()
      raise
    self.ready_s = time.monotonic() - started

  def _wait(self, url: str, end: float) -> None:
    while time.monotonic() < end:
      if any(process.poll() is not None for process in self._processes):
        break
      with contextlib.suppress(OSError):
        urllib.request.urlopen(f"{url}/health", timeout=5).close()
        return
      time.sleep(0.02)
    self._said.seek(0)
    raise RuntimeError(f"{self.name} did not start:\n{self._said.read()[-3000:].decode(errors='replace')}")

  def memory(self) -> Memory:
    """Of all its processes and their children."""
    values = {"Rss": 0, "Pss": 0}
    for pid in _with_children([process.pid for process in self._processes]):
      text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
      for name in values:
        values[name] += 1024 * int(re.search(rf"^{name}:\s+(\d+)", text, re.M)[1])
    return Memory(values["Rss"], values["Pss"])

  def metric(self, name: str) -> float:
    """A number from our /metrics."""
    text = urllib.request.urlopen(f"{self.urls[0]}/metrics", timeout=60).read().decode()
    return float(re.search(rf"^{name} (\S+)", text, re.M)[1])

  def stop(self) -> list[int]:
    """SIGTERM; returns the exit statuses."""
    for process in self._processes:
      process.send_signal(signal.SIGTERM)
    for process in self._processes:
      try:
        process.wait(60)
      except subprocess.TimeoutExpired:
        process.kill()
    return [process.wait() for process in self._processes]


def _with_children(pids: Sequence[int]) -> list[int]:
  found = list(pids)
  for pid in found:
    with contextlib.suppress(OSError):
      for thread in pathlib.Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (thread / "children").read_text().split())
  return found


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
  """Stops it at the end."""
  try:
    yield server
  finally:
    server.stop()


def free_ports(count: int) -> list[int]:
  """Ports that nobody uses."""
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
    for one in sockets:
      one.bind(("127.0.0.1", 0))
    return [one.getsockname()[1] for one in sockets]


def ours(backbone: str, state: pathlib.Path, tasks: dict[str, pathlib.Path], *flags: str, counts: str = "") -> Server:
  """Our server with some tasks: name → directory of a retriever. `counts`: file for counted_server.py."""
  (port,) = free_ports(1)
  program = [str(HERE / "counted_server.py"), counts] if counts else ["-m", "dptdr_jax.serve"]
  given = [f"--task={name}={directory}" for name, directory in tasks.items()]
  command = [sys.executable, *program, f"--backbone={backbone}", f"--state={state}", f"--port={port}", *given, *flags]
  return Server("ours", [command], [port], list(tasks))


def sentence_transformers(peers: pathlib.Path, model: str, count: int) -> Server:
  """A process a task; they share the cores."""
  ports, threads = free_ports(count), max(1, (os.cpu_count() or 1) // count)
  program = [str(peers / "python"), str(HERE / "peer_server.py"), f"--model={model}", f"--threads={threads}"]
  models = [f"task{number}" for number in range(count)]
  return Server("sentence-transformers", [[*program, f"--port={port}"] for port in ports], ports, models)


def infinity(peers: pathlib.Path, model: str) -> Server:
  """The bare backbone."""
  (port,) = free_ports(1)
  program = [str(peers / "infinity_emb"), "v2", "--model-id", model, "--engine", "torch", "--device", "cpu"]
  program += ["--url-prefix", "/v1", "--served-model-name", "bare", "--port", str(port), "--host", "127.0.0.1"]
  return Server("infinity (bare backbone)", [program], [port], ["bare"])


@dataclasses.dataclass(frozen=True)
class Answers:
  """What locust got in a window of time.

  Attributes:
    rows: (start, milliseconds, status, model), by start.
    seconds: length of the window.
    asked: requests a second that were asked for; 0: as answers came.
  """

  rows: list[tuple[float, float, int, str]]
  seconds: float
  asked: float

  def served(self) -> list[float]:
    """Milliseconds of the answers with status 200."""
    return [row[1] for row in self.rows if row[2] == 200]

  def late(self) -> str:
    """A warning if locust has sent fewer requests than it should; else nothing."""
    sent = len(self.rows) / self.seconds
    return f" (only {sent:.0f} of {self.asked:.0f} requests/s were sent)" if sent < 0.95 * self.asked else ""

  def count(self, *statuses: int) -> int:
    """Answers with one of some statuses."""
    return sum(row[2] in statuses for row in self.rows)


def attack(
  peers: pathlib.Path, server: Server, texts: pathlib.Path, seconds: float, *, users: int, rate: float = 0.0,
  warm: float = 1.0, meanwhile: contextlib.AbstractContextManager | None = None,
) -> Answers:  # fmt: skip
  """Loads a server by locust.

  Args:
    texts: JSON, the texts of a request each.
    users: that send at once, or share the rate.
    rate: requests a second; 0: each user sends its next request when it has the answer.
    warm: seconds at the beginning that are not counted.
    meanwhile: is entered while the load runs.
  """
  with tempfile.TemporaryDirectory() as directory:
    targets, answers = pathlib.Path(directory, "targets.json"), pathlib.Path(directory, "answers.json")
    targets.write_text(json.dumps(server.targets))
    command = [str(peers / "locust"), "-f", str(HERE / "load.py"), "--headless", "--only-summary", f"--rate={rate}",
               f"--users={users}", f"--spawn-rate={users}", f"--run-time={seconds + warm + 2:g}s", "--stop-timeout=120",
               f"--targets={targets}", f"--texts={texts}", f"--answers={answers}"]  # fmt: skip
    # Locust's own statistics go nowhere: load.py writes every answer.
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
      with meanwhile or contextlib.nullcontext():
        _, said = job.communicate()
    finally:
      job.kill()  # after Ctrl-C; otherwise it has ended
    if job.returncode or not answers.exists():
      raise RuntimeError(f"locust failed:\n{said[-3000:].decode(errors='replace')}")
    rows = sorted(tuple(row) for row in json.loads(answers.read_text()))
  first = rows[0][0] + warm
  if rate:
    kept = [row for row in rows if first <= row[0] < first + seconds]
  else:
    kept = [row for row in rows if first <= row[0] + row[1] / 1000 < first + seconds]
  return Answers(kept, seconds, rate)
