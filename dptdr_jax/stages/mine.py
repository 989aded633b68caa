"""mine: hard negatives for a round of training, from several retrievers in one pool, cleaned of false negatives.

Before the first round there is no retriever yet, but there is BM25: mine0 takes that, and runs from elsewhere. mineN
adds what the retriever of round N finds.
"""

from __future__ import annotations

import functools
import itertools
import logging
import pathlib
from collections.abc import Callable, Iterable

import numpy as np
from ml_collections import ConfigDict

from dptdr_jax.core import files, preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.retrieval import pool_checks, runs
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.retrieval.denoise import CrossEncoderRule, MarginRule, Rule, denoise
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.merge import Source, pool_from_runs
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retrieval.texts import TextRule
from dptdr_jax.retriever import Retriever
from dptdr_jax.runtime import hosts
from dptdr_jax.stages import common, cross, encode, negatives_shown, search
from dptdr_jax.stages.layout import Layout

_log = logging.getLogger(__name__)

DENSE = "dense"  # the name of the round's own retriever among the sources
SOURCES = ("bm25", DENSE, "runs")  # as config.mine.sources names them
SEARCHED = ("vectors", "index", "runs")  # what is dear: encoding and searching, hours at MS MARCO's size
# What does not touch it: it says which of the candidates found become negatives.
AFTER_SEARCH = frozenset((
  *(f"config.mine.{source}.{field}" for source in ("bm25", DENSE, "outside")
    for field in ("first", "quota", "relative_margin", "absolute_margin")),
  *(f"config.mine.{field}" for field in ("same_text", "near_duplicate", "cross_encoder", "negative_below",
                                         "positive_above", "pseudo_positives", "width")),
  "config.cross.depth", "stages.cross",
))  # fmt: skip
_BLOCK = 65_536  # queries whose positives are scored at a time


def check(config: ConfigDict) -> None:
  """Raises InputError for what can be known to fail before any work is done."""
  mine = config.mine
  if config.rounds < 1:
    raise InputError("rounds counts trainings, from 1", value=config.rounds)
  if config.train.negatives == "bm25" and not mine.bm25.depth:
    raise InputError("train.negatives is bm25, and mine.bm25.depth is 0")
  if config.cross.enabled and config.cross.negatives == "bm25" and not mine.bm25.depth:
    raise InputError("cross.negatives is bm25, and mine.bm25.depth is 0")
  if unknown := set(mine.sources) - set(SOURCES):
    raise InputError("unknown mine.sources", value=sorted(unknown), fix=f"Use some of {', '.join(SOURCES)}")
  given = {"bm25": mine.bm25.depth, DENSE: mine.dense.depth, "runs": mine.runs and mine.outside.depth}
  if (config.rounds > 1 or config.train.refresh_every) and not any(given[name] for name in mine.sources):
    raise InputError("nothing to mine from: each of mine.sources has a depth of 0 or no files", value=mine.sources)
  _check_runs(mine)
  for name, options in (("bm25", mine.bm25), (DENSE, mine.dense), ("outside", mine.outside)):
    if min(options.depth, options.first, options.quota) < 0 or (options.depth and options.first >= options.depth):
      raise InputError(f"mine.{name}: ranks go from 0 ≤ first < depth, and a quota is not negative",
                       value=(options.first, options.depth, options.quota))  # fmt: skip
  if mine.near_duplicate and not (mine.same_text and 0 < mine.near_duplicate <= 1):
    raise InputError("mine.near_duplicate is a share, and wants mine.same_text", value=mine.near_duplicate)
  if not 0 <= mine.negative_below <= mine.positive_above <= 1:
    raise InputError("mine.negative_below and mine.positive_above are probabilities in this order",
                     value=(mine.negative_below, mine.positive_above))  # fmt: skip
  if config.train.refresh_every and not (mine.dense.depth and DENSE in mine.sources):
    raise InputError("train.refresh_every mines with the retriever as it trains", fix="Set mine.dense.depth above 0")
  if mine.cross_encoder and not config.cross.enabled:
    raise InputError("mine.cross_encoder wants a cross-encoder", fix="Set cross.enabled to True")
  if mine.pseudo_positives and not mine.cross_encoder:
    raise InputError("mine.pseudo_positives are the cross-encoder's", fix="Set mine.cross_encoder to True")
  if mine.pseudo_positives and config.train.positive == "first":
    raise InputError("mine.pseudo_positives are never the first positive", fix="Set train.positive to rotate")
  _margins(config, ("bm25", DENSE))


def _check_runs(mine: ConfigDict) -> None:
  names = ["bm25", DENSE]
  for path in mine.runs:
    if not pathlib.Path(path).is_file():
      raise InputError("no such run file", path=path)
    if pathlib.Path(path).name in names:
      raise InputError("two sources of one name", path=path, fix="Give the run file a name of its own")
    names.append(pathlib.Path(path).name)


