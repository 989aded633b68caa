"""Search as the config has it: exact, on the host or the devices, or through a FAISS index."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval.device import DTYPES, search_devices
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.index import Index
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retrieval.search import search_exact
from dptdr_jax.runtime import mesh as meshes

_RESCORE = 2  # so many times the depth is found in bfloat16 and scored again in float32


def dense(config: ConfigDict, queries: Embeddings, passages: Embeddings, depth: int, index: pathlib.Path) -> Run:
  """The `depth` passages of largest inner product for every query; an index is built in `index` where it is missing."""
  vectors = queries.take(np.arange(len(queries)))
  if config.index.backend == "devices":
    mesh = meshes.make_mesh(devices=jax.local_devices())
    dtype = config.index.device_dtype
    return search_devices(
      vectors, passages, depth, mesh=mesh, dtype=dtype, device_bytes=config.index.device_bytes,
      rescore=_RESCORE if dtype == "bfloat16" else 0,
    )  # fmt: skip
  if config.index.factory == "Flat":  # straight from the shards: no second copy of the corpus in memory
    return search_exact(vectors, passages, depth)
  if not (index / "manifest.json").exists():
    Index.build(passages, config.index.factory, sample=config.index.sample).save(index)
  opened = Index.load(index)
  opened.set_parameters(parameters(config.index.search_parameters))
  return opened.search(vectors, depth)


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
