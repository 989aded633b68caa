"""Tasks: poisoned retrievers are refused in one line, the manifest is what a restart reads."""

import json
import pickle
import struct

import pytest
from support import server, tiny

from dptdr_jax.backbone import Backbone
from dptdr_jax.core.errors import InputError
from dptdr_jax.serving import catalog
from dptdr_jax.serving.catalog import DirectoryCatalog


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  directory = tmp_path_factory.mktemp("models")
  backbone = server.models(directory)
  other = Backbone.load(tiny.backbone(directory / "backbone2", seed=5))
  server.retriever(other, 0).save(directory / "other")
  return directory, backbone


def put(state, backbone, name, directory, cross=None):
  opened = DirectoryCatalog(state, backbone)
  loaded = opened.prepare(name, catalog.files_of(directory, cross), False)
  opened.put(loaded.entry)
  return loaded


@pytest.mark.parametrize("name", ["", "A", "a b", "../a", "a/b", "a" * 65, "ä", "a-query", "b-passage", "a\n", "."])
def test_other_names_are_refused(name):
  with pytest.raises(InputError, match="not a name of a task"):
    catalog.check_name(name)


def test_manifest_is_read_again_and_a_replaced_task_keeps_its_documents(models, tmp_path):
  directory, backbone = models
  first = put(tmp_path, backbone, "one", directory / "a")
  put(tmp_path, backbone, "two", directory / "a", directory / "cross")
  again = DirectoryCatalog(tmp_path, backbone)
  assert [entry.name for entry in again] == ["one", "two"] and again.get("one") == first.entry
  assert again.load(first.entry).retriever.hash == first.retriever.hash
  assert again.load(again.get("two")).cross_encoder is not None
  replaced = put(tmp_path, backbone, "one", directory / "b")
  assert replaced.entry.collection == first.entry.collection and replaced.entry.content != first.entry.content
  opened = DirectoryCatalog(tmp_path, backbone)
  opened.sweep()
  assert len(list((tmp_path / "retrievers").iterdir())) == 2
  opened.remove("one")
  opened.sweep()
  assert [entry.name for entry in DirectoryCatalog(tmp_path, backbone)] == ["two"]
  assert len(list((tmp_path / "retrievers").iterdir())) == 1


def copied(source, target, **changes):
  """A retriever's directory with other fields in its description."""
  target.mkdir()
  about = json.loads((source / "retriever.json").read_text()) | changes
  (target / "retriever.json").write_text(json.dumps(about))
  (target / "prompts.safetensors").write_bytes((source / "prompts.safetensors").read_bytes())
  return target


def header(length: int, rest: bytes = b"{}") -> bytes:
  return struct.pack("<Q", length) + rest


@pytest.mark.parametrize(
  "content, message",
  [
    (pickle.dumps({"a": 1}), "not a safetensors file"),
    (b"", "not a safetensors file"),
    (header(1 << 60), "a header of 1152921504606846976 bytes"),
    (header(1 << 30, b"{" + b" " * 100), "a header of"),
    (header(2, b"{}" + b"x" * 20), "not a complete safetensors file"),
    (header(60, b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,99999]}}  '), "not a complete safetensors file"),
  ],
)
def test_file_that_is_no_safetensors_is_refused(models, tmp_path, content, message):
  directory, backbone = models
  poisoned = copied(directory / "a", tmp_path / "poisoned")
  (poisoned / "prompts.safetensors").write_bytes(content)
  with pytest.raises(InputError, match=message) as caught:
    put(tmp_path / "state", backbone, "one", poisoned)
  assert "\n" not in str(caught.value)
  assert not list((tmp_path / "state").glob("retrievers/*")) and not (tmp_path / "state" / "tasks.json").exists()


def test_pickle_beside_a_retriever_is_refused(models, tmp_path):
  poisoned = copied(models[0] / "a", tmp_path / "poisoned")
  (poisoned / "pytorch_model.bin").write_bytes(pickle.dumps({}))
  with pytest.raises(InputError, match="may run code"):
    catalog.files_of(poisoned)


def test_another_backbone_is_refused_and_none_is_loaded_that_a_file_names(models, tmp_path):
  directory, backbone = models
  with pytest.raises(InputError, match="trained on another backbone"):
    put(tmp_path / "state", backbone, "one", directory / "other")
  named = json.loads((directory / "a" / "retriever.json").read_text())["backbone"]
  second = copied(directory / "a", tmp_path / "second", passage_backbone={**named, "path": "/etc"})
  with pytest.raises(InputError, match="two backbones"):
    put(tmp_path / "state", backbone, "one", second)
  for number, wrong in enumerate((None, [], {"path": "x"}, {"hash": 3, "path": "x"})):
    with pytest.raises(InputError, match="does not name its backbone"):
      put(tmp_path / "state", backbone, "one", copied(directory / "a", tmp_path / f"wrong{number}", backbone=wrong))


def test_state_of_another_backbone_or_a_damaged_manifest_is_refused(models, tmp_path):
  directory, backbone = models
  put(tmp_path, backbone, "one", directory / "a")
  with pytest.raises(InputError, match="on another backbone"):
    DirectoryCatalog(tmp_path, Backbone.load(directory / "backbone2"))
  path = tmp_path / "tasks.json"
  whole = path.read_text()
  for damaged in (whole[:50], "[]", whole.replace("content", "contents"), whole.replace('"one"', '"../one"')):
    path.write_text(damaged)
    with pytest.raises(InputError):
      DirectoryCatalog(tmp_path, backbone)


def test_only_places_that_the_operator_allows_are_read(models, tmp_path):
  directory, _ = models
  allowed = tmp_path / "allowed"
  allowed.mkdir()
  copied(directory / "a", allowed / "fine")
  assert catalog.files_at(str(allowed / "fine"), [str(allowed)])
  (allowed / "link").symlink_to(directory / "a")
  linked = copied(directory / "a", allowed / "linked")
  (linked / "prompts.safetensors").unlink()
  (linked / "prompts.safetensors").symlink_to(directory / "a" / "prompts.safetensors")
  for place in (directory / "a", allowed / ".." / "a", allowed / "link", linked):
    with pytest.raises(InputError, match="allow"):
      catalog.files_at(str(place), [str(allowed)])
  for url in ("http://good.example.evil/a", "http://good.example/x/../../b", "file:///etc"):
    with pytest.raises(InputError, match="does not allow"):
      catalog.files_at(url, ["http://good.example", str(allowed)])


def test_weight_of_a_fused_ranking_is_read_and_checked(models, tmp_path):
  directory, backbone = models
  source = copied(directory / "a", tmp_path / "weighted")
  (source / "search.json").write_text('{"weight": 0.25}')
  assert put(tmp_path / "state", backbone, "one", source).weight == 0.25
  for wrong in ('{"weight": 2}', '{"weight": true}', "[]", "{"):
    (source / "search.json").write_text(wrong)
    with pytest.raises(InputError):
      put(tmp_path / "state", backbone, "one", source)
