"""How many known false negatives each rule of denoising removes, and how many other candidates.

  python benchmarks/false_negatives.py --workdir runs/medquad [--system backbone] [--depth 100]

Of every training query with several judged positives one is hidden before negatives are mined, from BM25 and from a
dense system that the run has encoded (by default the untuned backbone, which has seen no judgement). Printed for each
rule alone: the share of hidden positives that are left among the negatives, and the share of other candidates lost.

A cross-encoder must not have seen the hidden ones. Write the judgements without them, train it on a copy of the folder
that has these as qrels/train.tsv, and let it score:

  python benchmarks/false_negatives.py --workdir runs/medquad --write-qrels train.tsv
  python -m dptdr_jax.main --config=configs/beir.py --config.data.dir=COPY --config.train.negatives=bm25 \
    --config.cross.enabled=True --stages=prepare,mine0,cross --workdir=runs/hidden
  python benchmarks/false_negatives.py --workdir runs/medquad --depth 30 --cross-encoder runs/hidden/cross/model

Then everything is over the queries with a hidden positive, or --queries of them, drawn at random.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile

import numpy as np

from dptdr_jax.backbone import Backbone
from dptdr_jax.core.store import Ref, Store
from dptdr_jax.core.team import SOLO
from dptdr_jax.data.ids import IdTable
from dptdr_jax.data.prepare import Corpus, Split
from dptdr_jax.data.store import TokenStore
from dptdr_jax.pipeline import pools, rerank, run
from dptdr_jax.pipeline.mine import positive_scores
from dptdr_jax.pipeline.systems import systems
from dptdr_jax.reranker import CrossEncoder
from dptdr_jax.retrieval.bm25 import Bm25
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.retrieval.denoise import CrossEncoderRule, MarginRule, Rule, denoise
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.merge import Source, pool_from_runs
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retrieval.search import search_exact
from dptdr_jax.retrieval.texts import TextRule
from dptdr_jax.retriever import Retriever


def parse_arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, help="of a finished run")
  parser.add_argument("--split", default="train")
  parser.add_argument("--system", default="backbone", help="dense, by its name in results.json")
  parser.add_argument("--depth", type=int, default=100, help="ranks of each source that are candidates")
  parser.add_argument("--write-qrels", default="", help="write a BEIR file of the judgements that are left, and end")
  parser.add_argument("--cross-encoder", default="", help="directory of one that was trained without the hidden ones")
  parser.add_argument("--queries", type=int, default=0, help="with a cross-encoder: so many are enough; 0: all")
  return parser.parse_args()


class Finished:
  """The artefacts of a run."""

  def __init__(self, workdir: str):
    self.settings, self.workdir = run.opened(workdir)
    self._store = Store(run.artefact(self.workdir, "prepare/corpus").parents[1])
    self.graph = run.plan(self.settings, self._store)

  def path(self, ref: Ref) -> pathlib.Path:
    return self._store.path(ref)

  def tokens(self, split: str = "") -> TokenStore:
    return TokenStore(self.path(self.graph.tokens(split)) / "tokens")

  def retriever(self, name: str) -> tuple[Retriever, Embeddings]:
    """A dense system and its vectors of the corpus."""
    system = next(one for one in systems(self.settings) if one.name == name and one.is_dense)
    passages = Embeddings(self.path(self.graph.vectors(self.graph.retriever(system))))
    if system.kind != "untuned":
      return Retriever.load(system.directory or self.workdir / name / "retriever"), passages
    fields = self.settings.vector.model_dump() | {"pooling": system.pooling}
    lengths = {f"{side}_length": passages.source["tokens"] for side in ("query", "passage")}
    path = self.workdir / "pretrain" / "backbone" if system.pretrained else self.settings.backbone.path
    return Retriever.untuned(Backbone.load(path), **fields, **lengths), passages


def relevant(judged: Qrels) -> Qrels:
  """Judgements with a grade above 0."""
  owners, kept = np.repeat(np.arange(len(judged)), np.diff(judged.offsets)), judged.grades > 0
  return Qrels.from_triples(owners[kept], judged.rows[kept], judged.grades[kept], len(judged))


def hide(positives: Qrels, seed: int = 0) -> tuple[Qrels, np.ndarray, np.ndarray]:
  """Positives without one of each query that has several; these queries, and what was hidden of each."""
  counts = np.diff(positives.offsets)
  queries = np.flatnonzero(counts > 1)
  places = positives.offsets[queries] + np.random.default_rng(seed).integers(counts[queries])
  kept = np.ones(len(positives.rows), bool)
  kept[places] = False
  owners = np.repeat(np.arange(len(positives)), counts)
  left = Qrels.from_triples(owners[kept], positives.rows[kept], positives.grades[kept], len(positives))
  return left, queries, positives.rows[places]


def write_qrels(path: pathlib.Path, positives: Qrels, query_ids: IdTable, passage_ids: IdTable) -> None:
  """Writes judgements as a BEIR folder has them."""
  with open(path, "w", encoding="utf-8") as stream:
    stream.write("query-id\tcorpus-id\tscore\n")
    for query in range(len(positives)):
      for passage, grade in zip(*positives.of(query), strict=True):
        stream.write(f"{query_ids[query]}\t{passage_ids[int(passage)]}\t{grade}\n")


def only(ranked: Run, queries: np.ndarray) -> Run:
  """A run in which all other queries have no answer."""
  some = Run.empty(len(ranked), ranked.depth)
  some.rows[queries], some.scores[queries] = ranked.rows[queries], ranked.scores[queries]
  return some


def rules(positives: Qrels, corpus: Corpus) -> dict[str, Rule]:
  """The rules, each alone."""
  listed: dict[str, Rule] = {"same text": TextRule(positives, pools.texts(corpus.passages))}
  for source in ("bm25", "dense"):
    listed |= {f"{source}: above {share} s⁺": MarginRule(source, share) for share in (1.0, 0.95, 0.9, 0.8)}
  return listed


def crossed(finished: Finished, args: argparse.Namespace, pool: Pool) -> dict[str, Rule]:
  """The cross-encoder's thresholds; its scores are kept beside it, so that a killed run resumes."""
  place = pathlib.Path(args.cross_encoder).resolve().with_name("scores-of-hidden")
  stores = finished.tokens(args.split), finished.tokens()
  rerank.score_rows(CrossEncoder.load(args.cross_encoder), *stores, np.asarray(pool.rows), place, SOLO)
  scores = rerank.Probabilities(rerank.logits_of(place))
  limits = (0.1, 0.5, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)
  return {f"cross-encoder ≥ {below}": CrossEncoderRule(scores, below, max(below, 0.9)) for below in limits}


