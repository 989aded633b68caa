"""Exact search on the devices, compared with FAISS Flat on this machine's CPU: same vectors and queries, ids compared.

  python benchmarks/device_search.py                                            (this CPU as 1 and as 8 devices)
  python benchmarks/device_search.py --queries 8192 --dtype bfloat16 --rescore 2   (an accelerator)

Vectors are random, seeded, of length 1. The searches take turns, so that a busy machine slows all. Two times are shown:
the whole search, in which the corpus is read and sent to the devices once for all queries; and a step, one batch of
queries over the block that is on the devices. The share of memory bandwidth is that of the step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import faiss
import jax
import numpy as np
from accelerators import BANDWIDTHS
from jax.sharding import NamedSharding, PartitionSpec

from dptdr_jax.retrieval.device import DTYPES, Plan, group_size, search_block, search_devices
from dptdr_jax.retrieval.embeddings import Embeddings, write_vectors
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.runtime.mesh import make_mesh

NEAR = 1e-5  # scores as near as this are a tie


def parse_arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--count", type=int, default=1_000_000, help="vectors")
  parser.add_argument("--width", type=int, default=384)
  parser.add_argument("--queries", type=int, default=64)
  parser.add_argument("--k", type=int, default=100)
  parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
  parser.add_argument("--rescore", type=int, default=2, help="of bfloat16 searches; 0: by the devices' scores")
  parser.add_argument("--devices", type=int, nargs="+", default=sorted({1, jax.device_count()}))
  parser.add_argument("--query-rows", type=int, default=1024)
  parser.add_argument("--tile-rows", type=int, default=16_384)
  parser.add_argument("--group", type=int, help="of a step: passages a group, as `search_share` takes it")
  parser.add_argument("--disk", action="store_true", help="write the vectors as embeddings and search them from disk")
  parser.add_argument("--bandwidth", type=float, help="of one device, GB/s; known for some kinds")
  parser.add_argument("--rounds", type=int, default=3)
  return parser.parse_args()


def unit_vectors(rows: int, width: int, seed: int) -> np.ndarray:
  """Random vectors of length 1, float32 [rows, width]."""
  vectors = np.random.default_rng(seed).standard_normal((rows, width), np.float32)
  for part in np.array_split(vectors, max(1, rows // 65_536)):  # views
    part /= np.linalg.norm(part, axis=1, keepdims=True)
  return vectors


def stored(passages: np.ndarray, directory: str) -> Embeddings:
  """The same vectors on disk."""
  count, width = passages.shape
  ids = [str(row) for row in range(count)]
  return write_vectors(
    directory, ids=ids, width=width, source={"benchmark": "random"}, make=lambda rows: passages[rows]
  )


def agreement(queries: np.ndarray, passages: np.ndarray, run: Run, expected: np.ndarray) -> tuple[float, int]:
  """Share of places with the same row, and the number of others whose float64 scores differ by more than a tie."""
  query, place = np.nonzero(run.rows != expected)
  exact = [
    np.einsum("nh,nh->n", queries[query].astype(np.float64), passages[rows[query, place]].astype(np.float64))
    for rows in (run.rows, expected)
  ]
  return 1 - len(query) / expected.size, int((np.abs(exact[0] - exact[1]) > NEAR).sum())


def timed(call: Callable[[], object]) -> tuple[float, object]:
  start = time.perf_counter()
  result = call()
  return time.perf_counter() - start, result


def step_seconds(queries: np.ndarray, passages: np.ndarray, dtype: str, devices: int, args: argparse.Namespace):
  """Median seconds of one batch of queries over one block on the devices, and the block's bytes on each."""
  of = jax.devices()[:devices]
  plan = Plan.make(of, len(passages), args.width, dtype, args.tile_rows)
  block = plan.place(passages, 0)
  size = -(-min(args.query_rows, len(queries)) // devices) * devices
  some = jax.numpy.asarray(np.resize(queries, (size, args.width)), dtype)
  best = Run.empty(size, args.k * (args.rescore if dtype == "bfloat16" and args.rescore else 1))
  by_query, whole = (NamedSharding(plan.mesh, PartitionSpec(*axes)) for axes in (plan.mesh.axis_names, ()))
  scores, rows = jax.device_put((best.scores, best.rows), by_query)
  some = jax.device_put(some, whole)
  options = dict(mesh=plan.mesh, tile=plan.tile, group=args.group or group_size(of[0].platform, plan.tile, best.depth))

  def step() -> None:
    jax.block_until_ready(search_block(scores, rows, some, block, 0, len(passages), **options))

  step()
  seconds = statistics.median(timed(step)[0] for _ in range(args.rounds))
  return seconds, size, min(plan.block, len(passages)), block.nbytes / devices


def main() -> None:
  args = parse_arguments()
  kind = jax.devices()[0].device_kind
  bandwidth = args.bandwidth * 1e9 if args.bandwidth else BANDWIDTHS.get(kind)
  print(f"{kind} × {jax.device_count()}, FAISS on {faiss.omp_get_max_threads()} threads, {vars(args)}")
  passages, queries = unit_vectors(args.count, args.width, 0), unit_vectors(args.queries, args.width, 1)
  with tempfile.TemporaryDirectory() as directory:
    source = stored(passages, f"{directory}/vectors") if args.disk else passages

    def devices_search(number: int, dtype: str) -> Run:
      return search_devices(
        queries, source, args.k, mesh=make_mesh(devices=jax.devices()[:number]), dtype=dtype,
        rescore=args.rescore if dtype == "bfloat16" else 0, query_rows=args.query_rows, tile_rows=args.tile_rows,
      )  # fmt: skip

    calls = {
      (number, dtype): (lambda n=number, d=dtype: devices_search(n, d))
      for number in args.devices
      for dtype in args.dtype
    }
    calls["faiss"] = lambda: faiss.knn(queries, passages, args.k, metric=faiss.METRIC_INNER_PRODUCT)[1]
    seconds: dict = {name: [] for name in calls}
    results = {name: call() for name, call in calls.items()}  # compiles
    for _ in range(args.rounds):
      for name, call in calls.items():
        seconds[name].append(timed(call)[0])
  medians = {name: statistics.median(values) for name, values in seconds.items()}
  flat = medians.pop("faiss")
  print(f"FAISS Flat: {flat:.2f} s, {args.count * args.queries / flat / 1e6:.0f} million scores/s")
  columns = [
    "devices", "dtype", "search s", "of FAISS' time", "same ids", "differ by more than a tie", "step ms",
    "of FAISS' time", "million vectors/s", "GB/s a device", "of bandwidth",
  ]  # fmt: skip
  print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
  for (number, dtype), taken in medians.items():
    equal, wrong = agreement(queries, passages, results[number, dtype], results["faiss"])
    step, size, rows, nbytes = step_seconds(queries, passages, dtype, number, args)
    share = f"{nbytes / step / bandwidth:.1%}" if bandwidth else "unknown"
    print(
      f"| {number} | {dtype} | {taken:.2f} | {taken / flat:.2f} | {equal:.4%} | {wrong} | {1e3 * step:.1f} "
      f"| {step / (flat * size * rows / args.queries / args.count):.2f} | {rows / step / 1e6:.2f} "
      f"| {nbytes / step / 1e9:.2f} | {share} |"
    )
  if any(agreement(queries, passages, results[name], results["faiss"])[1] for name in medians):
    raise SystemExit("ids differ from FAISS' by more than ties")


if __name__ == "__main__":
  main()
