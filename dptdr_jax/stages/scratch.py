"""A backbone from nothing, for a language or a domain without one: a tokenizer of the corpus, a random RoBERTa."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from dptdr_jax import backbone as backbones
from dptdr_jax.core import files, preemption, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.tokenizer import Tokenizer
from dptdr_jax.data.vocabulary import train_byte_level_bpe
from dptdr_jax.models import convert
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.stages import corpora
from dptdr_jax.stages.layout import Layout

_log = logging.getLogger(__name__)


def is_wanted(config: ConfigDict) -> bool:
  """Whether the run starts from nothing.

  Raises:
    InputError: an unknown pretrain.tokenizer.
  """
  if config.pretrain.tokenizer not in ("backbone", "train"):
    raise InputError("unknown pretrain.tokenizer", value=config.pretrain.tokenizer, fix="Use backbone or train")
  return config.pretrain.enabled and config.pretrain.tokenizer == "train"


def shape(config: ConfigDict, vocabulary: int) -> EncoderConfig:
  """The RoBERTa that the config describes."""
  wanted: dict[str, Any] = config.pretrain.shape.to_dict()
  return EncoderConfig("roberta", vocabulary, type_vocab_size=1, pad_id=1, layer_norm_eps=1e-5, **wanted)


def make(config: ConfigDict, layout: Layout) -> None:
  """Writes DIR/prepare/backbone in Hugging Face layout, unless it is there."""
  if (layout.scratch / "config.json").is_file():
    return
  with files.atomic_directory(layout.scratch) as partial:
    opened = corpora.open_corpora(config, layout)
    texts = itertools.chain.from_iterable(corpus.texts() for corpus in opened)
    size = train_byte_level_bpe(
      _until_stopped(progress.track(texts, "train tokenizer", unit="text")), config.pretrain.vocabulary, partial
    )
    _log.info("tokenizer of %d ids trained", size)
    encoder = shape(config, size)
    backbones.export(partial, convert.init_params(jax.random.key(config.seed), encoder), encoder, Tokenizer(partial))


def _until_stopped(texts: Iterator[str]) -> Iterator[str]:
  """The texts, as long as no SIGTERM comes; what the tokenizers library then makes of them cannot be broken off."""
  for text in texts:
    yield text
    preemption.check("the tokenizer will be trained again")
