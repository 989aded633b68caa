"""mine: hard negatives for a round of training, from several retrievers in one pool, cleaned of false negatives.

Before the first round there is no retriever yet, but there is BM25: mine0 takes that, and runs from elsewhere. mineN
adds what the retriever of round N finds, and further ones.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable, Iterable

import numpy as np
from ml_collections import ConfigDict

from dptdr_jax.core import files, preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.retrieval import pool_checks
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.retrieval.denoise import CrossEncoderRule, MarginRule, Rule, denoise
from dptdr_jax.retrieval.merge import pool_from_runs
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.texts import TextRule
from dptdr_jax.runtime import hosts
from dptdr_jax.stages import common, cross, negatives_shown, sources
from dptdr_jax.stages.layout import Layout
from dptdr_jax.stages.sources import Sources

_log = logging.getLogger(__name__)


def check(config: ConfigDict) -> None:
  """Raises InputError for what can be known to fail before any work is done."""
  mine = config.mine
  if common.draws_from_bm25(config) and not mine.bm25.depth:
    raise InputError("train.negatives is bm25, and mine.bm25.depth is 0")
  if config.cross.enabled and config.cross.negatives == "bm25" and not mine.bm25.depth:
    raise InputError("cross.negatives is bm25, and mine.bm25.depth is 0")
  sources.check(config)
  if sources.mines_with_retriever(config) and config.train.passages == 1 and not mine.pseudo_positives:
    raise InputError("negatives are mined, and train.passages is 1: a query's positive and none of them",
                     fix="Set train.passages to 2 or more")  # fmt: skip
  if mine.width < 0:
    raise InputError("mine.width is not negative", value=mine.width, fix="0: whatever the sources give")
  if mine.near_duplicate and not (mine.same_text and 0 < mine.near_duplicate <= 1):
    raise InputError("mine.near_duplicate is a share, and wants mine.same_text", value=mine.near_duplicate)
  if not 0 <= mine.negative_below <= mine.positive_above <= 1:
    raise InputError("mine.negative_below and mine.positive_above are probabilities in this order",
                     value=(mine.negative_below, mine.positive_above))  # fmt: skip
  if config.train.refresh_every and not (mine.dense.depth and "dense" in mine.sources):
    raise InputError("train.refresh_every mines with the retriever as it trains", fix="Set mine.dense.depth above 0")
  _check_cross_encoder(config)
  _check_simans(config)
  _margins(config, ("bm25", "dense", "outside"))


def _check_cross_encoder(config: ConfigDict) -> None:
  mine = config.mine
  if mine.cross_encoder and not config.cross.enabled:
    raise InputError("mine.cross_encoder wants a cross-encoder", fix="Set cross.enabled to True")
  if mine.pseudo_positives and not mine.cross_encoder:
    raise InputError("mine.pseudo_positives are the cross-encoder's", fix="Set mine.cross_encoder to True")
  if mine.cross_encoder and not sources.mines_with_retriever(config):
    raise InputError("mine.cross_encoder denoises what is mined after round 1 or while it trains, and nothing is",
                     fix="Set rounds to 2, or train.refresh_every above 0")  # fmt: skip
  if mine.pseudo_positives and config.train.positive == "first":
    raise InputError("mine.pseudo_positives are never the first positive", fix="Set train.positive to rotate")


def _check_simans(config: ConfigDict) -> None:
  train, known = config.train, sources.scored(config)
  if train.sampling == "simans" and train.simans_source not in known:
    raise InputError("unknown train.simans_source", value=train.simans_source, fix=f"Use {', '.join(known)}")


def outside_files(config: ConfigDict) -> list[files.Path]:
  """Files from outside that a pool depends on."""
  return list(config.mine.runs)


def run(config: ConfigDict, workdir: files.Path, number: int = 0) -> None:
  """Writes DIR/mineN/pool: negatives for each training query, best first, with what each source says of them."""
  layout = Layout.of(workdir)
  data, name = PreparedData(layout.prepared), config.data.train_split
  if not any(len(data.splits[name].positives(row)) for row in range(len(data.splits[name]))):
    raise InputError("no training query left: none has a positive", value=name, fix="Name another data.train_split")
  mine(Sources(config, layout, data, layout.mine(number), number))


def mine(asked: Sources) -> None:
  """Finds, merges and denoises: runs/, merged/, pool/ and mining.json, and what `Sources` keeps, in the pool's
  directory. What is there is not made again.

  Of processes that work together the first merges and denoises, and all score for the cross-encoder, which is asked of
  what the cheap rules leave; in mine0 there is none.
  """
  asked.find()
  directory, options = asked.directory, asked.config.mine
  alone = not asked.together or hosts.is_main()
  crossed = options.cross_encoder and asked.number > 0
  cleaned = directory / ("cleaned" if crossed else "pool")
  if alone:
    _clean(asked, cleaned)
  if crossed:
    if asked.together:
      hosts.barrier("what the cross-encoder is asked of")
    place = directory / "scores"
    scores = cross.score_pool(asked.config, asked.layout, Pool.open(cleaned), place, asked.frozen, asked.together)
    if alone:
      rule = CrossEncoderRule(scores, options.negative_below, options.positive_above)
      denoise(directory / "pool", cleaned, [rule])
  if alone:
    _describe(asked)


def _clean(asked: Sources, cleaned: pathlib.Path) -> None:
  """Merges what was found, and applies the cheap rules."""
  config, data, merged = asked.config, asked.data, asked.directory / "merged"
  positives = common.barred(data.splits[config.data.train_split])
  found = asked.taken(positives)
  if not (merged / "manifest.json").exists():
    pool_from_runs(merged, found, positives, width=config.mine.width or None)
  preemption.check(f"mining stands before denoising, in {asked.directory}")
  if cleaned.name == "pool" or not (cleaned / "manifest.json").exists():
    denoise(cleaned, merged, _rules(config, data, positives, list(found)))


def _describe(asked: Sources) -> None:
  """Says what is suspicious, and keeps what the report shows."""
  pool = Pool.open(asked.directory / "pool")
  warnings = pool_checks.suspicions(pool)
  for warning in warnings:
    _log.warning("%s: %s", asked.directory, warning)
  files.write_json(asked.directory / "mining.json", negatives_shown.summary(asked.config, asked.data, pool, warnings))


def _rules(config: ConfigDict, data: PreparedData, positives: Qrels, names: list[str]) -> list[Rule]:
  mine, rules = config.mine, []
  if mine.same_text:
    rules.append(TextRule(positives, texts(data), near_duplicate=mine.near_duplicate or None))
  return [*rules, *_margins(config, names)]


def _margins(config: ConfigDict, names: Iterable[str]) -> list[MarginRule]:
  """The margins on each source that has them; what a further retriever says of a positive is no measure."""
  rules = []
  for name in names:
    if name in config.mine.retrievers:
      continue
    options = sources.options(config, name)
    if options.relative_margin or options.absolute_margin:
      rules.append(MarginRule(name, options.relative_margin or None, options.absolute_margin or None))
  return rules


def texts(data: PreparedData) -> Callable[[np.ndarray], Iterable[tuple[str, str]]]:
  """What reads (title, text) of passage rows."""

  def read(rows: np.ndarray) -> list[tuple[str, str]]:
    return [(passage.title, passage.text) for passage in data.passages.take(rows)]

  return read
