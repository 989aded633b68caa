"""The page for people at /, its two files, and the description of the interface at /docs. Nothing from elsewhere."""

from __future__ import annotations

import functools
import html
import json
import pathlib
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response

_HOME = pathlib.Path(__file__).parent / "static"
_FILES = {"page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
  "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
  "form-action 'none'",
  "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-cache",
}  # fmt: skip


def install(app: FastAPI) -> None:
  """Adds the routes."""

  @app.get("/", include_in_schema=False)
  async def page() -> Response:
    return HTMLResponse(_read("page.html"), headers=_HEADERS)

  @app.get("/static/{name}", include_in_schema=False)
  async def static(name: str) -> Response:
    if name not in _FILES:
      return Response(status_code=404)
    return Response(_read(name), media_type=_FILES[name], headers=_HEADERS)

  @app.get("/docs", include_in_schema=False)
  async def docs() -> Response:
    return HTMLResponse(_docs(app.openapi()), headers=_HEADERS)


@functools.cache
def _read(name: str) -> bytes:
  return (_HOME / name).read_bytes()


def _docs(about: dict[str, Any]) -> str:
  """The interface as one page, from its OpenAPI description."""
  parts = []
  for path, operations in about["paths"].items():
    for method, operation in operations.items():
      schemas = operation.get("requestBody", {}).get("content", {})
      shown = "".join(
        f"<p>{html.escape(kind)}</p><pre>{html.escape(_pretty(content['schema'], about))}</pre>"
        for kind, content in schemas.items()
      )
      parts.append(
        f"<details><summary><b>{method.upper()}</b> <code>{html.escape(path)}</code> "
        f"{html.escape(operation.get('summary', ''))}</summary>"
        f"<p>{html.escape(operation.get('description', ''))}</p>{shown}</details>"
      )
  title, text = html.escape(about["info"]["title"]), html.escape(about["info"].get("description", ""))
  return (
    f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    f'<title>{title}: interface</title><link rel="stylesheet" href="/static/page.css"><main class="docs">'
    f'<h1>{title}</h1><p>{text}</p><p><a href="/openapi.json">openapi.json</a> <a href="/">search</a></p>'
    f"{''.join(parts)}</main></html>"
  )


def _pretty(schema: dict[str, Any], about: dict[str, Any]) -> str:
  if "$ref" in schema:
    schema = about["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
  return json.dumps(schema, indent=2, ensure_ascii=False)
