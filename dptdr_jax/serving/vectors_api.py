"""Vectors and scores in the shapes of OpenAI, text-embeddings-inference and Cohere."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from dptdr_jax.serving.auth import needs
from dptdr_jax.serving.documents import MAX_TEXT
from dptdr_jax.serving.engine import Encoded
from dptdr_jax.serving.errors import Refused
from dptdr_jax.serving.guard import deadline, unless_gone
from dptdr_jax.serving.limits import TooLarge, UnknownTask
from dptdr_jax.serving.service import Service
from dptdr_jax.serving.tasks import Task

router = APIRouter(dependencies=[Depends(needs("read"))])
KINDS = ("query", "passage")
MOST_RERANKED = 512  # documents of one request
_AT_ONCE = 16  # vectors that are written between two other requests
_DEFAULT = "passage"
_IDS = "token ids are refused: another tokenizer's ids would be silently wrong. Send texts"
_IDS += " (langchain: check_embedding_ctx_length=False)"


class EmbeddingsRequest(BaseModel):
  """As OpenAI's, with `input_type` as others have it."""

  model_config = ConfigDict(extra="forbid")

  model: str = Field(description="A task, or a task with -query or -passage behind its name.")
  input: Any = Field(description="A text, or a list of texts.")
  input_type: Literal["query", "passage", "document"] | None = Field(
    None, description=f"'document' is 'passage'. Default: the suffix of `model`, else {_DEFAULT}."
  )
  encoding_format: Literal["float", "base64"] = "float"
  dimensions: int | None = Field(None, description="The width of the vectors; another one is refused.")
  truncate: bool = Field(False, description="Cut longer texts off, and say so, in place of an error.")
  user: str | None = Field(None, description="Accepted for OpenAI's clients, and not used.")


class EmbedRequest(BaseModel):
  """As text-embeddings-inference's."""

  model_config = ConfigDict(extra="forbid")

  inputs: Any
  truncate: bool | None = False
  truncation_direction: Literal["right", "Right"] = "right"
  normalize: bool | None = Field(None, description="Default: as the task was trained.")
  prompt_name: Literal["query", "passage", "document"] | None = None
  dimensions: int | None = None


class RerankRequest(BaseModel):
  """As Cohere's."""

  model_config = ConfigDict(extra="forbid")

  model: str
  query: Annotated[str, Field(min_length=1, max_length=20_000)]
  documents: list[str | dict[str, Any]] = Field(min_length=1, description="Texts, or {'text': …, 'title': …}.")
  top_n: int | None = Field(None, ge=1)
  return_documents: bool = False


@router.post("/v1/embeddings", tags=["vectors"], summary="Vectors of texts (OpenAI)")
async def embeddings(request: Request, given: EmbeddingsRequest) -> Response:
  """Vectors of texts; `model` in the answer says whether they are a query's or a passage's."""
  service: Service = request.app.state.service
  name, kind = resolve(service, given.model, given.input_type)
  texts = texts_of(given.input, "input")
  _check_width(service, given.dimensions)
  work = service.encode(name, kind, texts, deadline=deadline(request), truncate=given.truncate)
  _, encoded = await unless_gone(request, work)

  def answer() -> dict[str, Any]:
    data = [
      {"object": "embedding", "index": place, "embedding": _written(vector, given.encoding_format)}
      | ({"truncated_tokens": int(cut)} if cut else {})
      for place, (vector, cut) in enumerate(zip(encoded.vectors, encoded.cut, strict=True))
    ]
    return {"object": "list", "data": data, "model": f"{name}-{kind}", "usage": _usage(encoded)}

  return await _written_out(service, len(texts), answer)


@router.get("/v1/models", tags=["vectors"], summary="Tasks as models (OpenAI)")
async def models(request: Request) -> dict[str, Any]:
  """All tasks."""
  return {"object": "list", "data": [_model(served.entry.name) for served in request.app.state.service.tasks()]}


@router.get("/v1/models/{name}", tags=["vectors"], summary="One task as a model (OpenAI)")
async def model(request: Request, name: str) -> dict[str, Any]:
  """One task."""
  return _model(resolve(request.app.state.service, name, None)[0])


@router.post("/t/{name}", tags=["vectors"], include_in_schema=False)
@router.post("/t/{name}/embed", tags=["vectors"], summary="Vectors of texts (text-embeddings-inference)")
async def embed(request: Request, name: str, given: EmbedRequest) -> Response:
  """Vectors of texts; `name` is a task, or a task with -query or -passage behind its name."""
  service: Service = request.app.state.service
  name, kind = resolve(service, name, given.prompt_name)
  texts = texts_of(given.inputs, "inputs")
  _check_width(service, given.dimensions)
  work = service.encode(name, kind, texts, deadline=deadline(request), truncate=bool(given.truncate))
  task, encoded = await unless_gone(request, work)
  vectors = _normalized(task, encoded.vectors, given.normalize)
  return await _written_out(service, len(texts), lambda: vectors)


