"""encode: vectors of the whole corpus and of the judged queries, by every retriever that will be evaluated."""

from __future__ import annotations

import logging

from ml_collections import ConfigDict

from dptdr_jax.core import files, preemption
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.data.store import TokenStore
from dptdr_jax.retrieval.embeddings import EmbeddingWriter
from dptdr_jax.retriever import Retriever
from dptdr_jax.stages import common
from dptdr_jax.stages.layout import Layout

_log = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: files.Path) -> None:
  """Writes DIR/encode/SYSTEM/{corpus,SPLIT}: .npy shards, ids and a manifest; goes on at the first missing shard."""
  layout = Layout.of(workdir)
  data = PreparedData(layout.prepared)
  for system, retriever in common.retrievers(config, layout).items():
    for split in config.evaluate.splits:
      ids = data.splits[split].ids
      _encode(config, layout, system, retriever, split, "query", ids)
    _encode(config, layout, system, retriever, "corpus", "passage", data.ids)


def _encode(config: ConfigDict, layout: Layout, system: str, retriever: Retriever, part: str, kind: str, ids) -> None:
  store = TokenStore(layout.store(part))
  writer = EmbeddingWriter(
    layout.embeddings(system, part), count=len(store), width=retriever.backbone.config.hidden_size,
    source={"retriever": retriever.hash, "kind": kind, "tokens": retriever.settings.limit(kind)},
    shard_rows=config.encode.shard_passages, dtype=config.encode.dtype,
  )  # fmt: skip
  for shard in writer.missing():
    rows = writer.rows(shard)
    _log.info("%s: %s, shard %d of %d", system, part, shard + 1, writer.num_shards)
    vectors = retriever.encode_store(
      store, kind, range(rows.start, rows.stop), batch_tokens=config.encode.batch_tokens, description=f"encode {part}"
    )
    writer.write(shard, vectors)
    preemption.check(f"encoding stands after shard {shard + 1} of {writer.num_shards} of {part} by {system}")
  writer.finish(ids.ids(range(len(ids))))
