"""Errors of the server as HTTP answers, in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dptdr_jax.core import files
from dptdr_jax.core.errors import DptdrError, InputError
from dptdr_jax.serving.collections import Busy, DiskFull, StorageError, StorageUnavailable
from dptdr_jax.serving.limits import DeadlineExceeded, Overloaded, TooLarge, Unavailable, UnknownTask

log = logging.getLogger(__name__)

_STATUS = (  # the first that fits
  (UnknownTask, 404, "task_not_found"), (TooLarge, 413, "too_large"), (Overloaded, 429, "overloaded"),
  (Busy, 429, "overloaded"), (Unavailable, 503, "unavailable"), (DeadlineExceeded, 504, "deadline_exceeded"),
  (InputError, 422, "invalid"),
)  # fmt: skip
_TYPES = {
  401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
  429: "rate_limit_error",
}  # fmt: skip


class Refused(DptdrError):
  """A request that is answered with an error.

  Attributes:
    status, code, param: of the answer.
  """

  def __init__(self, status: int, message: str, code: str, param: str | None = None):
    super().__init__(message)
    self.status, self.code, self.param = status, code, param


def answer(status: int, message: str, code: str, param: str | None = None, **headers: str) -> JSONResponse:
  """An error in OpenAI's form."""
  kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
  about = {"message": message, "type": kind, "param": param, "code": code}
  return JSONResponse({"error": about}, status, headers)


def of(error: DptdrError) -> JSONResponse:
  """The answer to an error of ours."""
  if isinstance(error, Refused):
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
    return answer(error.status, str(error), error.code, error.param, **headers)
  if isinstance(error, StorageError):
    log.error("storage: %s", error)
    if isinstance(error, StorageUnavailable):
      return answer(503, "the database does not answer. Try again in a few seconds", "storage_unavailable",
                    **{"retry-after": "5"})  # fmt: skip
    full = isinstance(error, DiskFull)
    return answer(507 if full else 500, "the disk is full" if full else "the documents cannot be read or written",
                  "disk_full" if full else "storage")  # fmt: skip
  if files.is_full(error):  # a retriever that could not be stored
    log.error("%s", error)
    return answer(507, "the disk is full", "disk_full")
  status, code = next(((status, code) for kind, status, code in _STATUS if isinstance(error, kind)), (500, "internal"))
  headers = {}
  if isinstance(error, Overloaded):
    headers["retry-after"] = str(max(1, round(error.retry_after)))
  if isinstance(error, Busy | Unavailable):
    headers["retry-after"] = "1" if isinstance(error, Busy) else "5"
  return answer(status, str(error), code, **headers)


def install(app: FastAPI) -> None:
  """Answers every error in this form."""

  @app.exception_handler(DptdrError)
  async def ours(_: Request, error: DptdrError) -> JSONResponse:
    return of(error)

  @app.exception_handler(RequestValidationError)
  async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return answer(422, f"{place}: {first['msg']}" if place else first["msg"], "invalid", place or None)

  @app.exception_handler(HTTPException)
  async def http(_: Request, error: HTTPException) -> JSONResponse:
    codes = {404: "no_such_route", 405: "method_not_allowed", 413: "too_large", 408: "timeout"}
    headers = {"connection": "close"} if error.status_code == 408 else {}  # else it may go on sending, for ever
    return answer(error.status_code, str(error.detail), codes.get(error.status_code, "invalid"), **headers)

  @app.exception_handler(OSError)
  async def system(_: Request, error: OSError) -> JSONResponse:
    if not files.is_full(error):
      raise error
    log.error("an upload: %s", error)
    return answer(507, "the disk is full", "disk_full")

  @app.exception_handler(Exception)
  async def unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s", request.method, request.url.path, exc_info=error)
    return answer(500, "an error of the server; its log has more", "internal")
