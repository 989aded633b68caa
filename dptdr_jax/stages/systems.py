"""What a run evaluates: BM25, the untuned backbone, saved retrievers from elsewhere, and those it has trained."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from dptdr_jax import retriever
from dptdr_jax.core import files, remote
from dptdr_jax.core.errors import InputError
from dptdr_jax.retriever import Retriever
from dptdr_jax.stages import common
from dptdr_jax.stages.layout import Layout

BM25 = "bm25"
RERANKED = "reranked"  # the cross-encoder over the last round's retriever
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_OWN = re.compile(rf"{BM25}|{RERANKED}|(backbone|pretrain)(-.*)?|train\d+")  # names that a run has for its own


def check(config: ConfigDict) -> None:
  """Raises InputError for what can be known to fail before any work is done."""
  if config.rounds < 0:
    raise InputError("rounds counts trainings", value=config.rounds, fix="0: none, for what is trained already")
  if config.cross.enabled and not config.rounds:
    raise InputError("the cross-encoder ranks again what the last round's retriever finds, and rounds is 0",
                     fix="Set cross.enabled to False")  # fmt: skip
  if not names(config):
    raise InputError("nothing to evaluate: rounds is 0, and there is no baseline",
                     fix="Name evaluate.retrievers")  # fmt: skip
  for pooling in config.evaluate.other_poolings:
    if pooling not in common.POOLINGS or pooling == config.vector.pooling:
      raise InputError("evaluate.other_poolings holds first or mean, not vector.pooling's own", value=pooling)
  if saved(config) and not common.has_queries(config):
    raise InputError("evaluate.retrievers, and this data has no queries", value=config.data.source)
  for directory in saved(config).values():
    retriever.check_saved(directory)


def untuned(config: ConfigDict) -> dict[str, tuple[str, str]]:
  """Untuned baselines by their names in results.json: (the 'backbone' or what 'pretrain' made of it, the pooling)."""
  if not config.evaluate.backbone:
    return {}
  found = {}
  for origin in ("backbone", *(["pretrain"] if config.pretrain.enabled else [])):
    found[origin] = origin, config.vector.pooling
    found |= {f"{origin}-{pooling}": (origin, pooling) for pooling in config.evaluate.other_poolings}
  return found


def saved(config: ConfigDict) -> dict[str, str]:
  """Saved retrievers from elsewhere, by their names in results.json: their directories.

  Raises:
    InputError: an entry that is not NAME=DIR, or a name that is taken.
  """
  found: dict[str, str] = {}
  for entry in config.evaluate.retrievers:
    name, _, directory = entry.partition("=")
    if not directory or not _NAME.fullmatch(name):
      raise InputError("evaluate.retrievers holds NAME=DIR, the name of letters, digits, '_' and '-'", value=entry)
    if name in found or is_own(name):
      raise InputError("evaluate.retrievers has a name that is taken", value=name, fix="Give it another one")
    found[name] = directory
  return found


def is_own(name: str) -> bool:
  """Whether a name in results.json is not that of a saved retriever from elsewhere."""
  return bool(_OWN.fullmatch(name))


def trained(config: ConfigDict) -> list[str]:
  """The retriever of each round of training."""
  return [f"train{number}" for number in range(1, config.rounds + 1)]


def dense(config: ConfigDict) -> list[str]:
  """The dense ones, in the order of results.json."""
  return [*untuned(config), *saved(config), *trained(config)]


def names(config: ConfigDict) -> list[str]:
  """All of them, in the order of results.json."""
  before, after = config.evaluate.bm25, config.cross.enabled
  return [*([BM25] if before else []), *dense(config), *([RERANKED] if after else [])]


def shown(config: ConfigDict) -> str:
  """The one whose passages the report shows."""
  return [*([BM25] if config.evaluate.bm25 else []), *dense(config)][-1]


def retrievers(config: ConfigDict, layout: Layout) -> Iterator[tuple[str, Retriever]]:
  """Every dense one; on the backbone that they share, unless they have weights of their own, which are read when it is
  their turn."""
  shared, before, last = common.load_backbone(config, layout), None, None
  for system, (origin, pooling) in untuned(config).items():
    backbone, vector = shared, {**config.vector, "pooling": pooling}
    if origin == "backbone" and config.pretrain.enabled:
      backbone = before = before or common.base_backbone(config, layout)
    yield system, Retriever.untuned(backbone, **vector, **config.text)
  for system, directory in saved(config).items():
    known = {one.hash: one for one in (last, before, shared) if one is not None}
    last = known.get(retriever.saved_backbone(directory))
    found = common.load_retriever(config, directory, last)
    last = found.backbone
    yield system, found
    del found
  for number, system in enumerate(trained(config), 1):
    yield system, common.trained(config, layout, number, shared)


def outside_files(config: ConfigDict) -> dict[str, list[files.Path]]:
  """The files of the saved ones, by name."""
  return {name: retriever.saved_files(directory) for name, directory in saved(config).items()}


def homes(config: ConfigDict) -> dict[str, pathlib.Path]:
  """The directories of the saved ones: their files are named from there, as they may stand elsewhere next time."""
  return {f"retrievers/{name}": remote.staged(directory) for name, directory in saved(config).items()}
