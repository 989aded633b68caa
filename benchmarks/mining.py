"""A pool of negatives for many queries over many passages: peak memory, and time compared with a bare FAISS loop.

  python benchmarks/mining.py                 (1,000,000 random passages of width 384, 20,000 queries, depth 200)

Vectors are random, seeded, of length 1. Each way runs in a process of its own, in turns. 'ours' searches the shards on
disk, scores the positives, merges into a pool and denoises it. 'bare' reads the same shards, calls faiss.knn on each
for all queries and keeps the best. Measured of each process: seconds, and peak resident memory, which includes pages of
mapped files that the system may take back.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

import faiss
import numpy as np

from dptdr_jax.pipeline.mine import positive_scores
from dptdr_jax.retrieval.denoise import MarginRule
from dptdr_jax.retrieval.embeddings import Embeddings, write_vectors
from dptdr_jax.retrieval.merge import Source, pool_from_runs
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retrieval.search import search_exact

SHARD = 100_000
MSMARCO = 8_841_823, 502_939  # passages, training queries


def parse_arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--passages", type=int, default=1_000_000)
  parser.add_argument("--queries", type=int, default=20_000)
  parser.add_argument("--width", type=int, default=384)
  parser.add_argument("--depth", type=int, default=200)
  parser.add_argument("--rounds", type=int, default=2)
  parser.add_argument("--way", choices=("ours", "bare"), help="this process is one of the ways")
  parser.add_argument("--dir", help="of the vectors, which are made where they are missing")
  return parser.parse_args()


def write_random(directory: pathlib.Path, count: int, width: int, seed: int) -> None:
  """Random vectors of length 1 as embeddings."""

  def make(rows: range) -> np.ndarray:
    vectors = np.random.default_rng((seed, rows.start // SHARD)).standard_normal((len(rows), width), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

  ids = [str(row) for row in range(count)]
  write_vectors(directory, ids=ids, width=width, source={"benchmark": seed}, make=make, shard_rows=SHARD)


def ours(directory: pathlib.Path, depth: int) -> dict[str, float]:
  """Seconds of the search and of what makes a pool of it."""
  queries, passages = Embeddings(directory / "queries"), Embeddings(directory / "passages")
  count = len(queries)
  start = time.perf_counter()
  search_exact(queries.take(np.arange(count)), passages, depth).save(directory / "run")
  searched = time.perf_counter()
  judged = np.random.default_rng(2).integers(0, len(passages), count)
  positives = Qrels.from_triples(np.arange(count), judged, np.ones(count, int), count)
  scores = positive_scores(queries, passages, positives)
  source = Source(Run.open(directory / "run"), depth, positive_scores=scores)
  pool_from_runs(directory / "pool", {"dense": source}, positives, [MarginRule("dense", 0.95)])
  return {"search": searched - start, "pool": time.perf_counter() - searched}


def bare(directory: pathlib.Path, depth: int) -> dict[str, float]:
  """Seconds of a loop over the shards, with FAISS' own merge of two results."""
  shards = sorted((directory / "passages").glob("vectors-*.npy"))
  queries = np.concatenate([np.load(path) for path in sorted((directory / "queries").glob("vectors-*.npy"))])
  start = time.perf_counter()
  best = None
  for number, path in enumerate(shards):
    scores, rows = faiss.knn(queries, np.load(path), depth, metric=faiss.METRIC_INNER_PRODUCT)
    part = scores, rows + number * SHARD
    if best is not None:
      both = [np.concatenate(pair, axis=1) for pair in zip(best, part, strict=True)]
      order = np.argsort(-both[0], axis=1)[:, :depth]
      part = tuple(np.take_along_axis(array, order, 1) for array in both)
    best = part
  return {"search": time.perf_counter() - start}


def peak_gib() -> float:
  """Peak resident memory of this process; getrusage's is inherited from the parent."""
  return int(re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 2**20


def measure(way: str, args: argparse.Namespace, directory: str) -> dict[str, float]:
  """One way in a process of its own: its seconds, and 'peak' in GiB."""
  command = [sys.executable, __file__, f"--way={way}", f"--dir={directory}", f"--depth={args.depth}"]
  return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
  args = parse_arguments()
  if args.way:
    seconds = {"ours": ours, "bare": bare}[args.way](pathlib.Path(args.dir), args.depth)
    print(json.dumps(seconds | {"peak": peak_gib()}))
    return
  with tempfile.TemporaryDirectory() as scratch:
    directory = pathlib.Path(args.dir or scratch)
    write_random(directory / "passages", args.passages, args.width, 0)
    write_random(directory / "queries", args.queries, args.width, 1)
    by_way = {"ours": [], "bare": []}
    for _ in range(args.rounds):
      for way, measured in by_way.items():
        measured.append(measure(way, args, str(directory)))
        print(way, measured[-1], flush=True)
    kept = sum(path.stat().st_size for part in ("run", "pool") for path in (directory / part).rglob("*"))
  seconds = {way: statistics.median(one["search"] for one in measured) for way, measured in by_way.items()}
  pool, peak = (max(one[name] for one in by_way["ours"]) for name in ("pool", "peak"))
  ratio = seconds["ours"] / seconds["bare"]
  print(f"search: {seconds['ours']:.1f} s, {ratio:.3f} of the bare loop's; the pool: {pool:.1f} s")
  print(f"peak resident memory: {peak:.2f} GiB; the bare loop's {max(one['peak'] for one in by_way['bare']):.2f} GiB")
  scale = MSMARCO[0] / args.passages * MSMARCO[1] / args.queries
  # Beside a block of passages memory grows with the queries alone: their vectors and twice the run.
  grows = MSMARCO[1] * (4 * args.width + 2 * 8 * args.depth) / 2**30
  print(
    f"MS MARCO ({MSMARCO[0]:,} × {MSMARCO[1]:,}), extrapolated: {scale * seconds['ours'] / 3600:.1f} h on these cores, "
    f"{grows:.1f} GiB for queries and run beside the block, {kept / args.queries * MSMARCO[1] / 2**30:.1f} GiB on disk"
  )


if __name__ == "__main__":
  main()
