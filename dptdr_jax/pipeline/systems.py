"""What a run evaluates: BM25, the untuned backbone, saved retrievers, those it has trained, fused and reranked runs."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from dptdr_jax.core.errors import InputError
from dptdr_jax.settings import Settings

BM25, FUSED, FUSED_BACKBONE, RERANKED = "bm25", "fused", "fused-backbone", "reranked"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_ORIGINS = {"backbone": "untuned backbone", "pretrain": "pretrained backbone"}
_OWN = re.compile(rf"{BM25}|{RERANKED}|fused.*|(backbone|pretrain)(-.*)?|train\d+")  # names that a run may give


@dataclasses.dataclass(frozen=True)
class System:
  """One of them."""

  name: str  # in results.json
  label: str  # what people read
  kind: Literal["bm25", "untuned", "saved", "trained", "fused", "reranked"]
  pooling: str = ""  # of an untuned one
  pretrained: bool = False  # an untuned one after pretraining
  number: int = 0  # the round of a trained one, or of what is fused with BM25; 0: the untuned backbone
  directory: str = ""  # of a saved one

  @property
  def is_dense(self) -> bool:
    """Whether it searches by vectors."""
    return self.kind in ("untuned", "saved", "trained")


def systems(settings: Settings) -> list[System]:
  """All that a run evaluates, in the order of results.json."""
  listed = [System(BM25, "BM25", "bm25")] if BM25 in settings.evaluate.baselines else []
  listed += [*_untuned(settings), *_saved(settings), *_trained(settings), *_fused(settings)]
  if settings.cross.enabled:
    listed.append(System(RERANKED, "reranked by the cross-encoder", "reranked", number=settings.rounds))
  return listed


def shown(settings: Settings) -> System:
  """The one whose passages the report shows."""
  return [system for system in systems(settings) if system.kind not in ("fused", "reranked")][-1]


def is_own(name: str) -> bool:
  """Whether a name in results.json is one that a run gives, not that of a saved retriever."""
  return bool(_OWN.fullmatch(name))


def _untuned(settings: Settings) -> list[System]:
  if "backbone" not in settings.evaluate.baselines:
    return []
  listed, several = [], bool(settings.evaluate.other_poolings)
  for origin in ("backbone", *(["pretrain"] if settings.pretrain.enabled else [])):
    for pooling in (settings.vector.pooling, *settings.evaluate.other_poolings):
      name = origin if pooling == settings.vector.pooling else f"{origin}-{pooling}"
      label = _ORIGINS[origin] + (f", {pooling} pooling" if several else "")
      listed.append(System(name, label, "untuned", pooling=pooling, pretrained=origin == "pretrain"))
  return listed


def _saved(settings: Settings) -> list[System]:
  listed: dict[str, System] = {}
  for entry in settings.evaluate.retrievers:
    name, _, directory = entry.partition("=")
    if not directory or not _NAME.fullmatch(name):
      raise InputError("evaluate.retrievers holds NAME=DIR, the name of letters, digits, '_' and '-'", value=entry)
    if name in listed or is_own(name):
      raise InputError("evaluate.retrievers has a name that is taken", value=name, fix="Give it another one")
    listed[name] = System(name, name, "saved", directory=directory)
  return list(listed.values())


def _fused(settings: Settings) -> list[System]:
  """BM25 with the untuned backbone, and with the last retriever."""
  if BM25 not in settings.evaluate.baselines:
    return []
  listed = []
  if "backbone" in settings.evaluate.baselines:
    listed.append(System(FUSED_BACKBONE, "BM25 fused with the backbone", "fused"))
  if settings.rounds:
    listed.append(System(FUSED, "BM25 fused with the retriever", "fused", number=settings.rounds))
  return listed


def dense_part(settings: Settings, fused: System) -> System:
  """The dense system that BM25 is fused with."""
  if fused.number:
    return next(system for system in _trained(settings) if system.number == fused.number)
  return next(system for system in _untuned(settings) if not system.pretrained)


def _trained(settings: Settings) -> list[System]:
  several = settings.rounds > 1
  return [
    System(f"train{number}", f"trained retriever{f', round {number}' if several else ''}", "trained", number=number)
    for number in range(1, settings.rounds + 1)
  ]
