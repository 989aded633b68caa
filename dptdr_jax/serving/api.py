"""The HTTP interface: FastAPI's application, put together from its parts."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from dptdr_jax.serving import errors, page, tasks_api, vectors_api
from dptdr_jax.serving.auth import Keys, needs
from dptdr_jax.serving.guard import Guard
from dptdr_jax.serving.service import Service

_ABOUT = """
Many retrieval tasks on one backbone. `model` in /v1 is a task; tasks, their documents and searches are at /tasks.
Errors are in OpenAI's form: 413 too large, 422 not valid, 429 overloaded (with Retry-After), 503 not ready.
The header Request-Timeout says in seconds when the client stops waiting.
"""


def create_app(service: Service, keys: Keys, *, local: bool = False) -> FastAPI:
  """The application of a service.

  Args:
    local: answer requests for localhost alone; for servers without keys.
  """
  app = FastAPI(
    title="dptdr_jax", description=_ABOUT, docs_url=None, redoc_url=None, separate_input_output_schemas=False
  )
  app.state.service, app.state.keys = service, keys
  app.add_middleware(Guard, metrics=service.metrics, local=local)
  errors.install(app)

  @app.get("/health", tags=["server"], summary="Ready or not")
  async def health() -> JSONResponse:
    """200 when requests are answered, 503 while programs are compiled or the server stops."""
    ready = service.engine.ready
    about: dict[str, Any] = {"status": "ready" if ready else "not ready", "tasks": len(service.tasks())}
    return JSONResponse(about, 200 if ready else 503, {} if ready else {"retry-after": "5"})

  @app.get("/metrics", tags=["server"], summary="Prometheus", dependencies=[Depends(needs("read"))])
  async def metrics(_: Request) -> Response:
    """Counters and histograms in Prometheus' text form."""
    return Response(await service.run(service.metrics.text), media_type=CONTENT_TYPE_LATEST)

  app.include_router(vectors_api.router)
  app.include_router(tasks_api.router)
  page.install(app)
  return app