def outside_files(config: ConfigDict) -> list[files.Path]:
  """Files from outside that a pool depends on."""
  return list(config.mine.runs)


def run(config: ConfigDict, workdir: files.Path, number: int = 0) -> None:
  """Writes DIR/mineN/pool: negatives for each training query, best first, with what each source says of them."""
  layout = Layout.of(workdir)
  data, directory = PreparedData(layout.prepared), layout.mine(number)
  wanted = number and config.mine.dense.depth and DENSE in config.mine.sources
  retriever = common.trained(config, layout, number) if wanted else None
  if retriever is not None:
    encode_both(config, layout, data, directory, retriever)
  if hosts.process_count() > 1:
    _search_together(config, layout, data, directory, retriever)
  if hosts.is_main():  # what follows is one host's
    mine(config, layout, data, directory, retriever)


def mine(
  config: ConfigDict, layout: Layout, data: PreparedData, directory: pathlib.Path, retriever: Retriever | None
) -> Pool:
  """Mines into `directory`: vectors/, runs/, merged/, pool/ and mining.json; what is there is not made again.

  Args:
    directory: that of mine0, where BM25 stands alone beside runs from elsewhere and nothing but the cheap rules
      denoises; or any other, where config.mine.sources counts and the cross-encoder (if there is one) is trained.
    retriever: the dense source; None: there is none.
  """
  positives = common.qrels(data.splits[config.data.train_split])
  sources = _sources(config, layout, data, positives, directory, retriever)
  if not (directory / "merged" / "manifest.json").exists():
    pool_from_runs(directory / "merged", sources, positives, width=config.mine.width or None)
  preemption.check(f"mining stands before denoising, in {directory}")
  pool = _denoise(config, layout, directory, _rules(config, data, positives, list(sources)))
  warnings = pool_checks.suspicions(pool)
  for warning in warnings:
    _log.warning("%s: %s", directory, warning)
  files.write_json(directory / "mining.json", negatives_shown.summary(config, data, pool, warnings))
  return pool


def _is_first(layout: Layout, directory: pathlib.Path) -> bool:
  """Whether a pool is the one before round 1."""
  return directory == layout.mine(0)


def _denoise(config: ConfigDict, layout: Layout, directory: pathlib.Path, rules: list[Rule]) -> Pool:
  """Applies the cheap rules, then the cross-encoder to what they leave."""
  options = config.mine
  if not options.cross_encoder or _is_first(layout, directory):
    return denoise(directory / "pool", directory / "merged", rules)
  cleaned = directory / "cleaned"
  pool = Pool.open(cleaned) if (cleaned / "manifest.json").exists() else denoise(cleaned, directory / "merged", rules)
  scores = cross.score_pool(config, layout, pool, directory / "scores")
  rule = CrossEncoderRule(scores, options.negative_below, options.positive_above)
  return denoise(directory / "pool", cleaned, [rule])


def _sources(
  config: ConfigDict, layout: Layout, data: PreparedData, positives: Qrels, directory: pathlib.Path,
  retriever: Retriever | None,
) -> dict[str, Source]:  # fmt: skip
  mine, found = config.mine, {}
  split = data.splits[config.data.train_split]

  def searched(name: str, make: Callable[[], Run], options: ConfigDict, scores: np.ndarray | None = None) -> None:
    path = directory / "runs" / name
    if not path.exists():
      make().save(path)
      preemption.check(f"mining stands after the search by {name}, in {directory}")
    depth = min(options.depth, len(data.ids))
    found[name] = Source(Run.open(path), depth, options.first, options.quota or None, scores)

  _take_bm25_of_mine0(config, layout, directory)
  searches = _searches(config, layout, data, directory, retriever)
  everything = slice(0, len(split))
  if "bm25" in searches:
    searched("bm25", functools.partial(searches["bm25"], everything), mine.bm25)
  if retriever is not None:
    queries, passages = encode_both(config, layout, data, directory, retriever, together=False)
    scores = positive_scores(queries, passages, positives)
    searched(DENSE, functools.partial(searches[DENSE], everything), mine.dense, scores)
  if mine.runs and mine.outside.depth and (_is_first(layout, directory) or "runs" in mine.sources):
    depth = min(mine.outside.depth, len(data.ids))
    for path in mine.runs:
      read = functools.partial(runs.read_trec, path, split.ids.rows, data.ids.rows, len(split), depth)
      searched(pathlib.Path(path).name, read, mine.outside)
  return found


