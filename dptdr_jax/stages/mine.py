"""mine: hard negatives for a round of training, from several retrievers in one pool, cleaned of false negatives.

Before the first round there is no retriever yet, but there is BM25: mine0 takes that, and runs from elsewhere. mineN
adds what the retriever of round N finds.
"""

from __future__ import annotations

import contextlib
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
from dptdr_jax.retrieval.candidates import MAX_DEPTH, MAX_SOURCES, Pool
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
  if _mines_with_retriever(config) and not _names(mine, first=False):
    raise InputError("nothing to mine from: each of mine.sources has a depth of 0 or no files", value=mine.sources)
  _check_sources(mine)
  if mine.width < 0:
    raise InputError("mine.width is not negative", value=mine.width, fix="0: whatever the sources give")
  if mine.near_duplicate and not (mine.same_text and 0 < mine.near_duplicate <= 1):
    raise InputError("mine.near_duplicate is a share, and wants mine.same_text", value=mine.near_duplicate)
  if not 0 <= mine.negative_below <= mine.positive_above <= 1:
    raise InputError("mine.negative_below and mine.positive_above are probabilities in this order",
                     value=(mine.negative_below, mine.positive_above))  # fmt: skip
  if config.train.refresh_every and not (mine.dense.depth and DENSE in mine.sources):
    raise InputError("train.refresh_every mines with the retriever as it trains", fix="Set mine.dense.depth above 0")
  _check_cross_encoder(config)
  _check_simans(config)
  _margins(config, ("bm25", DENSE, "outside"))


def _check_cross_encoder(config: ConfigDict) -> None:
  mine = config.mine
  if mine.cross_encoder and not config.cross.enabled:
    raise InputError("mine.cross_encoder wants a cross-encoder", fix="Set cross.enabled to True")
  if mine.pseudo_positives and not mine.cross_encoder:
    raise InputError("mine.pseudo_positives are the cross-encoder's", fix="Set mine.cross_encoder to True")
  if mine.cross_encoder and not _mines_with_retriever(config):
    raise InputError("mine.cross_encoder denoises what is mined after round 1 or while it trains, and nothing is",
                     fix="Set rounds to 2, or train.refresh_every above 0")  # fmt: skip
  if mine.pseudo_positives and config.train.positive == "first":
    raise InputError("mine.pseudo_positives are never the first positive", fix="Set train.positive to rotate")


def _check_simans(config: ConfigDict) -> None:
  train, mine = config.train, config.mine
  if train.sampling != "simans":
    return
  known = ("bm25", DENSE, *(pathlib.Path(path).name for path in mine.runs))
  if train.simans_source not in known:
    raise InputError("unknown train.simans_source", value=train.simans_source, fix=f"Use {', '.join(known)}")


def _mines_with_retriever(config: ConfigDict) -> bool:
  """Whether there are pools besides that of mine0."""
  return config.rounds > 1 or config.train.refresh_every > 0


def _names(mine: ConfigDict, first: bool) -> list[str]:
  """The sources of a pool; the `first` one is mined before there is a retriever, and mine.sources is not of it."""
  found = ["bm25"] if mine.bm25.depth and (first or "bm25" in mine.sources) else []
  found += [DENSE] if mine.dense.depth and not first and DENSE in mine.sources else []
  outside = mine.outside.depth and (first or "runs" in mine.sources)
  return found + [pathlib.Path(path).name for path in (mine.runs if outside else ())]


def _options(mine: ConfigDict, name: str) -> ConfigDict:
  """What is taken of a source; of run files alike."""
  return {"bm25": mine.bm25, DENSE: mine.dense}.get(name, mine.outside)


def _check_sources(mine: ConfigDict) -> None:
  for name in ("bm25", DENSE, "outside"):
    options = _options(mine, name)
    if min(options.depth, options.first, options.quota) < 0 or (options.depth and options.first >= options.depth):
      raise InputError(f"mine.{name}: ranks go from 0 ≤ first < depth, and a quota is not negative",
                       value=(options.first, options.depth, options.quota))  # fmt: skip
    if options.depth > MAX_DEPTH:
      raise InputError(f"mine.{name}.depth is beyond the {MAX_DEPTH:,} ranks that a pool holds", value=options.depth)
  if (number := max(len(_names(mine, first)) for first in (True, False))) > MAX_SOURCES:
    raise InputError(f"a pool takes {MAX_SOURCES} sources at most", value=number, fix="Name fewer mine.runs")
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
  if hosts.is_main():  # before anything dear: what is wrong with them shows at once
    _read_runs(config, layout, data, directory, directory)
  names = _names(config.mine, first=not number)
  retriever = common.trained(config, layout, number) if DENSE in names else None
  if retriever is not None:
    encode_both(config, layout, data, directory, retriever)
  _search(config, layout, data, directory, directory)
  if hosts.is_main():  # what follows is one host's
    mine(config, layout, data, directory, retriever)


