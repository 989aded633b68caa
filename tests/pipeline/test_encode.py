"""Vectors and runs: work in shards that is resumed, searches that agree, weights over devices."""

from __future__ import annotations

import numpy as np
import pytest
from support import tiny

from dptdr_jax import Backbone, Retriever
from dptdr_jax.core import preemption
from dptdr_jax.pipeline import encode
from dptdr_jax.retrieval.bm25 import Bm25
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.runs import Run


def test_interrupted_encoding_goes_on_with_the_missing_shards(whole, tmp_path, monkeypatch):
  nodes = [node for node in whole.nodes("vectors") if not node.inputs.split]
  node = next(node for node in nodes if node.inputs.retriever.kind == "trained")
  inputs = node.inputs.model_copy(update={"encoding": encode.Encoding(dtype="float32", shard_passages=20)})
  assert node.kind.ref(inputs) == node.ref, "how much a kill may lose changes no vector"
  making, encoded, encode_store = whole.making(node, tmp_path / "parts"), [], Retriever.encode_store

  def counted(self, store, kind, rows=None, **options):
    encoded.append(len(rows))
    return encode_store(self, store, kind, rows, **options)

  monkeypatch.setattr(Retriever, "encode_store", counted)
  with (
    monkeypatch.context() as stopped,
    pytest.raises(preemption.Preempted, match="begins again with its last unfinished shard"),
  ):
    stopped.setattr(preemption, "asked", lambda: len(encoded) == 2)
    encode.build_vectors(inputs, making)
  encode.build_vectors(inputs, making)
  assert encoded == [20, 20, 20, 20, 4], "only the shard under way is encoded again"
  parts, expected = (Embeddings(path).take(np.arange(64)) for path in (tmp_path / "parts", whole.path(node)))
  np.testing.assert_allclose(parts, expected, atol=1e-6)


def test_interrupted_search_goes_on_with_the_missing_shards(whole, tmp_path, monkeypatch):
  node = next(node for node in whole.nodes("bm25_run") if node.inputs.name == "train")
  monkeypatch.setattr(encode, "_BM25_PART", 10)
  asked, ask = [], Bm25.search
  monkeypatch.setattr(Bm25, "search", lambda self, texts, depth: asked.append(len(texts)) or ask(self, texts, depth))
  making = whole.making(node, tmp_path / "parts")
  with monkeypatch.context() as stopped, pytest.raises(preemption.Preempted, match="will begin again"):
    stopped.setattr(preemption, "asked", lambda: len(asked) == 2)
    encode.build_bm25_run(node.inputs, making)
  encode.build_bm25_run(node.inputs, making)
  assert asked == [10, 10, 10, 10, 2]
  parts, expected = (Run.open(path / "run") for path in (making.directory, whole.path(node)))
  np.testing.assert_array_equal(parts.rows, expected.rows)
  np.testing.assert_array_equal(parts.scores, expected.scores)


def test_searches_of_host_devices_and_index_agree(whole, tmp_path):
  node, found = whole.nodes("dense_run")[0], []
  assert node.inputs.index is not None
  for number, (backend, dtype, index) in enumerate(
    (("faiss", "", None), ("faiss", "", node.inputs.index), ("devices", "float32", None), ("devices", "bfloat16", None))
  ):
    search = encode.Search(backend=backend, parameters="nprobe=4" if index else "", device_dtype=dtype)
    making = whole.making(node, tmp_path / str(number))
    encode.build_dense_run(node.inputs.model_copy(update={"search": search, "index": index, "depth": 10}), making)
    found.append(Run.open(making.directory / "run"))
  for other in found[1:]:
    np.testing.assert_array_equal(other.rows, found[0].rows)
    np.testing.assert_allclose(other.scores, found[0].scores, rtol=1e-5)


def test_backbone_over_devices_gives_the_same_vectors(tmp_path):
  path = tiny.backbone(tmp_path / "backbone")
  alone, split = Backbone.load(path), Backbone.load(path, fsdp=4)
  assert split.hash == alone.hash
  kernel = split.params["layers"]["intermediate"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
  texts = ["merge heap", "prime factor modulo", "socket"]
  vectors = [Retriever.untuned(backbone, passage_length=32).encode_passages(texts) for backbone in (alone, split)]
  np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-5)
  assert Backbone.load(path, fsdp=12).mesh.shape["fsdp"] == 4, "of all processes' devices, of which 8 are here"
