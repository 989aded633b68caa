"""Requests beyond those that may be under way are refused before their body is read."""

import asyncio

from dptdr_jax.serving import guard
from dptdr_jax.serving.guard import Guard
from dptdr_jax.serving.metrics import Metrics


def test_one_request_too_many_is_refused_at_once_and_accepted_later():
  async def answer(guarded: Guard) -> tuple[int, dict[bytes, bytes]]:
    """Status and headers of the answer to a request with a whole body."""
    heads = []

    async def receive():
      return {"type": "http.request", "body": b"{}"}

    async def send(message):
      if message["type"] == "http.response.start":
        heads.append(message)

    await guarded({"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": []}, receive, send)
    return heads[0]["status"], dict(heads[0]["headers"])

  async def run() -> None:
    released = asyncio.Event()

    async def app(scope, receive, send):
      await receive()
      await released.wait()
      await send({"type": "http.response.start", "status": 200, "headers": []})

    guarded = Guard(app, Metrics(), local=False)
    waiting = [asyncio.ensure_future(answer(guarded)) for _ in range(guard.MOST_REQUESTS)]
    await asyncio.sleep(0.05)
    status, headers = await asyncio.wait_for(answer(guarded), 1)
    assert (status, headers[b"retry-after"]) == (429, b"1")
    released.set()
    assert {status for status, _ in await asyncio.gather(*waiting)} == {200}
    assert (await answer(guarded))[0] == 200

  asyncio.run(run())
