"""mine: hard negatives for a round of training. Before the first round there is no retriever yet, but there is BM25."""

from __future__ import annotations

from ml_collections import ConfigDict

from dptdr_jax.core import files
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.retrieval.merge import Source, pool_from_runs
from dptdr_jax.stages import common
from dptdr_jax.stages.layout import Layout


def run(config: ConfigDict, workdir: files.Path, number: int = 0) -> None:
  """Writes DIR/mineN/pool: for each training query what BM25 ranks highest, without the judged positives."""
  layout = Layout.of(workdir)
  data = PreparedData(layout.prepared)
  split = data.splits[config.data.train_split]
  queries = [query.text for query in split.queries.read()]
  depth = config.train.bm25_depth
  # Deeper by the most positives that a query has, so that leaving them out costs no negative.
  positives = common.qrels(split)
  most = int((positives.offsets[1:] - positives.offsets[:-1]).max())
  found = common.bm25(layout, data).search(queries, depth + most)
  pool_from_runs(layout.pool(number), {"bm25": Source(found, depth + most, quota=depth)}, positives)
