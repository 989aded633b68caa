"""Search as the config has it: exact, on the host or the devices, or through a FAISS index."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from dptdr_jax.core import files, manifest, preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval.device import DTYPES, search_devices
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.index import Index
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retrieval.search import search_exact
from dptdr_jax.runtime import hosts
from dptdr_jax.runtime import mesh as meshes
from dptdr_jax.stages import common

_PART = 16_384  # 8.8 million passages of width 384 against so many are 1.1e14 operations: minutes of a host
_BM25_PART = 2048  # 8.8 million passages: .19 s a query of a slow core
_DEVICE_PART = 131_072  # on devices it is the reading of the corpus that takes time
_RESCORE = 2  # so many times the depth is found in bfloat16 and scored again in float32


def dense(
  config: ConfigDict, queries: Embeddings, passages: Embeddings, depth: int, index: pathlib.Path,
  rows: slice = slice(None),
) -> Run:  # fmt: skip
  """The `depth` passages of largest inner product for some queries (default: all); see `build` for `index`."""
  vectors = queries.take(np.arange(len(queries))[rows])
  if config.index.backend == "devices":
    mesh = meshes.make_mesh(devices=jax.local_devices())
    dtype = config.index.device_dtype
    return search_devices(
      vectors, passages, depth, mesh=mesh, dtype=dtype, device_bytes=config.index.device_bytes,
      rescore=_RESCORE if dtype == "bfloat16" else 0,
    )  # fmt: skip
  if config.index.factory == "Flat":  # straight from the shards: no second copy of the corpus in memory
    return search_exact(vectors, passages, depth)
  build(config, passages, index)
  with common.built_again(index):
    opened = Index.load(index)
  opened.set_parameters(parameters(config.index.search_parameters))
  return opened.search(vectors, depth)


def build(config: ConfigDict, passages: Embeddings, index: pathlib.Path) -> None:
  """Builds the FAISS index in `index`, where the config wants one and it is missing, or of other vectors."""
  if config.index.backend != "faiss" or config.index.factory == "Flat":
    return
  wanted = {"factory": config.index.factory, "sample": config.index.sample}
  wanted |= {"source": passages.source, "dtype": passages.dtype}
  there = manifest.read(index / "manifest.json") or {}
  if {name: there.get(name) for name in wanted} != wanted:
    Index.build(passages, config.index.factory, sample=config.index.sample).save(index)


def part_queries(config: ConfigDict, dense: bool) -> int:
  """Queries of a part of `shared`: some minutes of work that a kill may cost, against one reading of the corpus."""
  if not dense:
    return _BM25_PART
  return _DEVICE_PART if config.index.backend == "devices" else _PART


def shared(
  directory: pathlib.Path, count: int, search: Callable[[slice], Run], part: int, together: bool = True
) -> None:
  """Writes the run of `count` queries to `directory`: processes search for parts of it in turn, the first joins them.

  What is there already, whole or by parts, is not searched again; nor by another number of processes, where that leads
  to the same parts.

  Args:
    search: the run of some queries.
    part: queries of a part at most.
    together: else this process searches alone, and meets no other.
  """
  processes, first = (hosts.process_count(), hosts.process_index()) if together else (1, 0)
  meet = hosts.barrier if together else lambda name: None
  number = processes * -(-count // (processes * part))
  parts = [directory.with_name(f"{directory.name}.{index}-of-{number}") for index in range(number)]
  done = directory.exists()
  for index in range(first, 0 if done else number, processes):
    if not parts[index].exists():
      search(slice(count * index // number, count * (index + 1) // number)).save(parts[index])
      preemption.check(f"part {index + 1} of {number} of the search is in {parts[index]}")
  meet(f"{directory.name}: parts of the search")
  if first == 0:
    if not done:
      found = [Run.open(one) for one in parts]
      Run(*(np.concatenate([getattr(run, name) for run in found]) for name in ("rows", "scores"))).save(directory)
    a_part = re.compile(re.escape(directory.name) + r"\.\d+-of-\d+(\..*)?")  # another run may be named nearly so
    for one in directory.parent.iterdir():
      if a_part.fullmatch(one.name):
        files.remove(one)
  meet(f"{directory.name}: searched")


def check(config: ConfigDict, width: int) -> None:
  """Raises InputError for what cannot work with vectors of this width."""
  index = config.index
  if index.backend not in ("faiss", "devices"):
    raise InputError("unknown index.backend", value=index.backend, fix="Use faiss or devices")
  if index.device_dtype not in DTYPES:
    raise InputError("unknown index.device_dtype", value=index.device_dtype, fix=f"Use {' or '.join(DTYPES)}")
  if index.backend == "devices" and index.factory != "Flat":
    raise InputError("search on the devices is exact: index.factory is FAISS's", value=index.factory, fix="Use Flat")
  wanted = parameters(index.search_parameters)
  if wanted and index.factory == "Flat":
    raise InputError("index.search_parameters are an index', and search is exact", value=index.search_parameters,
                     fix="Set index.factory, or leave them out")  # fmt: skip
  if index.backend == "faiss":
    Index.check(width, index.factory, wanted)


def parameters(text: str) -> dict[str, int]:
  """'nprobe=64, quantizer_efSearch=32' → {'nprobe': 64, …}."""
  found = {}
  for part in filter(None, (part.strip() for part in text.split(","))):
    name, _, value = part.partition("=")
    if not value.isdigit():
      raise InputError("index.search_parameters is a list of NAME=NUMBER", value=part)
    found[name] = int(value)
  return found
