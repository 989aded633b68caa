"""One sentence-transformers model behind OpenAI's /v1/embeddings: what a task costs without a shared backbone.

  python benchmarks/peer_server.py --model=DIR --port=8001 --threads=2

It needs torch, sentence-transformers, fastapi and uvicorn, and nothing of this project. Requests that wait are encoded
together, as a careful user would write it.
"""

from __future__ import annotations

import argparse
import asyncio
from concurrent.futures import ThreadPoolExecutor

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

BATCH = 64  # texts of one call


class EmbeddingsRequest(BaseModel):
  """As OpenAI's."""

  model: str
  input: str | list[str]


class Batcher:
  """Encodes what waits, as one batch, in a thread."""

  def __init__(self, model: SentenceTransformer):
    self._model = model
    self._waiting: list[tuple[list[str], asyncio.Future]] = []
    self._thread = ThreadPoolExecutor(1)
    self._running = False

  async def encode(self, texts: list[str]) -> list[list[float]]:
    """Vectors of some texts."""
    future = asyncio.get_running_loop().create_future()
    self._waiting.append((texts, future))
    if not self._running:
      self._running = True
      asyncio.ensure_future(self._run())
    return await future

  async def _run(self) -> None:
    while self._waiting:
      some, count = [], 0
      while self._waiting and (not some or count + len(self._waiting[0][0]) <= BATCH):
        some.append(self._waiting.pop(0))
        count += len(some[-1][0])
      texts = [text for given, _ in some for text in given]
      vectors = await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, texts)
      first = 0
      for given, future in some:
        if not future.cancelled():
          future.set_result(vectors[first : first + len(given)])
        first += len(given)
    self._running = False

  def _encode(self, texts: list[str]) -> list[list[float]]:
    return self._model.encode(texts, batch_size=BATCH, show_progress_bar=False).tolist()


def create_app(model: SentenceTransformer) -> FastAPI:
  """The application."""
  app, batcher = FastAPI(), Batcher(model)

  @app.get("/health")
  async def health() -> dict[str, str]:
    return {"status": "ready"}

  @app.post("/v1/embeddings")
  async def embeddings(given: EmbeddingsRequest) -> dict:
    vectors = await batcher.encode([given.input] if isinstance(given.input, str) else given.input)
    data = [{"object": "embedding", "index": place, "embedding": vector} for place, vector in enumerate(vectors)]
    return {"object": "list", "data": data, "model": given.model, "usage": {"prompt_tokens": 0, "total_tokens": 0}}

  return app


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--model", required=True)
  parser.add_argument("--port", type=int, required=True)
  parser.add_argument("--threads", type=int, default=0, help="of torch; 0: all cores")
  args = parser.parse_args()
  if args.threads:
    torch.set_num_threads(args.threads)
  model = SentenceTransformer(args.model, device="cpu")
  model.encode(["warm"])
  uvicorn.run(create_app(model), host="127.0.0.1", port=args.port, log_level="warning", access_log=False)


if __name__ == "__main__":
  main()
