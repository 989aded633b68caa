"""Tasks, their documents, and searches over HTTP."""

from __future__ import annotations

import pathlib
import tempfile
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import FormData, UploadFile

from dptdr_jax.core.errors import InputError
from dptdr_jax.serving import catalog, documents
from dptdr_jax.serving.auth import needs
from dptdr_jax.serving.collections import Progress
from dptdr_jax.serving.documents import Document
from dptdr_jax.serving.errors import Refused
from dptdr_jax.serving.guard import deadline, unless_gone
from dptdr_jax.serving.limits import TooLarge
from dptdr_jax.serving.service import MODES, Served, Service

router = APIRouter()
READ, ADMIN = Depends(needs("read")), Depends(needs("admin"))
_PARTS = {  # of a form
  "retriever.json": "retriever.json", "prompts.safetensors": "prompts.safetensors", "search.json": "search.json",
  "cross_encoder.json": "cross_encoder/cross_encoder.json",
  "cross_prompts.safetensors": "cross_encoder/prompts.safetensors",
}  # fmt: skip
_BATCH = 500  # lines stored at a time
_COPIED = 1 << 20  # bytes at a time


class SearchRequest(BaseModel):
  """A search."""

  model_config = ConfigDict(extra="forbid")

  query: Annotated[str, Field(min_length=1, max_length=20_000)]
  k: Annotated[int, Field(ge=1, le=1000)] = 10
  mode: Literal["vector", "bm25", "fused", "reranked"] = "vector"
  filter: dict[str, Any] | None = Field(None, description="Field → value, all of which must be equal.")
  truncate: bool = Field(True, description="Cut a longer query off, and say so, in place of an error.")


class PutRequest(BaseModel):
  """A retriever that the server reads itself."""

  model_config = ConfigDict(extra="forbid")

  path: str | None = Field(None, description="Directory on the server, below one that --allow names.")
  url: str | None = Field(None, description="Directory at a URL, below one that --allow names.")
  index: Literal["exact", "hnsw"] = "exact"


class DeleteRequest(BaseModel):
  """Documents to remove."""

  model_config = ConfigDict(extra="forbid")

  ids: Annotated[list[str], Field(min_length=1, max_length=10_000)]


@router.get("/tasks", dependencies=[READ], tags=["tasks"], summary="All tasks")
async def tasks(request: Request) -> dict[str, Any]:
  """All tasks, with the progress of their documents."""
  service: Service = request.app.state.service
  return {"tasks": await service.run(lambda: [_about(service, served) for served in service.tasks()])}


@router.get("/tasks/{name}", dependencies=[READ], tags=["tasks"], summary="One task")
async def task(request: Request, name: str) -> dict[str, Any]:
  """One task, with the progress of its documents."""
  service: Service = request.app.state.service
  return await service.run(_about, service, service.served(name))


@router.put(
  "/tasks/{name}", dependencies=[ADMIN], tags=["tasks"], summary="Add or replace a task",
  openapi_extra={"requestBody": {"content": {
    "application/json": {"schema": PutRequest.model_json_schema()},
    "multipart/form-data": {"schema": {"type": "object", "properties": {
      **{part: {"type": "string", "format": "binary"} for part in _PARTS},
      "index": {"type": "string", "enum": ["exact", "hnsw"]}}, "required": ["retriever.json", "prompts.safetensors"]}},
  }}},
)  # fmt: skip
async def put(request: Request, name: str) -> JSONResponse:
  """Adds a task or replaces the one of this name, which keeps its documents: they are encoded again.

  The files come as a form, or from a directory or URL that the operator allows.
  """
  service: Service = request.app.state.service
  catalog.check_name(name)
  kind = request.headers.get("content-type", "")
  if "multipart/form-data" in kind:
    async with request.form(max_files=len(_PARTS), max_fields=4) as form:
      served, replaced = await service.run(_put_form, service, name, form)
  elif "application/json" in kind:
    given = _parsed(PutRequest, await request.body())
    place = given.path or given.url
    if not place or (given.path and given.url):
      raise Refused(422, "one of path and url is needed", "invalid", "path")
    served, replaced = await service.run(_put_place, service, name, place, given.index)
  else:
    raise Refused(415, "send multipart/form-data with the files, or application/json with path or url", "media_type")
  about = await service.run(_about, service, served)
  return JSONResponse(about | {"replaced": replaced}, 200 if replaced else 201)


