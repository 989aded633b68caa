"""encode: vectors of the whole corpus and of the judged queries, by every retriever that will be evaluated."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from dptdr_jax.core import files, manifest, preemption
from dptdr_jax.data.ids import IdTable
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.data.store import TokenStore
from dptdr_jax.retrieval.embeddings import Embeddings, EmbeddingWriter
from dptdr_jax.retriever import Retriever
from dptdr_jax.runtime import hosts
from dptdr_jax.stages import systems
from dptdr_jax.stages.layout import Layout

_log = logging.getLogger(__name__)

# What the corpus' vectors by one system do not depend on, or what a writer of vectors asks for itself.
BESIDE_CORPUS = frozenset((
  "stages", "files", "config.rounds", "config.evaluate.splits", "config.evaluate.backbone",
  "config.evaluate.other_poolings",
))  # fmt: skip


def run(config: ConfigDict, workdir: files.Path) -> None:
  """Writes DIR/encode/SYSTEM/{corpus,SPLIT}: .npy shards, ids and a manifest; goes on at the first missing shard."""
  layout = Layout.of(workdir)
  data = PreparedData(layout.prepared)
  elsewhere = systems.saved(config)
  for system, retriever in systems.retrievers(config, layout):
    for part in (*config.evaluate.splits, "corpus"):
      if part == "corpus" and system not in elsewhere:
        if hosts.is_main():
          _take_over(config, layout, system, retriever)
        hosts.barrier(f"{system}: what mining has encoded")
      ids = data.ids if part == "corpus" else data.splits[part].ids
      made = _of_text(config, data, part, retriever) if system in elsewhere else stored(config, layout, part, retriever)
      encode(config, layout, layout.embeddings(system, part), retriever, ids, made)
    del retriever, made  # and its backbone, before the next one's is read


def _take_over(config: ConfigDict, layout: Layout, system: str, retriever: Retriever) -> None:
  """Links the corpus' vectors where mining has made the same ones."""
  own = system.startswith("train")
  places = [layout.mined_vectors(int(system.removeprefix("train")) if own else 1, "corpus", "" if own else system)]
  if not own and config.train.refresh_every:  # while round 1 trained
    places.append(layout.train(1) / "retrievers" / system / "vectors" / "corpus")
  target, source = layout.embeddings(system, "corpus"), _source(layout, "corpus", retriever)
  for mined in places:
    if not (mined / "manifest.json").exists():
      continue
    made = Embeddings(mined)
    there = manifest.read(target / "manifest.json") or manifest.read(target / "begun.json") or {}
    if made.source == source and made.dtype == config.encode.dtype and there.get("source") != source:
      files.link_tree(mined, target)


def _source(layout: Layout, part: str, retriever: Retriever) -> dict:
  """What vectors depend on, the texts too: those of another corpus, and an index of them, are others though all else is
  the same. The dtype of products as well, so that what one machine began another does not mix with."""
  kind, texts = _kind(part), TokenStore(layout.store(part)).key
  about = {"retriever": retriever.hash, "kind": kind, "tokens": retriever.settings.limit(kind), "texts": texts}
  return about | {"compute_dtype": retriever.backbone.compute_dtype}


def _kind(part: str) -> str:
  """What the texts of the corpus ('corpus') or of a split are to a retriever."""
  return "passage" if part == "corpus" else "query"


def stored(config: ConfigDict, layout: Layout, part: str, retriever: Retriever) -> Callable[[range], np.ndarray]:
  """What makes vectors of rows of the corpus ('corpus') or of a split's queries, out of their token store."""
  store = TokenStore(layout.store(part))
  options = {"batch_tokens": config.encode.batch_tokens, "description": f"encode {part}"}
  return lambda rows: retriever.encode_store(store, _kind(part), rows, **options)


def _of_text(config: ConfigDict, data: PreparedData, part: str, retriever: Retriever) -> Callable[[range], np.ndarray]:
  """The same out of their text: a retriever from elsewhere has templates and perhaps a tokenizer of its own."""
  records = data.passages if part == "corpus" else data.splits[part].queries
  options = {"batch_tokens": config.encode.batch_tokens, "description": f"encode {part}"}
  return lambda rows: retriever.encode_records(records.take(rows), **options)


def encode(
  config: ConfigDict, layout: Layout, directory: files.Path, retriever: Retriever, ids: IdTable,
  made: Callable[[range], np.ndarray], together: bool = True,
) -> None:  # fmt: skip
  """Vectors of passages or of queries into `directory`, which has the part's name; whole shards are kept.

  Several processes take turns at the shards; without `together` this one makes all.

  Args:
    made: makes those of some rows.
  """
  count, index = (hosts.process_count(), hosts.process_index()) if together else (1, 0)
  meet = hosts.barrier if together else lambda name: None
  part = directory.name
  writer = EmbeddingWriter(
    directory, count=len(ids), width=retriever.backbone.config.hidden_size, source=_source(layout, part, retriever),
    shard_rows=config.encode.shard_passages, dtype=config.encode.dtype, begins=index == 0,
  )  # fmt: skip
  missing = hosts.first_says(writer.missing) if together else writer.missing()
  for shard in missing[index::count]:
    rows = writer.rows(shard)
    _log.info("%s, shard %d of %d", directory, shard + 1, writer.num_shards)
    writer.write(shard, made(rows))
    preemption.check(f"encoding stands after shard {shard + 1} of {writer.num_shards} in {directory}")
  meet(f"encode {part}: all shards")
  if index == 0:
    writer.finish(ids)
  meet(f"encode {part}: done")
