"""Searches of a server's documents, on disk and in PostgreSQL, beside FAISS alone; without HTTP and encoding.

  python benchmarks/search_server.py
  python benchmarks/search_server.py --documents=100000 --database=postgresql://USER@HOST/DATABASE

Vectors are random unit vectors. The n-th word of texts has a probability ∝ 1 / (100 + n), as if the 100 most frequent
ones were stop words. The systems take turns with every query, so
that a busy machine slows all of them; a ratio is of medians, to the first system. The database's tables are removed at
the end: name an empty one. It should be on this machine, since a network would be measured, too.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else FAISS' threads spin while the database wants their cores

import faiss
import numpy as np

from dptdr_jax.serving.collections import Collection, Ranked
from dptdr_jax.serving.documents import Document, check_filter
from dptdr_jax.serving.embedded import EmbeddedDocuments

K = 10
NEIGHBOURS, EF_CONSTRUCTION, EF_SEARCH = 32, 100, 128  # of the server's graphs
WORDS, VOCABULARY = 60, 30_000
BATCH = 1000
Search = Callable[[int], np.ndarray]


def make_documents(count: int, generator: np.random.Generator) -> list[Document]:
  """Documents of random words, in 100 equal groups."""
  weights = 1 / (100 + np.arange(VOCABULARY))
  words = generator.choice(VOCABULARY, (count, WORDS), p=weights / weights.sum())
  return [
    Document(f"d{row}", " ".join(f"w{word}" for word in words[row]), fields={"group": row % 100})
    for row in range(count)
  ]


def make_vectors(count: int, width: int, generator: np.random.Generator) -> np.ndarray:
  """Random unit vectors, float32 [n, H]."""
  vectors = generator.normal(size=(count, width)).astype(np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def fill(name: str, collection: Collection, documents: list[Document], vectors: np.ndarray) -> None:
  """Stores documents with their vectors."""
  started = time.perf_counter()
  for start in range(0, len(documents), BATCH):
    collection.upsert(documents[start : start + BATCH], vectors[start : start + BATCH])
  seconds = time.perf_counter() - started
  print(f"{name}: {len(documents) / seconds:.0f} documents/s with their vectors")


def compare(what: str, systems: dict[str, Search], count: int, truth: list[set[int]] | None = None) -> list[set[int]]:
  """Times all systems with every query; prints times, ratios, and the share of true hits; returns the first's hits."""
  seconds: dict[str, list[float]] = {name: [] for name in systems}
  hits: dict[str, list[set[int]]] = {name: [] for name in systems}
  for search in systems.values():
    for query in range(min(10, count)):
      search(query)
  for query in range(count):
    for name, search in systems.items():
      started = time.perf_counter()
      rows = search(query)
      seconds[name].append(time.perf_counter() - started)
      hits[name].append(set(rows.tolist()))
  first = next(iter(systems))
  truth = truth or hits[first]
  print(what)
  for name, times in seconds.items():
    middle, late = (1000 * np.percentile(times, share) for share in (50, 99))
    ratio = np.median(times) / np.median(seconds[first])
    share = np.mean([len(found & true) / max(1, len(true)) for found, true in zip(hits[name], truth, strict=True)])
    print(f"  {name:>12}: p50 {middle:7.2f} ms, p99 {late:7.2f} ms, {ratio:6.2f} × {first}, {share:.3f} of the hits")
  return truth


def ids(collection: Collection, ranked: Ranked) -> np.ndarray:
  """The numbers of documents in the order of `make_documents`; the texts are read, as a server does."""
  found = collection.documents(ranked.rows.tolist())
  return np.array([int(document.id[1:]) for document in found.values()], np.int64)


def nearest(collection: Collection, queries: np.ndarray, **filters: int) -> Search:
  """A search by vectors."""
  checked = check_filter(filters)
  return lambda query: ids(collection, collection.nearest(queries[query], "m", K, checked))


def run(args: argparse.Namespace, collections: dict[str, Collection]) -> None:
  """All measurements."""
  generator = np.random.default_rng(0)
  documents = make_documents(args.documents, generator)
  vectors, queries = (make_vectors(count, args.width, generator) for count in (args.documents, args.queries))
  for name, collection in collections.items():
    fill(name, collection, documents, vectors)
  flat = faiss.IndexFlatIP(args.width)
  flat.add(vectors)
  bare: dict[str, Search] = {"FAISS": lambda query: flat.search(queries[query : query + 1], K)[1][0]}
  truth = compare("exact", bare | {name: nearest(one, queries) for name, one in collections.items()}, args.queries)
  filtered = {name: nearest(one, queries, group=7) for name, one in collections.items()}
  compare("exact, a filter leaves 1 %", filtered, args.queries)

  texts = [" ".join(document.text.split()[:8]) for document in documents[: args.queries]]
  compare("BM25, 8 words", {
    name: lambda query, one=one: ids(one, one.bm25(texts[query], K, {})) for name, one in collections.items()
  }, args.queries)  # fmt: skip

  graph = faiss.IndexHNSWFlat(args.width, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
  graph.hnsw.efConstruction, graph.hnsw.efSearch = EF_CONSTRUCTION, EF_SEARCH
  graph.add(vectors)
  for name, collection in collections.items():
    started = time.perf_counter()
    collection.use("m", True)
    print(f"{name}: a graph after {time.perf_counter() - started:.1f} s")
  bare = {"FAISS": lambda query: graph.search(queries[query : query + 1], K)[1][0]}
  compare("HNSW", bare | {name: nearest(one, queries) for name, one in collections.items()}, args.queries, truth)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--documents", type=int, default=20_000)
  parser.add_argument("--width", type=int, default=384)
  parser.add_argument("--queries", type=int, default=200)
  parser.add_argument("--database", default="", help="URL of an empty database of PostgreSQL with pgvector")
  args = parser.parse_args()
  how = {"width": args.width, "model": "m", "approximate": False}
  with tempfile.TemporaryDirectory() as directory:
    stores = {"on disk": EmbeddedDocuments(pathlib.Path(directory, "documents.sqlite"))}
    if args.database:
      from dptdr_jax.serving.postgres import Database
      from dptdr_jax.serving.postgres_documents import PostgresDocuments

      stores["PostgreSQL"] = PostgresDocuments(Database(args.database, args.width))
    try:
      run(args, {name: store.open("benchmark", **how) for name, store in stores.items()})
    finally:
      for store in stores.values():
        store.drop("benchmark")
        store.close()


if __name__ == "__main__":
  main()