@router.post("/v1/rerank", tags=["vectors"], summary="Scores of documents for a query (Cohere)")
@router.post("/v2/rerank", tags=["vectors"], include_in_schema=False)
async def rerank(request: Request, given: RerankRequest) -> dict[str, Any]:
  """Scores by the task's cross-encoder, best first."""
  service: Service = request.app.state.service
  served = service.served(given.model)
  if served.reranker is None:
    raise Refused(422, f"the task {given.model} has no cross-encoder", "no_cross_encoder", "model")
  if len(given.documents) > MOST_RERANKED:
    raise TooLarge(f"{len(given.documents)} documents; at most {MOST_RERANKED} are accepted")
  lengths = [len(str(one)) for one in given.documents]
  if sum(lengths) > 2_000_000 or max(lengths) > MAX_TEXT:  # a batch of the cross-encoder repeats its last document
    raise TooLarge(f"more than 2,000,000 characters of documents, or more than {MAX_TEXT} of one")
  passages = [one if isinstance(one, str) else {key: one.get(key) for key in ("title", "text")}
              for one in given.documents]  # fmt: skip
  scores = await unless_gone(request, service.run(served.reranker.scores, given.query, passages))
  order = np.argsort(-scores, kind="stable")[: given.top_n]
  results = []
  for place in map(int, order):
    one = given.documents[place]
    about = {"document": {"text": one} if isinstance(one, str) else one} if given.return_documents else {}
    results.append({"index": place, "relevance_score": float(scores[place])} | about)
  return {"id": uuid.uuid4().hex, "results": results, "meta": {"billed_units": {"search_units": 1}}}


def resolve(service: Service, model: str, kind: str | None) -> tuple[str, str]:
  """The task and the kind of text that a client means.

  Raises:
    UnknownTask: there is none.
    Refused: suffix and input_type contradict.
  """
  kind = "passage" if kind == "document" else kind
  known = {served.entry.name for served in service.tasks()}
  if model in known:
    return model, kind or _DEFAULT
  name, _, suffix = model.rpartition("-")
  if suffix not in KINDS or name not in known:
    raise UnknownTask(f"there is no task {model[:100]!r}")
  if kind not in (None, suffix):
    raise Refused(422, f"the model is {model}, and input_type is {kind}", "invalid", "input_type")
  return name, suffix


def texts_of(given: Any, param: str) -> Sequence[str]:
  """The texts of an input.

  Raises:
    Refused: token ids, or something else.
  """
  texts = [given] if isinstance(given, str) else given
  if not isinstance(texts, list) or not texts:
    raise Refused(422, f"{param} must be a text, or a list of texts that is not empty", "invalid", param)
  for place, text in enumerate(texts):
    if isinstance(text, int | list):
      raise Refused(422, _IDS, "token_ids", param)
    if not isinstance(text, str) or not text.strip():
      raise Refused(422, f"{param}[{place}] must be a text that is not empty", "invalid", param)
  return texts


async def _written_out(service: Service, count: int, answer: Callable[[], Any]) -> Response:
  """An answer with vectors; many are written in a thread, as other requests should not wait for that."""

  def written() -> bytes:
    return orjson.dumps(answer(), option=orjson.OPT_SERIALIZE_NUMPY)

  content = written() if count <= _AT_ONCE else await service.run(written)
  return Response(content, media_type="application/json")


def _check_width(service: Service, dimensions: int | None) -> None:
  width = service.engine.backbone.config.hidden_size
  if dimensions not in (None, width):
    raise Refused(422, f"vectors have {width} dimensions, and cannot be cut", "invalid", "dimensions")


def _written(vector: np.ndarray, form: str) -> np.ndarray | str:
  if form == "base64":
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
  return vector


def _normalized(task: Task, vectors: np.ndarray, normalize: bool | None) -> np.ndarray:
  if normalize is False and task.settings.normalize:
    raise Refused(422, f"the task {task.name} has vectors of length 1 only", "invalid", "normalize")
  if not normalize or task.settings.normalize:
    return vectors
  return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _usage(encoded: Encoded) -> dict[str, int]:
  tokens = int(encoded.tokens.sum())
  return {"prompt_tokens": tokens, "total_tokens": tokens}


def _model(name: str) -> dict[str, Any]:
  return {"id": name, "object": "model", "created": _STARTED, "owned_by": "dptdr_jax"}


_STARTED = int(time.time())
