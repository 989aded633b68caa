"""Search as the config has it: exact, straight from the shards, or through a FAISS index."""

from __future__ import annotations

import pathlib

import numpy as np
from ml_collections import ConfigDict

from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.index import Index
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retrieval.search import search_exact


def dense(config: ConfigDict, queries: Embeddings, passages: Embeddings, depth: int, index: pathlib.Path) -> Run:
  """The `depth` passages of largest inner product for every query; an index is built in `index` where it is missing."""
  vectors = queries.take(np.arange(len(queries)))
  if config.index.factory == "Flat":  # straight from the shards: no second copy of the corpus in memory
    return search_exact(vectors, passages, depth)
  if not (index / "manifest.json").exists():
    Index.build(passages, config.index.factory, sample=config.index.sample).save(index)
  opened = Index.load(index)
  opened.set_parameters(parameters(config.index.search_parameters))
  return opened.search(vectors, depth)


def parameters(text: str) -> dict[str, int]:
  """'nprobe=64, quantizer_efSearch=32' → {'nprobe': 64, …}."""
  found = {}
  for part in filter(None, (part.strip() for part in text.split(","))):
    name, _, value = part.partition("=")
    if not value.isdigit():
      raise InputError("index.search_parameters is a list of NAME=NUMBER", value=part)
    found[name] = int(value)
  return found
