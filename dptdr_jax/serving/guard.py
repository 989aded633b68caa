"""Between the connection and the routes: sizes and times of bodies, foreign pages, and a line of metrics a request."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar
from urllib.parse import urlsplit

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dptdr_jax.serving import errors
from dptdr_jax.serving.metrics import Metrics

MOST_BYTES = 16 << 20  # of a body
MOST_REQUESTS = 256  # whose body is read and that are not answered yet; more would wait for the interpreter
MOST_UPLOAD = 1100 << 20  # of PUT /tasks/NAME: two files of 512 MB and their descriptions
_SILENCE_S = 30.0  # between two parts of a body
_LONGEST_S = 300.0  # that a request may set
_DEFAULT_S = 60.0
T = TypeVar("T")


class ClientGone(Exception):
  """The connection was closed before the answer was ready."""


class Guard:
  """ASGI middleware."""

  def __init__(self, app: ASGIApp, metrics: Metrics, local: bool):
    """With `local` only requests for a name of this machine are answered: a page elsewhere cannot rebind its name."""
    self._app, self._metrics, self._local = app, metrics, local
    self._under_way = 0

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Handles one request."""
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    started, status, read = time.monotonic(), 499, False

    async def noted(message: Message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
      await send(message)

    def is_read() -> None:
      nonlocal read
      read = True
      self._under_way += 1

    try:
      with contextlib.suppress(ClientGone):
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if refused := self._refused(scope, headers):
          await refused(scope, receive, noted)
        else:
          await self._app(scope, _limited(receive, _most(scope, headers), is_read), noted)
    finally:
      self._under_way -= read
      route = getattr(scope.get("route"), "path", "other")
      self._metrics.request(route, status, time.monotonic() - started)

  def _refused(self, scope: Scope, headers: dict[str, str]) -> ASGIApp | None:
    if self._under_way >= MOST_REQUESTS and scope["method"] == "POST":  # at once: its body is not even looked at
      return errors.answer(429, f"{MOST_REQUESTS} requests are being answered. Try again in a second", "overloaded",
                           **{"retry-after": "1"})  # fmt: skip
    host = headers.get("host", "")
    if self._local and urlsplit(f"//{host}").hostname not in ("localhost", "127.0.0.1", "::1"):
      return errors.answer(403, "this server answers requests for localhost alone", "wrong_host")
    origin = headers.get("origin", "")
    if origin and scope["method"] not in ("GET", "HEAD") and urlsplit(origin).netloc != host:
      return errors.answer(403, "a page of another site cannot change anything here", "wrong_origin")
    most, length = _most(scope, headers), headers.get("content-length", "0")
    if most is not None and length.isdigit() and int(length) > most:
      return errors.answer(413, f"a body of {length} bytes; at most {most} are accepted", "too_large")
    return None


def _most(scope: Scope, headers: dict[str, str]) -> int | None:
  """Bytes of a body; None: lines of JSON, each of which is limited."""
  if scope["method"] == "PUT":
    return MOST_UPLOAD
  if scope["method"] == "POST" and scope["path"].endswith("/documents"):
    return MOST_BYTES if "application/json" in headers.get("content-type", "") else None
  return MOST_BYTES


def _limited(receive: Receive, most: int | None, is_read: Callable[[], None]) -> Receive:
  size, complete = 0, False

  async def limited() -> Message:
    nonlocal size, complete
    if complete:
      return await receive()
    try:
      message = await asyncio.wait_for(receive(), _SILENCE_S)
    except TimeoutError as error:
      raise HTTPException(408, f"no part of the body came for {_SILENCE_S:.0f} s") from error
    size += len(message.get("body", b""))
    complete = not message.get("more_body", False)
    if complete:
      is_read()
    if most is not None and size > most:
      raise HTTPException(413, f"the body is too large; at most {most} bytes are accepted")
    return message

  return limited


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
  """Awaits some work; cancels it when the client closes its connection. The body must have been read.

  Raises:
    ClientGone: it did.
  """
  task = asyncio.ensure_future(work)
  gone = asyncio.ensure_future(_gone(request))
  try:
    await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
      raise ClientGone
    return task.result()
  finally:
    for one in (task, gone):
      one.cancel()
    await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
  while (await request.receive())["type"] != "http.disconnect":
    pass


def deadline(request: Request) -> float:
  """When the client stops waiting: by its header Request-Timeout, in seconds; else in a minute.

  Raises:
    Refused: the header is no number of seconds.
  """
  given = request.headers.get("request-timeout")
  if given is None:
    return time.monotonic() + _DEFAULT_S
  try:
    seconds = float(given)
  except ValueError:
    seconds = -1.0
  if not 0 < seconds <= _LONGEST_S:
    raise errors.Refused(422, f"Request-Timeout is a number of seconds up to {_LONGEST_S:.0f}", "invalid")
  return time.monotonic() + seconds