def _put_place(service: Service, name: str, place: str, index: str) -> tuple[Served, bool]:
  return service.put(name, catalog.files_at(place, service.allowed), index == "hnsw")


def _put_form(service: Service, name: str, form: FormData) -> tuple[Served, bool]:
  index = form.get("index", "exact")
  if index not in ("exact", "hnsw"):
    raise Refused(422, "index must be exact or hnsw", "invalid", "index")
  if unknown := [part for part in form if part not in (*_PARTS, "index")]:
    raise Refused(422, f"unknown part {unknown[0][:100]!r}; known: {', '.join(_PARTS)}, index", "invalid")
  with tempfile.TemporaryDirectory(prefix="dptdr-upload-") as directory:
    given = {}
    for part, inside in _PARTS.items():
      upload = form.get(part)
      if upload is None:
        continue
      if not isinstance(upload, UploadFile):
        raise Refused(422, f"{part} must be a file", "invalid", part)
      path = given[inside] = pathlib.Path(directory, part)
      with open(path, "wb") as stream:
        while chunk := upload.file.read(_COPIED):
          stream.write(chunk)
    return service.put(name, given, index == "hnsw")


@router.delete("/tasks/{name}", dependencies=[ADMIN], tags=["tasks"], summary="Remove a task and its documents")
async def remove(request: Request, name: str) -> dict[str, Any]:
  """Removes a task, its documents and its vectors."""
  service: Service = request.app.state.service
  await service.run(service.remove, name)
  return {"name": name, "removed": True}


@router.post(
  "/tasks/{name}/documents", dependencies=[ADMIN], tags=["documents"], summary="Add or replace documents",
  openapi_extra={"requestBody": {"content": {
    "application/json": {"schema": {"type": "object", "properties": {"documents": {"type": "array", "items": {
      "type": "object", "properties": {part: {"type": "string"} for part in ("id", "title", "text")},
      "required": ["id", "text"], "additionalProperties": True}}}}},
    "application/x-ndjson": {"schema": {"type": "string", "description": "A document a line."}},
  }}},
)  # fmt: skip
async def upsert(request: Request, name: str) -> dict[str, Any]:
  """Adds documents, or replaces those of the same id. They are on the disk when the answer comes.

  BM25 finds them at once, vectors when they are encoded. JSON is stored as a whole or not at all; of JSON lines an
  error leaves those before it.
  """
  service: Service = request.app.state.service
  service.served(name)
  if "application/json" in request.headers.get("content-type", ""):
    given = documents.from_json(documents.parse(await request.body(), "body"))
    await service.run(service.upsert, name, given)
    stored = len(given)
  else:
    stored = await _upsert_lines(request, service, name)
  return {"stored": stored, **_progress(await service.run(service.served(name).collection.progress))}


async def _upsert_lines(request: Request, service: Service, name: str) -> int:
  """Stores a stream of lines, some at a time; returns how many documents there were."""
  rest, number, stored, batch = b"", 0, 0, []

  async def flush() -> None:
    nonlocal stored, batch
    if batch:
      await service.run(service.upsert, name, batch)
      stored, batch = stored + len(batch), []

  try:
    async for chunk in request.stream():
      *lines, rest = (rest + chunk).split(b"\n")
      for line in lines:
        number += 1
        batch += _line(line, number)
        if len(batch) >= _BATCH:
          await flush()
      if len(rest) > documents.MAX_LINE:
        raise TooLarge(f"line {number + 1} has more than {documents.MAX_LINE} bytes")
    batch += _line(rest, number + 1)
  except (InputError, TooLarge) as error:
    await flush()
    status = 413 if isinstance(error, TooLarge) else 422
    raise Refused(status, f"{error}; {stored} documents before it are stored", "invalid_line") from error
  await flush()
  return stored


