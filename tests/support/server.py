"""A server in a process of its own, on a tiny random backbone, and what its tests need."""

from __future__ import annotations

import contextlib
import importlib
import pathlib
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

import httpx
import jax
from commands.common import run_command
from support import forks, tiny

from dptdr_jax.backbone import Backbone
from dptdr_jax.models import cross, prompts
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.reranker import CrossEncoder, PairSettings
from dptdr_jax.retriever import Retriever, VectorSettings

FLAGS = ("--slots=4", "--prompt-length=8", "--max-tokens=48", "--batch-tokens=256")  # few and small programs


def retriever(backbone: Backbone, seed: int, length: int = 4, **settings) -> Retriever:
  """A random retriever whose prompt matters."""
  spec = PromptSpec(kind="deep", length=length)
  prompt = jax.tree.map(lambda x: 30 * x, prompts.init_prompt(jax.random.key(seed), spec, backbone.config))
  settings = {"query_length": 16, "passage_length": 32, "normalize": True} | settings
  return Retriever(backbone, spec, {"query": prompt, "passage": prompt}, VectorSettings(**settings))


def cross_encoder(backbone: Backbone) -> CrossEncoder:
  """A random cross-encoder."""
  spec = PromptSpec(kind="deep", length=4)
  trainable = cross.init_cross(jax.random.key(0), spec, backbone.config, "match")
  return CrossEncoder(backbone, spec, trainable, PairSettings(query_length=16, pair_length=48))


def documents(count: int, seed: int = 0) -> list[dict]:
  """Documents of tiny's words, with two fields."""
  return [
    {"id": f"d{row}", "title": topic, "text": text, "topic": topic, "row": row}
    for row, (topic, text) in enumerate(tiny.sentences(count, 12, seed))
  ]


def _serve(given: Sequence[str], own_programs: bool, constants: Mapping[str, float]) -> None:
  for name, value in constants.items():
    module, _, constant = name.rpartition(".")
    setattr(importlib.import_module(f"dptdr_jax.serving.{module}"), constant, value)
  if own_programs:
    jax.config.update("jax_compilation_cache_dir", None)
  run_command("serve", given)


class Server:
  """A started server.

  Attributes:
    url: where it answers.
    process: it.
    client: of httpx, with the address set.
  """

  def __init__(
    self, flags: Sequence[str], key: str = "", own_programs: bool = False, constants: Mapping[str, float] | None = None
  ):
    """Starts.

    Args:
      own_programs: it keeps compiled programs in its state, as it does for users.
      constants: "module.NAME" of the serving room → another value, such as a shorter time.
    """
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    self.url = f"http://127.0.0.1:{port}"
    self._said = tempfile.TemporaryDirectory()
    said = pathlib.Path(self._said.name, "said")
    self._job = forks.Job(_serve, [f"--port={port}", *flags], own_programs, constants or {}, said=said)
    self.process = self._job.process
    headers = {"authorization": f"Bearer {key}"} if key else {}
    self.client = httpx.Client(base_url=self.url, headers=headers, timeout=60)

  def wait(self, seconds: float = 400) -> Server:
    """Until it is ready."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      assert self.process.is_alive(), self.end()
      with contextlib.suppress(httpx.TransportError):
        if self.client.get("/health").status_code == 200:
          return self
      time.sleep(0.05)
    raise AssertionError("the server did not become ready")

  def encoded(self, task: str, seconds: float = 60) -> dict:
    """Waits until all documents of a task have vectors; returns the progress."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      progress = self.client.get(f"/tasks/{task}/documents").json()
      if not progress["pending"]:
        return progress
      time.sleep(0.1)
    raise AssertionError(progress)

  def end(self, seconds: float = 40) -> tuple[int, str]:
    """Its exit status and what it has printed; after some seconds it is killed (-9)."""
    ended = self._job.end(seconds)
    self.client.close()
    self._said.cleanup()
    return ended

  def stop(self) -> int:
    """SIGTERM; returns the exit status."""
    self.process.terminate()
    return self.end()[0]

  def kill(self) -> None:
    """SIGKILL."""
    self.process.kill()
    self.process.join(10)


@contextlib.contextmanager
def served(
  directory: pathlib.Path, *flags: str, key: str = "", constants: Mapping[str, float] | None = None
) -> Iterator[Server]:
  """A server on DIR/backbone with the state DIR/state, ready."""
  given = [f"--backbone={directory / 'backbone'}", f"--state={directory / 'state'}", *FLAGS, *flags]
  server = Server(given, key, constants=constants)
  try:
    yield server.wait()
  finally:
    if not server.client.is_closed:
      server.end(0)


def models(directory: pathlib.Path) -> Backbone:
  """Writes a backbone, two retrievers (a, b) and a cross-encoder; returns the backbone."""
  backbone = Backbone.load(tiny.backbone(directory / "backbone"))
  for seed, name in enumerate("ab"):
    retriever(backbone, seed).save(directory / name)
  cross_encoder(backbone).save(directory / "cross")
  return backbone
