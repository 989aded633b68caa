"""What is shared out, by itself: weights over devices, a search over processes."""

from __future__ import annotations

import numpy as np
from support import tiny

from dptdr_jax import Backbone, Retriever
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.runtime import hosts
from dptdr_jax.stages import search


def test_a_backbone_over_devices_gives_the_same_vectors(tmp_path):
  path = tiny.backbone(tmp_path / "backbone")
  whole, split = Backbone.load(path), Backbone.load(path, fsdp=4)
  assert split.hash == whole.hash
  kernel = split.params["layers"]["intermediate"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
  texts = ["river water", "the sun is a star", "bread"]
  vectors = [Retriever.untuned(backbone, passage_length=32).encode_passages(texts) for backbone in (whole, split)]
  np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-5)
  assert Backbone.load(path, fsdp=12).mesh.shape["fsdp"] == 4, "of all processes' devices, of which 8 are here"


def test_processes_search_for_their_shares(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  whole = Run.ranked(rng.permuted(np.tile(np.arange(9), (7, 1)), axis=1), rng.random((7, 9)), 4)
  asked = []

  def find(rows):
    asked.append((rows.start, rows.stop))
    return Run(whole.rows[rows], whole.scores[rows])

  def as_process(index, processes):
    monkeypatch.setattr(hosts, "process_index", lambda: index)
    monkeypatch.setattr(hosts, "process_count", lambda: processes)
    monkeypatch.setattr(hosts, "is_main", lambda: index == 0)
    monkeypatch.setattr(hosts, "barrier", lambda name: None)
    search.shared(tmp_path / "runs/dense", 7, find)

  for index in (2, 1, 0):  # the first joins what the others have found
    as_process(index, 3)
  assert sorted(asked) == [(0, 2), (2, 4), (4, 7)]
  found = Run.open(tmp_path / "runs/dense")
  np.testing.assert_array_equal(found.rows, whole.rows)
  np.testing.assert_array_equal(found.scores, whole.scores)
  assert [path.name for path in (tmp_path / "runs").iterdir()] == ["dense"]
  as_process(1, 2)
  as_process(0, 2)
  assert len(asked) == 3, "what is there is not searched again"
