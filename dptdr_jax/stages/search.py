"""Search as the config has it: exact, on the host or the devices, or through a FAISS index."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from dptdr_jax.core import files, preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval.device import DTYPES, search_devices
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.index import Index
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retrieval.search import search_exact
from dptdr_jax.runtime import hosts
from dptdr_jax.runtime import mesh as meshes

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
  opened = Index.load(index)
  opened.set_parameters(parameters(config.index.search_parameters))
  return opened.search(vectors, depth)


def build(config: ConfigDict, passages: Embeddings, index: pathlib.Path) -> None:
  """Builds the FAISS index in `index`, where the config wants one and it is missing."""
  if config.index.backend == "faiss" and config.index.factory != "Flat" and not (index / "manifest.json").exists():
    Index.build(passages, config.index.factory, sample=config.index.sample).save(index)


def shared(directory: pathlib.Path, count: int, search: Callable[[slice], Run]) -> None:
  """Writes the run of `count` queries to `directory`: each process searches for its share, the first joins them.

  What is there already, whole or by shares, is not searched again.
  """
  processes, index = hosts.process_count(), hosts.process_index()
  shares = [directory.with_name(f"{directory.name}.{number}-of-{processes}") for number in range(processes)]
  done, mine = directory.exists(), shares[index]
  if not done and not mine.exists():
    search(slice(count * index // processes, count * (index + 1) // processes)).save(mine)
    preemption.check(f"a share of the search is in {mine}")
  hosts.barrier(f"{directory.name}: shares of the search")
  if hosts.is_main():
    if not done:
      found = [Run.open(share) for share in shares]
      Run(*(np.concatenate([getattr(run, part) for run in found]) for part in ("rows", "scores"))).save(directory)
    for share in directory.parent.glob(f"{directory.name}.*-of-*"):
      files.remove(share)
  hosts.barrier(f"{directory.name}: searched")


def check(config: ConfigDict) -> None:
  """Raises InputError for what cannot work."""
  index = config.index
  if index.backend not in ("faiss", "devices"):
    raise InputError("unknown index.backend", value=index.backend, fix="Use faiss or devices")
  if index.device_dtype not in DTYPES:
    raise InputError("unknown index.device_dtype", value=index.device_dtype, fix=f"Use {' or '.join(DTYPES)}")
  if index.backend == "devices" and index.factory != "Flat":
    raise InputError("search on the devices is exact: index.factory is FAISS's", value=index.factory, fix="Use Flat")
  parameters(index.search_parameters)


def parameters(text: str) -> dict[str, int]:
  """'nprobe=64, quantizer_efSearch=32' → {'nprobe': 64, …}."""
  found = {}
  for part in filter(None, (part.strip() for part in text.split(","))):
    name, _, value = part.partition("=")
    if not value.isdigit():
      raise InputError("index.search_parameters is a list of NAME=NUMBER", value=part)
    found[name] = int(value)
  return found