def shares(pool: Pool, queries: np.ndarray, rows: np.ndarray) -> tuple[float, float, float]:
  """Shares of the hidden (query, passage) pairs in a pool and among its negatives, and of the others removed."""
  keys = np.arange(len(pool))[:, None] << 32 | pool.rows.astype(np.int64)
  present, kept = pool.rows >= 0, pool.kept(slice(None))
  hidden = present & np.isin(keys, queries.astype(np.int64) << 32 | rows.astype(np.int64))
  others = present & ~hidden
  lost = (others & ~kept).sum() / max(1, others.sum())
  return hidden.sum() / len(queries), (hidden & kept).sum() / len(queries), lost


class Rows:
  """Vectors in memory as `positive_scores` reads them."""

  def __init__(self, vectors: np.ndarray):
    self._vectors = vectors

  def __len__(self) -> int:
    return len(self._vectors)

  def take(self, rows: np.ndarray) -> np.ndarray:
    return self._vectors[rows]


def main() -> None:
  args = parse_arguments()
  finished = Finished(args.workdir)
  corpus = Corpus(finished.path(finished.graph.corpus))
  split = Split(finished.path(finished.graph.split(args.split)), args.split)
  positives, queries, hidden = hide(relevant(pools.qrels(split)))
  if args.write_qrels:
    write_qrels(pathlib.Path(args.write_qrels), positives, split.ids, corpus.ids)
    return
  retriever, passages = finished.retriever(args.system)
  vectors = retriever.encode_store(finished.tokens(args.split), "query", description="encode queries")
  index = Bm25(finished.path(finished.graph.bm25) / "index")
  bm25 = index.search([query.text for query in split.queries.read()], args.depth)
  dense = search_exact(vectors, passages, args.depth)
  if args.cross_encoder:
    drawn = np.sort(np.random.default_rng(1).permutation(len(queries))[: args.queries or None])
    queries, hidden = queries[drawn], hidden[drawn]
    bm25, dense = only(bm25, queries), only(dense, queries)
  best = positive_scores(Rows(vectors), passages, positives)
  sources = {"bm25": Source(bm25, args.depth), "dense": Source(dense, args.depth, positive_scores=best)}
  with tempfile.TemporaryDirectory() as place:
    merged = pathlib.Path(place, "merged")
    pool = pool_from_runs(merged, sources, positives)
    wanted = rules(positives, corpus) | (crossed(finished, args, pool) if args.cross_encoder else {})
    print(f"{len(queries):,} hidden positives, {pool.manifest['counts']['candidates']:,} candidates")
    print("| rule alone | hidden ones left | of those in the pool removed | others lost |\n|---|---|---|---|")
    for name, rule in wanted.items():
      before, after, lost = shares(denoise(pathlib.Path(place, "cleaned"), merged, [rule]), queries, hidden)
      print(f"| {name} | {after:.1%} (of {before:.1%}) | {1 - after / before:.1%} | {lost:.1%} |")


if __name__ == "__main__":
  main()
