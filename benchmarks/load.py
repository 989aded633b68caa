"""Requests for vectors by locust, at a constant rate or as fast as answers come. serving_http.py starts it.

  locust -f benchmarks/load.py --headless --users=200 --spawn-rate=200 --run-time=20s --rate=100 \
    --targets=TARGETS.json --texts=TEXTS.json --answers=ANSWERS.json

With --rate every user has its own schedule (constant_throughput) and a random phase, so that a slow answer delays no
other request: the load is open as long as a user's turns are longer than the slowest answer. Without, each user sends
its next request when it has the answer. TARGETS.json lists {"url", "model"}, TEXTS.json the texts of one request each
(a list of lists). ANSWERS.json gets [start, milliseconds, status, model] of every request; status 0: no answer.
"""

from __future__ import annotations

import json
import pathlib
import random
import time

import gevent
from locust import FastHttpUser, constant_throughput, events, task

_ANSWERS: list[tuple[float, float, int, str]] = []


@events.init_command_line_parser.add_listener
def define(parser) -> None:
  """Adds the flags."""
  parser.add_argument("--rate", type=float, default=0.0, help="requests a second of all users; 0: as answers come")
  parser.add_argument("--targets", required=True)
  parser.add_argument("--texts", required=True)
  parser.add_argument("--answers", required=True)


@events.init.add_listener
def prepare(environment, **_) -> None:
  """Reads what to send; sets the pace."""
  given = environment.parsed_options
  targets = json.loads(pathlib.Path(given.targets).read_text())
  Client.by_url = {}
  for one in targets:
    Client.by_url.setdefault(one["url"], []).append(one["model"])
  Client.texts = json.loads(pathlib.Path(given.texts).read_text())
  Client.turn_s = given.num_users / given.rate if given.rate else 0.0
  if given.rate:
    Client.wait_time = constant_throughput(1 / Client.turn_s)


@events.request.add_listener
def note(response_time, response, exception, start_time, context, **_) -> None:
  """Notes one answer."""
  _ANSWERS.append((start_time, response_time, getattr(response, "status_code", 0) or 0, context.get("model", "")))


@events.quitting.add_listener
def write(environment, **_) -> None:
  """Writes all answers."""
  pathlib.Path(environment.parsed_options.answers).write_text(json.dumps(_ANSWERS))
  environment.process_exit_code = 0  # refusals are counted by whoever reads them


class Client(FastHttpUser):
  """One client, with connections of its own to one of the addresses."""

  host = "http://127.0.0.1"
  network_timeout = connection_timeout = 120.0
  by_url: dict[str, list[str]]
  texts: list[list[str]]
  turn_s: float

  def on_start(self) -> None:
    """Draws an address and a phase."""
    self.url = random.choice(list(self.by_url))
    gevent.sleep(random.random() * (self.turn_s or 0.2))
    self._cp_last_run = time.perf_counter()  # of constant_throughput: else it counts the phase, and all meet again

  def wait_time(self) -> float:
    """No pause; `prepare` replaces this if there is a rate."""
    return 0.0

  @task
  def embed(self) -> None:
    """Asks one of the address' models for vectors."""
    model = random.choice(self.by_url[self.url])
    given = {"model": model, "input": random.choice(self.texts)}
    self.client.post(f"{self.url}/v1/embeddings", json=given, name="embeddings", context={"model": model})
