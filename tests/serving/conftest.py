"""A tiny backbone and retrievers of every kind on it."""

import jax
import pytest
from support import postgres, server

from dptdr_jax import Retriever
from dptdr_jax.models import prompts
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.retriever import VectorSettings

DEEP = PromptSpec("deep", 4, position_shift=4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def backbone(directory):
  """A tiny backbone, at DIRECTORY/backbone beside what `server.models` writes."""
  return server.models(directory)


@pytest.fixture(scope="session")
def database():
  """A PostgreSQL server for all tests of a process."""
  with postgres.started() as started:
    yield started


@pytest.fixture(scope="module")
def tune(backbone):
  """Makes a retriever with a random prompt large enough to change vectors."""

  def make(seed, spec=DEEP, untied=False, **settings):
    def prompt(seed):
      return jax.tree.map(lambda x: 30 * x, prompts.init_prompt(jax.random.key(seed), spec, backbone.config))

    query = prompt(seed)
    settings = VectorSettings(**{"query_length": 16, "passage_length": 32} | settings)
    return Retriever(backbone, spec, {"query": query, "passage": prompt(100 + seed) if untied else query}, settings)

  return make


@pytest.fixture(scope="module")
def retrievers(backbone, tune):
  mlp = PromptSpec("deep", 3, "mlp", 5)
  return {
    "tied": tune(1),
    "untied": tune(2, untied=True, pooling="mean", normalize=True),
    "mlp": tune(3, mlp, query_template="query: {text}", passage_template="passage: {title} {text}"),
    "long": tune(4, PromptSpec("deep", 8), pooling="mean"),
    "bare": Retriever.untuned(backbone, query_length=12, passage_length=32, normalize=True),
  }