def _line(line: bytes, number: int) -> list[Document]:
  """The document of a line; none of an empty one; several of a whole {"documents": […]} without a content type."""
  if not line.strip():
    return []
  if len(line) > documents.MAX_LINE and not line.lstrip().startswith(b'{"documents"'):
    raise TooLarge(f"line {number} has {len(line)} bytes; at most {documents.MAX_LINE} are accepted")
  given = documents.parse(line, f"line {number}")
  if isinstance(given, dict) and given.keys() == {"documents"}:
    return documents.from_json(given)
  return [Document.of(given, f"line {number}")]


@router.get("/tasks/{name}/documents", dependencies=[READ], tags=["documents"], summary="How far encoding is")
async def progress(request: Request, name: str) -> dict[str, Any]:
  """How many documents a task has, and how many are encoded."""
  service: Service = request.app.state.service
  return _progress(await service.run(service.served(name).collection.progress))


@router.get("/tasks/{name}/documents/{document:path}", dependencies=[READ], tags=["documents"], summary="One document")
async def get(request: Request, name: str, document: str) -> dict[str, Any]:
  """The document of an id."""
  service: Service = request.app.state.service
  found = await service.run(service.served(name).collection.get, document)
  if found is None:
    raise Refused(404, f"the task {name} has no document {document[:100]!r}", "document_not_found")
  return _shown(found)


@router.delete("/tasks/{name}/documents", dependencies=[ADMIN], tags=["documents"], summary="Remove documents")
async def delete(request: Request, name: str, given: DeleteRequest) -> dict[str, Any]:
  """Removes documents by id; ids that are not there are passed over."""
  service: Service = request.app.state.service
  return {"removed": await service.run(service.served(name).collection.delete, given.ids)}


@router.delete("/tasks/{name}/documents/{document:path}", dependencies=[ADMIN], tags=["documents"],
               summary="Remove a document")  # fmt: skip
async def delete_one(request: Request, name: str, document: str) -> dict[str, Any]:
  """Removes one document."""
  service: Service = request.app.state.service
  if not await service.run(service.served(name).collection.delete, [document]):
    raise Refused(404, f"the task {name} has no document {document[:100]!r}", "document_not_found")
  return {"removed": 1}


@router.post("/tasks/{name}/search", dependencies=[READ], tags=["documents"], summary="Search")
async def search(request: Request, name: str, given: SearchRequest) -> JSONResponse:
  """The best documents for a query, with the seconds that each part took."""
  service: Service = request.app.state.service
  work = service.search(name, given.query, k=given.k, mode=given.mode, filters=given.filter,
                        deadline=deadline(request), truncate=given.truncate)  # fmt: skip
  found = await unless_gone(request, work)
  hits = [{"id": hit.document.id, "score": hit.score} | _shown(hit.document) for hit in found.hits]
  return JSONResponse({
    "hits": hits, "mode": given.mode, "seconds": found.seconds, "truncated_tokens": found.truncated,
    "progress": _progress(found.progress),
  })  # fmt: skip


def _shown(document: Document) -> dict[str, Any]:
  return {"id": document.id, "title": document.title, "text": document.text, **document.fields}


def _progress(progress: Progress) -> dict[str, int]:
  names = ("documents", "encoded", "pending", "failed", "truncated")
  return {name: getattr(progress, name) for name in names}


def _about(service: Service, served: Served) -> dict[str, Any]:
  known = service.engine.task(served.entry.name)
  return {
    "name": served.entry.name, "hash": known.hash, "content": served.entry.content,
    "query_length": known.settings.query_length, "passage_length": known.settings.passage_length,
    "index": "hnsw" if served.entry.approximate else "exact",
    "modes": [mode for mode in MODES if mode != "reranked" or served.reranker],
    "fusion": "reciprocal rank" if served.weight is None else f"weight {served.weight:g}",
    "documents": _progress(served.collection.progress()),
  }  # fmt: skip


def _parsed(model: type[PutRequest], content: bytes) -> PutRequest:
  given = documents.parse(content, "body")
  try:
    return model.model_validate(given)
  except ValueError as error:
    raise InputError(f"body: {str(error).splitlines()[1] if str(error).count(chr(10)) else error}") from error