def mine(
  config: ConfigDict, layout: Layout, data: PreparedData, directory: pathlib.Path, retriever: Retriever | None,
  shared: pathlib.Path | None = None,
) -> Pool:  # fmt: skip
  """Mines into `directory`: vectors/, runs/, merged/, pool/ and mining.json; what is there is not made again.

  It waits for no other process.

  Args:
    directory: that of mine0, where BM25 stands alone beside runs from elsewhere and nothing but the cheap rules
      denoises; or any other, where config.mine.sources counts and the cross-encoder (if there is one) is trained.
    retriever: the dense source; None: there is none.
    shared: has runs/ of the other sources, the same for all who share it; None: `directory`.
  """
  shared = directory if shared is None else shared
  _read_runs(config, layout, data, directory, shared)
  if retriever is not None:
    encode_both(config, layout, data, directory, retriever, together=False)
  _search(config, layout, data, directory, shared, together=False)
  positives = common.qrels(data.splits[config.data.train_split])
  sources = _sources(config, layout, data, positives, directory, shared)
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
  shared: pathlib.Path,
) -> dict[str, Source]:  # fmt: skip
  """What was found, and what is taken of it."""
  found = {}
  for name in _names(config.mine, _is_first(layout, directory)):
    options, scores = _options(config.mine, name), None
    if name == DENSE:
      scores = positive_scores(*_vectors(config, directory), positives)
    run = Run.open(_place(name, directory, shared))
    found[name] = Source(run, min(options.depth, len(data.ids)), options.first, options.quota or None, scores)
  return found


def _place(name: str, directory: pathlib.Path, shared: pathlib.Path) -> pathlib.Path:
  """Where the run of a source is: only the retriever finds something else for every pool."""
  return (directory if name == DENSE else shared) / "runs" / name


def _vectors(config: ConfigDict, directory: pathlib.Path) -> tuple[Embeddings, Embeddings]:
  """Those of the training queries and of the corpus, as `encode_both` has made them."""
  return Embeddings(directory / "vectors" / config.data.train_split), Embeddings(directory / "vectors" / "corpus")


def _read_runs(
  config: ConfigDict, layout: Layout, data: PreparedData, directory: pathlib.Path, shared: pathlib.Path
) -> None:
  """Reads the run files that a pool takes from elsewhere."""
  mine, split = config.mine, data.splits[config.data.train_split]
  wanted, depth = _names(mine, _is_first(layout, directory)), min(mine.outside.depth, len(data.ids))
  for path in mine.runs:
    name = pathlib.Path(path).name
    place = _place(name, directory, shared)
    if name in wanted and not place.exists():
      runs.read_trec(path, split.ids.rows, data.ids.rows, len(split), depth).save(place)
      preemption.check(f"mining stands after reading {name}, in {directory}")


def _search(
  config: ConfigDict, layout: Layout, data: PreparedData, directory: pathlib.Path, shared: pathlib.Path,
  together: bool = True,
) -> None:  # fmt: skip
  """Searches by the retrievers that are asked here, in parts of the training queries.

  `together`: all processes take turns at the parts, and the first one builds indexes; else this one does all.
  """
  searches = _searches(config, layout, data, directory)
  places = {name: _place(name, directory, shared) for name in searches}
  with hosts.first_goes_first("indexes") if together else contextlib.nullcontext():
    if not together or hosts.is_main():
      _prepare_search(config, layout, data, directory, places)
  count = len(data.splits[config.data.train_split])
  for name, make in searches.items():
    search.shared(places[name], count, make, search.part_queries(config, dense=name == DENSE), together)


def _searches(
  config: ConfigDict, layout: Layout, data: PreparedData, directory: pathlib.Path
) -> dict[str, Callable[[slice], Run]]:
  """The retrievers that are asked here: each searches for some rows of the training queries."""
  split, deepest = data.splits[config.data.train_split], len(data.ids)

  def by_bm25(rows: slice) -> Run:
    texts = [query.text for query in itertools.islice(split.queries.read(), rows.start, rows.stop)]
    return common.bm25(layout, data).search(texts, min(config.mine.bm25.depth, deepest))

  def by_retriever(rows: slice) -> Run:
    depth = min(config.mine.dense.depth, deepest)
    return search.dense(config, *_vectors(config, directory), depth, directory / "index", rows)

  known = {"bm25": by_bm25, DENSE: by_retriever}
  names = _names(config.mine, _is_first(layout, directory))
  return {name: known[name] for name in names if name in known}


def _prepare_search(
  config: ConfigDict, layout: Layout, data: PreparedData, directory: pathlib.Path, places: dict[str, pathlib.Path]
) -> None:
  """Builds the indexes of what is still to be searched. BM25 finds the same for every pool: mine0's run is linked."""
  if "bm25" in places and not places["bm25"].exists():
    before = layout.mine(0) / "runs" / "bm25"
    if common.mines_first(config) and before.exists():
      files.link_tree(before, places["bm25"])
    else:
      common.bm25(layout, data)
  if DENSE in places and not places[DENSE].exists():
    search.build(config, Embeddings(directory / "vectors" / "corpus"), directory / "index")


def encode_both(
  config: ConfigDict, layout: Layout, data: PreparedData, directory: pathlib.Path, retriever: Retriever,
  together: bool = True,
) -> None:  # fmt: skip
  """Makes vectors of the training queries and of the corpus; `together`: all processes make them."""
  split = config.data.train_split
  ids = {split: data.splits[split].ids, "corpus": data.ids}
  for part, kind in ((split, "query"), ("corpus", "passage")):
    encode.encode(config, layout, directory / "vectors" / part, part, retriever, kind, ids[part], together)


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
  """The margins on each source that has them."""
  rules = []
  for name in sources:
    options = _options(config.mine, name)
    if options.relative_margin or options.absolute_margin:
      rules.append(MarginRule(name, options.relative_margin or None, options.absolute_margin or None))
  return rules


def texts(data: PreparedData) -> Callable[[np.ndarray], Iterable[tuple[str, str]]]:
  """What reads (title, text) of passage rows."""

  def read(rows: np.ndarray) -> list[tuple[str, str]]:
    return [(passage.title, passage.text) for passage in data.passages.take(rows)]

  return read
