"""The process: backbone, engine, service and HTTP server from a few options, until SIGTERM."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pathlib
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import jax
import uvicorn

from dptdr_jax.backbone import Backbone
from dptdr_jax.core import marks, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.retriever import Retriever
from dptdr_jax.serving import api, catalog, state
from dptdr_jax.serving.auth import Keys
from dptdr_jax.serving.engine import Engine
from dptdr_jax.serving.from_run import FinishedRun
from dptdr_jax.serving.limits import Limits
from dptdr_jax.serving.metrics import Metrics
from dptdr_jax.serving.service import Service

log = logging.getLogger(__name__)

_LOCAL = ("127.0.0.1", "::1", "localhost")
_DRAIN_S = 12  # for answers that are under way; then the documents and the engine have as long
_GIVE_UP_S = 2.0  # for compilation that a SIGTERM interrupts


@dataclasses.dataclass(frozen=True)
class Options:
  """How a server is started; one of `workdir` and `backbone` is given.

  Attributes:
    workdir: of a finished run, which is served.
    backbone: as `Backbone.load` takes it.
    state: directory of tasks and documents, or the URL of a database; default: WORKDIR/serve.
    cache: with a database, directory for copies of retrievers and compiled programs; default: a temporary one.
    tasks: name → directory of a retriever.
    keys: file of keys, see `auth.Keys`.
    allow: directories and URLs below which clients may name retrievers.
    slots, prompt_length, max_tokens: see `Engine`.
  """

  workdir: str = ""
  backbone: str = ""
  state: str = ""
  cache: str = ""
  tasks: tuple[tuple[str, str], ...] = ()
  host: str = "127.0.0.1"
  port: int = 8000
  keys: str = ""
  allow: tuple[str, ...] = ()
  slots: int = 64
  prompt_length: int = 64
  max_tokens: int = 512
  batch_tokens: int = 0
  queued_tokens: int = 524_288
  compute_dtype: str = "auto"

  def check(self) -> None:
    """Raises InputError for options that contradict."""
    if bool(self.workdir) == bool(self.backbone):
      raise InputError("one of --workdir and --backbone is needed")
    if self.backbone and not self.state:
      raise InputError("--backbone needs --state, the directory of tasks and documents, or a database")
    if self.cache and not state.is_database(self.state):
      raise InputError("--cache is for --state=postgresql://…: a state directory has it inside")
    if not self.keys and self.host not in _LOCAL:
      raise InputError("without --api-key-file the server is for this machine alone", value=f"--host={self.host}",
                       fix="Add --api-key-file, or leave --host out")  # fmt: skip


def _bound(host: str, port: int) -> socket.socket:
  """The address, taken before anything else; nobody is listening yet."""
  made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
  try:
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((host, port))
  except OSError as error:
    made.close()
    fix = "Name another --port or --host"
    raise InputError(f"the address cannot be used ({error.strerror})", value=f"{host}:{port}", fix=fix) from error
  return made


def run(options: Options) -> None:
  """Serves until SIGTERM or Ctrl-C.

  Raises:
    InputError: what cannot be served, before anything is.
  """
  options.check()
  keys = Keys(options.keys or None)
  address = _bound(options.host, options.port)
  workdir = pathlib.Path(options.workdir).expanduser()
  finished = FinishedRun.of(workdir) if options.workdir else None
  with contextlib.ExitStack() as stack:
    stack.callback(address.close)
    service = open_service(options, finished, stack)
    _serve(options, keys, service, finished, address)


def open_service(options: Options, finished: FinishedRun | None, stack: contextlib.ExitStack) -> Service:
  """The service of some options with their tasks, not started; `stack` stops it.

  Raises:
    InputError: what cannot be served.
  """
  directory = _directory(options, stack)
  _keep_programs(directory)
  service = _service(options, finished, directory)
  stack.callback(service.stop)
  for name, place in options.tasks:
    service.put(name, catalog.files_of(pathlib.Path(place).expanduser()))
  if finished is not None:
    service.put(finished.name, finished.files())
  return service


def _directory(options: Options, stack: contextlib.ExitStack) -> pathlib.Path:
  """The state, or what a server on a database keeps on its own disk."""
  if not state.is_database(options.state):
    return pathlib.Path(options.state or pathlib.Path(options.workdir, "serve")).expanduser()
  if options.cache:
    return pathlib.Path(options.cache).expanduser()
  return pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dptdr-cache-")))


def _keep_programs(directory: pathlib.Path) -> None:
  """Compiled programs are kept in the server's directory, unless JAX is told another place."""
  marks.claim(directory, "server")  # before JAX writes to it
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(directory.absolute() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _service(options: Options, finished: FinishedRun | None, directory: pathlib.Path) -> Service:
  if finished is not None:
    backbone = Retriever.load(finished.retriever, compute_dtype=options.compute_dtype).backbone
  else:
    backbone = Backbone.load(options.backbone, compute_dtype=options.compute_dtype)
  metrics = Metrics()
  limits = Limits(queued_tokens=options.queued_tokens, tokens=min(Limits.tokens, options.queued_tokens))
  engine = Engine(
    backbone, slots=options.slots, prompt_length=options.prompt_length, max_tokens=options.max_tokens,
    batch_tokens=options.batch_tokens or None, limits=limits, on_batch=metrics.batch,
  )  # fmt: skip
  opened = state.open_state(options.state, directory, backbone)
  return Service(engine, opened, metrics=metrics, allowed=options.allow)


class _Server(uvicorn.Server):
  """Stops on SIGTERM and Ctrl-C; uvicorn's own way would raise the signal again afterwards."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    """Replaces the handlers while the server runs."""
    former = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
      yield
    finally:
      for number, handler in former.items():
        signal.signal(number, handler)

  def _stop(self, number: int, _: object) -> None:
    self.force_exit = self.should_exit and number == signal.SIGINT  # the second Ctrl-C
    self.should_exit = True


def _serve(
  options: Options, keys: Keys, service: Service, finished: FinishedRun | None, address: socket.socket
) -> None:
  app = api.create_app(service, keys, local=not keys.required)
  config = uvicorn.Config(
    app, log_level="warning", access_log=False, lifespan="off",
    timeout_graceful_shutdown=_DRAIN_S, timeout_keep_alive=30, server_header=False,
  )  # fmt: skip
  server, failed = _Server(config), []
  where = f"http://{options.host if ':' not in options.host else f'[{options.host}]'}:{options.port}"

  def begin() -> None:
    started = time.monotonic()
    try:
      service.start()
      if not server.should_exit:
        seconds = time.monotonic() - started
        progress.say(f"ready after {seconds:.1f} s: {where}/ is the page, {where}/docs the interface")
        if finished is not None:
          finished.import_documents(service)
    except Exception as error:
      failed.append(error)
      server.should_exit = True

  beginning = threading.Thread(target=begin, name="begin", daemon=True)
  beginning.start()
  server.run(sockets=[address])
  beginning.join(_GIVE_UP_S)
  if failed:
    raise failed[0]
  if beginning.is_alive():  # the compiler's threads cannot be stopped; every document that was accepted is on the disk
    log.info("stopped while it was starting")
    sys.stdout.flush()
    os._exit(0)


__all__ = ["Options", "open_service", "run"]
