"""Settings: declared once, checked by their declarations, and named in every error."""

import importlib
import pathlib

import pytest
from ml_collections import ConfigDict
from support import tiny

from dptdr_jax.core.errors import InputError
from dptdr_jax.pipeline import reference
from dptdr_jax.settings import Settings, config_dict, declared

CONFIGS = sorted(path.stem for path in pathlib.Path(tiny.ROOT, "configs").glob("*.py") if path.stem != "__init__")


def test_every_setting_says_what_it_is_for():
  names = [name for name, _ in declared()]
  assert len(names) == len(set(names)) <= 140
  for name, info in declared():
    assert info.description and "\n" not in info.description, name
    assert {"neutral", "unit", "source"} == set(info.json_schema_extra), name


def test_config_holds_all_defaults_and_gives_them_back():
  config = config_dict()
  assert Settings.of(config) == Settings()
  config.train.steps, config.mine.runs = 3, ["a", "b"]
  assert Settings.of(config).train.steps == 3 and Settings.of(config).mine.runs == ("a", "b")


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_settings(name):
  module = importlib.import_module(f"configs.{name}")
  Settings.of(module.get_config())
  assert "python -m dptdr_jax.main --config=" in module.__doc__ or name == "base"


def test_every_setting_takes_another_value():
  for name, info in declared():
    value = reference.other_value(name, info, Settings().get(name))
    assert Settings().replace(**{name: value}).get(name) == value != Settings().get(name), name


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("seed", -1, "seed must be at least 0: -1"),
    ("seed", "one", r"seed should be a valid integer.*: 'one'"),
    ("seed", 1.5, r"seed should be a valid integer.*: 1.5"),
    ("train.warmup", float("nan"), "train.warmup should be a finite number: nan"),
    ("vector.temperature", 0.0, "vector.temperature must be above 0: 0.0"),
    ("prompt.dropout", 1.0, "prompt.dropout must be below 1: 1.0"),
    ("mine.negative_below", 1.5, "mine.negative_below must be at most 1: 1.5"),
    ("backbone.dropout", 1.5, "backbone.dropout must be -1, or at least 0 and below 1: 1.5"),
    ("data.format", "trec", "unknown data.format: 'trec'. Use beir, msmarco, nq or text"),
    ("compute_dtype", "float16", "unknown compute_dtype: 'float16'. Use auto, float32 or bfloat16"),
    ("mine.sources", ("dense", "sparse"), "unknown mine.sources.*: 'sparse'. Use bm25, dense or runs"),
    ("mine.runs", "a.trec", "mine.runs should be a valid tuple: 'a.trec'"),
    ("train.stepz", 3, "no such setting: 'train.stepz'. docs/configuration.md lists all"),
    ("trian.steps", 3, "no such setting: 'trian.steps'"),
  ],
)
def test_bad_value_is_named_with_what_it_may_be(name, value, message):
  with pytest.raises(InputError, match=f"^{message}"):
    Settings().replace(**{name: value})
  if "no such" not in message:
    config = config_dict().to_dict()
    *sections, last = name.split(".")
    (config[sections[0]] if sections else config)[last] = value
    with pytest.raises(InputError, match=f"^{message}"):
      Settings.of(ConfigDict(config))


def test_field_of_an_older_config_is_named():
  config = config_dict()
  with config.unlocked():
    config.data.source = "beir"
  with pytest.raises(InputError, match=r"^no such setting: 'data.source'"):
    Settings.of(config)
