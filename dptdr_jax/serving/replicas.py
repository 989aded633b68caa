"""A server as replicas of Ray Serve: several behind one address, more under load, replaced one after the other.

All replicas share one PostgreSQL database, so each has all tasks and documents. See launch/serve_ray.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from fastapi import FastAPI
from ray import serve

from dptdr_jax.core.errors import InputError
from dptdr_jax.serving import api, state
from dptdr_jax.serving.auth import Keys
from dptdr_jax.serving.server import Options, open_service

_MOST_REQUESTS = 1000  # of a replica at a time: the engine makes batches of them, and refuses what is too much
_DRAIN_S = 25.0


@serve.ingress()
class Replica:
  """One server, without a port of its own."""

  def __init__(self, options: Options):
    """Returns when all programs are compiled: Ray sends no request before."""
    self._stack = contextlib.ExitStack()
    self._service = open_service(options, None, self._stack)
    self._keys = Keys(options.keys or None)
    self._service.start()

  def __serve_build_asgi_app__(self) -> FastAPI:
    """The HTTP interface."""
    return api.create_app(self._service, self._keys, local=not self._keys.required)

  def check_health(self) -> None:
    """Raises an error if the engine has stopped; Ray then replaces the replica."""
    if not self._service.engine.ready:
      raise RuntimeError("the engine has stopped")

  def __del__(self):
    self._stack.close()


def deploy(
  options: Options, *, replicas: tuple[int, int], name: str = "dptdr", cpus: float = 1.0, gpus: float = 0.0
) -> None:
  """Starts the replicas, or replaces those of this name one after the other, without a request lost.

  Args:
    options: `state` is a database. `host` and `port` are where Ray listens.
    replicas: least and most; between them Ray follows the load.
    cpus, gpus: that Ray reserves for a replica.

  Raises:
    InputError: a state that replicas cannot share.
  """
  options.check()
  if not state.is_database(options.state):
    raise InputError("replicas share a database", value=f"--state={options.state}",
                     fix="Use --state=postgresql://USER@HOST/DATABASE")  # fmt: skip
  scaling: dict[str, Any] = {"num_replicas": replicas[0]}
  if replicas[0] < replicas[1]:
    scaling = {"autoscaling_config": {"min_replicas": replicas[0], "max_replicas": replicas[1],
                                      "target_ongoing_requests": 16}}  # fmt: skip
  serve.start(http_options={"host": options.host, "port": options.port})
  made = serve.deployment(
    Replica, name=name, ray_actor_options={"num_cpus": cpus, "num_gpus": gpus}, health_check_period_s=5,
    max_ongoing_requests=_MOST_REQUESTS, graceful_shutdown_timeout_s=_DRAIN_S,
    logging_config={"enable_access_log": False}, **scaling,
  )  # fmt: skip
  serve.run(made.bind(dataclasses.replace(options, tasks=())), name=name)
