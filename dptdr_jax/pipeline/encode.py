"""encode: vectors of the corpus and of queries by a retriever; search in them."""

from __future__ import annotations

import itertools

import jax
import numpy as np

from dptdr_jax.core.errors import InputError
from dptdr_jax.core.store import Inputs, Kind, Making, Ref, neutral
from dptdr_jax.data.prepare import Corpus, Split
from dptdr_jax.pipeline.models import Compute, RetrieverInput
from dptdr_jax.pipeline.trials import tokens_of
from dptdr_jax.retrieval import runs
from dptdr_jax.retrieval.bm25 import Bm25
from dptdr_jax.retrieval.device import search_devices
from dptdr_jax.retrieval.embeddings import Embeddings, write_vectors
from dptdr_jax.retrieval.index import Index
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retrieval.search import search_exact
from dptdr_jax.runtime import mesh as meshes

_PART = 16_384  # queries a shard: 8.8 million passages of width 384 against so many take minutes of a host
_BM25_PART = 2048  # 8.8 million passages: .19 s a query of a slow core
_DEVICE_PART = 131_072  # on devices it is the reading of the corpus that takes time
_RESCORE = 2  # so many times the depth are searched in bfloat16 and scored again in float32


class Encoding(Inputs):
  """How vectors are made and stored."""

  dtype: str
  batch_tokens: int = neutral(0)
  shard_passages: int = neutral(100_000)


class VectorsInputs(Inputs):
  """Vectors of the corpus (`split` is '') or of a split's queries.

  A saved retriever has templates and perhaps a tokenizer of its own: it reads `text`, the others `tokens`.
  """

  retriever: RetrieverInput
  text: Ref
  split: str
  tokens: Ref | None
  limit: int  # longest text, special tokens included; of a trained or saved retriever its own
  encoding: Encoding
  compute: Compute


class IndexInputs(Inputs):
  """A FAISS index over the vectors of the corpus."""

  passages: Ref
  factory: str
  sample: int


class Search(Inputs):
  """How vectors are searched."""

  backend: str
  parameters: str
  device_dtype: str


class DenseRunInputs(Inputs):
  """What a retriever ranks highest for the queries of a split."""

  queries: Ref  # vectors
  passages: Ref  # vectors
  index: Ref | None  # None: exact
  search: Search
  depth: int


class Bm25RunInputs(Inputs):
  """What BM25 ranks highest for the queries of a split."""

  bm25: Ref
  split: Ref
  name: str
  depth: int


class FileRunInputs(Inputs):
  """A TREC run file of another retriever."""

  name: str
  sha256: str
  split: Ref
  split_name: str
  corpus: Ref
  depth: int
  path: str = neutral("")


def build_vectors(inputs: VectorsInputs, making: Making) -> None:
  """Writes vectors, whose manifest names the retriever; goes on at the first missing shard."""
  retriever = inputs.retriever.load(making, inputs.compute, inputs.limit)
  place, kind, encoding = making.path(inputs.text), "query" if inputs.split else "passage", inputs.encoding
  texts = Split(place, inputs.split) if inputs.split else Corpus(place)
  options = {"batch_tokens": encoding.batch_tokens, "description": f"encode {inputs.split or 'corpus'}"}
  if inputs.tokens is None:
    records = texts.queries if inputs.split else texts.passages
    make = lambda rows: retriever.encode_records(records.take(rows), **options)  # noqa: E731
  else:
    store = tokens_of(inputs.tokens, making)
    make = lambda rows: retriever.encode_store(store, kind, np.asarray(rows), **options)  # noqa: E731
  about = {"retriever": retriever.hash, "kind": kind, "tokens": retriever.settings.limit(kind)}
  about |= {"compute_dtype": retriever.backbone.compute_dtype}
  write_vectors(
    making.directory, ids=texts.ids, width=retriever.backbone.config.hidden_size, source=about, dtype=encoding.dtype,
    shard_rows=encoding.shard_passages, make=make, team=making.team,
    what="encode queries" if inputs.split else "encode corpus",
  )  # fmt: skip


def build_index(inputs: IndexInputs, making: Making) -> None:
  """Trains and fills the index."""
  passages = Embeddings(making.path(inputs.passages))
  Index.build(passages, inputs.factory, sample=inputs.sample).save(making.directory / "index")


def build_dense_run(inputs: DenseRunInputs, making: Making) -> None:
  """Searches for the queries, the processes in turn."""
  queries, passages = (Embeddings(making.path(of)) for of in (inputs.queries, inputs.passages))
  search, depth, index = inputs.search, min(inputs.depth, len(passages)), None
  if inputs.index is not None:
    index = Index.load(making.path(inputs.index) / "index")
    index.set_parameters(parameters(search.parameters))

  def ranked(rows: range) -> Run:
    some = queries.take(np.asarray(rows))
    if index is not None:
      return index.search(some, depth)
    if search.backend == "devices":
      again = _RESCORE if search.device_dtype == "bfloat16" else 0
      mesh = meshes.make_mesh(devices=jax.local_devices())
      return search_devices(some, passages, depth, mesh=mesh, dtype=search.device_dtype, rescore=again)
    return search_exact(some, passages, depth)  # straight from the shards: no second copy of the corpus in memory

  size = _DEVICE_PART if search.backend == "devices" else _PART
  runs.write_run(making.directory / "run", len(queries), depth, ranked, size=size, team=making.team)


def build_bm25_run(inputs: Bm25RunInputs, making: Making) -> None:
  """Searches for the queries, the processes in turn."""
  index, split = Bm25(making.path(inputs.bm25) / "index"), Split(making.path(inputs.split), inputs.name)
  depth = min(inputs.depth, index.count)

  def ranked(rows: range) -> Run:
    texts = [query.text for query in itertools.islice(split.queries.read(rows.start), len(rows))]
    return index.search(texts, depth)

  runs.write_run(making.directory / "run", len(split), depth, ranked, size=_BM25_PART, team=making.team)


def build_file_run(inputs: FileRunInputs, making: Making) -> None:
  """Reads the file."""
  split, corpus = Split(making.path(inputs.split), inputs.split_name), Corpus(making.path(inputs.corpus))
  depth = min(inputs.depth, len(corpus))
  run = runs.read_trec(inputs.path, split.ids.rows, corpus.ids.rows, len(split), depth)
  run.save(making.directory / "run")


def parameters(text: str) -> dict[str, int]:
  """'nprobe=64, quantizer_efSearch=32' → {'nprobe': 64, …}."""
  values = {}
  for part in filter(None, (part.strip() for part in text.split(","))):
    name, _, value = part.partition("=")
    if not value.isdigit():
      raise InputError("index.search_parameters is a list of NAME=NUMBER", value=part)
    values[name] = int(value)
  return values


def run_of(run: Ref, making: Making) -> Run:
  """The run of an artefact."""
  return Run.open(making.path(run) / "run")


VECTORS = Kind("vectors", 1, build_vectors)
INDEX = Kind("index", 1, build_index, together=False)
DENSE_RUN = Kind("dense_run", 1, build_dense_run)
BM25_RUN = Kind("bm25_run", 1, build_bm25_run)
FILE_RUN = Kind("file_run", 1, build_file_run, together=False)
