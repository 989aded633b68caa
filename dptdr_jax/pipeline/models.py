"""Backbones, retrievers and cross-encoders as inputs of artefacts, and how they are loaded."""

from __future__ import annotations

import pathlib
from typing import Any, Literal

from dptdr_jax import retriever as retrievers
from dptdr_jax.backbone import Backbone
from dptdr_jax.core.store import Inputs, Making, Ref, neutral
from dptdr_jax.models import convert
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.pipeline.outside import Files
from dptdr_jax.retriever import Retriever
from dptdr_jax.settings import Vector

_last: dict[tuple, Backbone] = {}  # the backbone that was loaded last: most artefacts of a run share it


class BackboneInput(Inputs):
  """A backbone: files in Hugging Face layout, or what `scratch` or `pretrain` made."""

  files: Files | None = None
  made: Ref | None = None
  path: str = neutral("")  # as the settings name it

  def directory(self, making: Making) -> pathlib.Path:
    """Where its files lie."""
    if self.made is None:
      return pathlib.Path(self.files.directory)
    return making.path(self.made) / ("backbone" if self.made.kind == "pretrain" else "")

  def encoder(self, making: Making) -> EncoderConfig:
    """Its architecture."""
    return EncoderConfig.from_file(self.directory(making) / "config.json")


class Compute(Inputs):
  """How a backbone computes."""

  dtype: str  # resolved: 'float32' or 'bfloat16'
  fsdp: int = neutral(1)


class RetrieverInput(Inputs):
  """A retriever: the bare backbone with a pooling, what training chose, or a saved one from elsewhere."""

  kind: Literal["untuned", "trained", "saved"]
  backbone: BackboneInput | None = None  # None: the one that a saved retriever names and hashes, or of its own
  vector: Vector | None = None  # untuned
  trained: Ref | None = None
  saved: Files | None = None

  def load(self, making: Making, compute: Compute, limit: int) -> Retriever:
    """Loads it; `limit` is the longest text of one that is untuned."""
    if self.kind == "untuned":
      backbone = load_backbone(self.backbone, making, compute)
      lengths = {"query_length": limit, "passage_length": limit}
      return Retriever.untuned(backbone, **self.vector.model_dump(), **lengths)
    options = {"compute_dtype": compute.dtype, "fsdp": compute.fsdp}
    if self.kind == "saved":
      named = retrievers.saved_backbone(self.saved.directory)
      whole = named is not None and named.get("hash_format", 1) > 1  # format 1 hashed no configuration
      shared = next((one for one in _last.values() if whole and one.is_named(named)), None)
      return Retriever.load(self.saved.directory, shared, **options)
    backbone = load_backbone(self.backbone, making, compute) if self.backbone else None
    return Retriever.load(making.path(self.trained) / "retriever", backbone, **options)


def load_backbone(source: BackboneInput, making: Making, compute: Compute) -> Backbone:
  """A backbone on the devices; the one that was loaded last is kept."""
  directory = source.directory(making)
  name = source.path if source.made is None else str(directory.resolve())
  place = str(directory), source.model_dump_json(), compute.dtype, compute.fsdp
  if place not in _last:
    _last.clear()
    tensors = convert.load_backbone_tensors(directory)
    _last[place] = Backbone.from_tensors(name, directory, tensors, compute.dtype, compute.fsdp)
  return _last[place]


def exact_weights(source: BackboneInput, making: Making) -> Any:
  """Weights on the host and in float32: what training of all of them starts from."""
  directory = source.directory(making)
  tensors = convert.load_backbone_tensors(directory)
  return Backbone.from_tensors(str(directory), directory, tensors, "float32", on_host=True).params


def forget() -> None:
  """Frees the backbone that was loaded last: its place is wanted for another one."""
  _last.clear()
