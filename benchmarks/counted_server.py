"""Our server, which writes at its end how many programs JAX has compiled and how many came from its persistent cache.

  python benchmarks/counted_server.py COUNTS.json --backbone=… --state=…

The counts are JAX's own events (jax.monitoring): a hit is a program that was read from the cache and not compiled.
"""

from __future__ import annotations

import collections
import json
import pathlib
import sys

import jax

from dptdr_jax import serve
from dptdr_jax.core import commands

_EVENTS = {
  "/jax/compilation_cache/compile_requests_use_cache": "asked",
  "/jax/compilation_cache/cache_hits": "loaded",
  "/jax/compilation_cache/cache_misses": "compiled",
}


def main(argv: list[str]) -> int:
  """Serves; returns the exit status."""
  counts: collections.Counter[str] = collections.Counter(dict.fromkeys(_EVENTS.values(), 0))

  def count(event: str, **_) -> None:
    if event in _EVENTS:
      counts[_EVENTS[event]] += 1

  jax.monitoring.register_event_listener(count)
  status = serve.main(argv)
  pathlib.Path(path).write_text(json.dumps(counts))
  return status


if __name__ == "__main__":
  path = sys.argv.pop(1)
  serve.define()
  commands.start(main)