def _searches(
  config: ConfigDict, layout: Layout, data: PreparedData, directory: pathlib.Path, retriever: Retriever | None
) -> dict[str, Callable[[slice], Run]]:
  """The retrievers that are asked here: each searches for some rows of the training queries."""
  split, deepest, found = data.splits[config.data.train_split], len(data.ids), {}

  def by_bm25(rows: slice) -> Run:
    texts = [query.text for query in itertools.islice(split.queries.read(), rows.start, rows.stop)]
    return common.bm25(layout, data).search(texts, min(config.mine.bm25.depth, deepest))

  def by_retriever(rows: slice) -> Run:
    queries, passages = (Embeddings(directory / "vectors" / part) for part in (config.data.train_split, "corpus"))
    return search.dense(config, queries, passages, min(config.mine.dense.depth, deepest), directory / "index", rows)

  if config.mine.bm25.depth and (_is_first(layout, directory) or "bm25" in config.mine.sources):
    found["bm25"] = by_bm25
  if retriever is not None:
    found[DENSE] = by_retriever
  return found


def _take_bm25_of_mine0(config: ConfigDict, layout: Layout, directory: pathlib.Path) -> None:
  """BM25 finds the same for every round: links what it found for the first, where this run has asked it then."""
  before, path = layout.mine(0) / "runs" / "bm25", directory / "runs" / "bm25"
  if common.mines_first(config) and "bm25" in config.mine.sources and before.exists() and not path.exists():
    files.link_tree(before, path)


def _search_together(
  config: ConfigDict, layout: Layout, data: PreparedData, directory: pathlib.Path, retriever: Retriever | None
) -> None:
  """All processes search, each for its share of the training queries; indexes are the first one's to build."""
  with hosts.first_goes_first("what BM25 found before"):
    if hosts.is_main():
      _take_bm25_of_mine0(config, layout, directory)
  searches = _searches(config, layout, data, directory, retriever)
  with hosts.first_goes_first("indexes"):
    if hosts.is_main() and "bm25" in searches:
      common.bm25(layout, data)
    if hosts.is_main() and DENSE in searches:
      search.build(config, Embeddings(directory / "vectors" / "corpus"), directory / "index")
  for name, make in searches.items():
    part = search.part_queries(config, dense=name == DENSE)
    search.shared(directory / "runs" / name, len(data.splits[config.data.train_split]), make, part)


def encode_both(
  config: ConfigDict, layout: Layout, data: PreparedData, directory: pathlib.Path, retriever: Retriever,
  together: bool = True,
) -> tuple[Embeddings, Embeddings]:  # fmt: skip
  """Vectors of the training queries and of the corpus; `together`: all processes make them."""
  split = config.data.train_split
  ids = {split: data.splits[split].ids, "corpus": data.ids}
  places = {part: directory / "vectors" / part for part in ids}
  for part, kind in ((split, "query"), ("corpus", "passage")):
    encode.encode(config, layout, places[part], part, retriever, kind, ids[part], together)
  return Embeddings(places[split]), Embeddings(places["corpus"])


def positive_scores(queries: Embeddings, passages: Embeddings, positives: Qrels) -> np.ndarray:
  """The best score of each query's judged positives, float32 [Q]; NaN where it has none."""
  best = np.full(len(queries), np.nan, np.float32)
  for start in range(0, len(queries), _BLOCK):
    stop = min(start + _BLOCK, len(queries))
    span = slice(positives.offsets[start], positives.offsets[stop])
    owners = np.repeat(np.arange(stop - start), np.diff(positives.offsets[start : stop + 1]))
    relevant = positives.grades[span] > 0
    owners, rows = owners[relevant], positives.rows[span][relevant]
    vectors = queries.take(np.arange(start, stop))
    scores = np.einsum("nh,nh->n", vectors[owners], passages.take(rows))
    np.fmax.at(best[start:stop], owners, scores)
  return best


def _rules(config: ConfigDict, data: PreparedData, positives: Qrels, sources: list[str]) -> list[Rule]:
  mine, rules = config.mine, []
  if mine.same_text:
    rules.append(TextRule(positives, texts(data), near_duplicate=mine.near_duplicate or None))
  return [*rules, *_margins(config, sources)]


def _margins(config: ConfigDict, sources: Iterable[str]) -> list[MarginRule]:
  """The margins on each source that has them; mine0 has no dense one."""
  mine = config.mine
  named = {"bm25": mine.bm25, DENSE: mine.dense}
  rules = []
  for name in (name for name in named if name in sources):
    options = named[name]
    if options.relative_margin or options.absolute_margin:
      rules.append(MarginRule(name, options.relative_margin or None, options.absolute_margin or None))
  return rules


def texts(data: PreparedData) -> Callable[[np.ndarray], Iterable[tuple[str, str]]]:
  """What reads (title, text) of passage rows."""

  def read(rows: np.ndarray) -> list[tuple[str, str]]:
    return [(passage.title, passage.text) for passage in data.passages.take(rows)]

  return read
