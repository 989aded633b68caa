"""What numbers in the config may be, section by section: a wrong one is told before any work."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from ml_collections import ConfigDict

from dptdr_jax.core.errors import InputError

_TRAINED = ("train", "pretrain", "cross")
_AT_LEAST = {
  3: ("text.query_length", "text.passage_length"),  # a token between the special ones
  1: (
    *(f"{section}.{name}" for section in _TRAINED
      for name in ("log_every", "checkpoint_every", "keep_checkpoints", "loader_workers")),
    "train.queries", "train.passages", "train.evaluate_queries", "train.evaluate_passages",
    "cross.queries", "cross.evaluate_queries", "cross.rerank", "cross.depth", "pretrain.vocabulary",
    "pretrain.max_stored_tokens", "data.max_stored_tokens", "encode.batch_tokens", "encode.shard_passages",
    "index.sample", "index.device_bytes", "evaluate.depth",
  ),
  0: (
    "seed",
    *(f"{section}.{name}" for section in _TRAINED
      for name in ("steps", "epochs", "evaluate_every", "learning_rate", "warmup", "weight_decay", "clip")),
    "train.query_chunk", "train.passage_chunk", "train.refresh_every", "train.sample_first", "train.sample_last",
    "pretrain.tokens", "pretrain.chunk", "pretrain.contrast_weight", "pretrain.mlm_weight", "cross.chunk",
    "cross.sample_last",
    "evaluate.examples",
  ),
  -1: ("prompt.position_shift",),
}  # fmt: skip
_RATES = ("train.backbone_dropout", "pretrain.dropout", "cross.backbone_dropout")  # -1: config.json's own
_ABOVE_0 = ("vector.temperature", "pretrain.temperature", "wait_seconds")


def check(config: ConfigDict) -> None:
  """Raises InputError for a number that is out of its range."""
  for least, names in _AT_LEAST.items():
    for name, value in _values(config, names):
      if not value >= least:  # a NaN is wrong, too
        raise InputError(f"{name} must be at least {least}", value=value)
  for name, value in _values(config, _ABOVE_0):
    if not value > 0:
      raise InputError(f"{name} must be above 0", value=value)
  for name, value in _values(config, _RATES):
    if value != -1 and not 0 <= value < 1:
      raise InputError(f"{name} must be -1, or at least 0 and below 1", value=value)


def _values(config: ConfigDict, names: tuple[str, ...]) -> Iterator[tuple[str, float]]:
  for name in names:
    yield name, functools.reduce(getattr, name.split("."), config)
