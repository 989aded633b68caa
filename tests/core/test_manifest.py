"""What a stage is told to have changed."""

from dptdr_jax.core.manifest import differences


def test_differences_are_those_of_what_is_stored():
  old = {"config": {"splits": ["dev"], "depth": 10, "gone": 1}, "files": {"a": "x"}}
  new = {"config": {"splits": ("dev",), "depth": 20, "came": None}, "files": {"a": "x"}}
  assert differences(old, new) == ["config.depth: 10 → 20", "config.gone: 1 → None"]
