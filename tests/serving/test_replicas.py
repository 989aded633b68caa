"""Two replicas by Ray on one database: a killed one is missed by nobody, and both follow a change of the tasks."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
from support import postgres, quick, server

from dptdr_jax.retriever import Retriever

pytest.importorskip("ray.serve", reason="ray is not installed")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def database():
  with postgres.started() as started:
    yield started.url(started.new())


@pytest.fixture(scope="module")
def running(tmp_path_factory, database):
  """The address of two replicas, and the directory of what they can serve."""
  directory = tmp_path_factory.mktemp("replicas")
  server.models(directory)
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  command = [sys.executable, "launch/serve_ray.py", f"--backbone={directory / 'backbone'}", f"--state={database}",
             f"--port={port}", "--cpus=0.5", *server.FLAGS]  # fmt: skip
  environment = os.environ | {"XLA_FLAGS": quick.xla_flags(), "RAY_USAGE_STATS_ENABLED": "0"}
  started = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
  assert "ready" in started.stdout.readline()
  yield httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60), directory
  started.terminate()
  assert started.wait(60) == 0


def put(client, directory, name, retriever):
  files = {part: (directory / retriever / part).read_bytes() for part in ("retriever.json", "prompts.safetensors")}
  assert client.put(f"/tasks/{name}", files=files).status_code in (200, 201)


def replicas() -> set[int]:
  """Process ids of the replicas, which Ray names after their deployment."""
  listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
  return {int(line.split()[0]) for line in listed if "ServeReplica:dptdr" in line}


def test_killed_replica_is_missed_by_nobody_and_all_follow_the_tasks(running):
  client, directory = running
  put(client, directory, "a", "a")
  time.sleep(3)
  assert client.post("/tasks/a/documents", json={"documents": server.documents(50)}).json()["stored"] == 50
  answers, stopping = [], threading.Event()

  def ask():
    with httpx.Client(base_url=client.base_url, timeout=60) as own:
      while not stopping.is_set():
        answers.append(own.post("/v1/embeddings", json={"model": "a-query", "input": "merge sort"}).status_code)

  threads = [threading.Thread(target=ask) for _ in range(4)]
  for thread in threads:
    thread.start()
  time.sleep(2)
  before = replicas()
  assert len(before) == 2
  os.kill(min(before), signal.SIGKILL)
  deadline = time.monotonic() + 90
  while len(replicas() - {min(before)}) < 2:
    assert time.monotonic() < deadline, "no replica took the place of the killed one"
    time.sleep(0.5)
  time.sleep(3)
  stopping.set()
  for thread in threads:
    thread.join()
  failed = sum(status != 200 for status in answers)
  assert failed <= 4 and len(answers) > 50, (failed, len(answers))  # at most what was under way in the killed process

  put(client, directory, "a", "b")
  time.sleep(3)
  vectors = np.array([client.post("/t/a-query/embed", json={"inputs": "merge sort"}).json()[0] for _ in range(20)])
  expected = Retriever.load(directory / "b").encode_queries(["merge sort"])
  np.testing.assert_allclose(vectors, np.repeat(expected, 20, axis=0), rtol=0, atol=1e-5)
