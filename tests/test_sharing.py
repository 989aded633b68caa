"""What is shared out, by itself: weights over devices, a search over processes."""

from __future__ import annotations

import numpy as np
import pytest
from support import tiny

from dptdr_jax import Backbone, Retriever
from dptdr_jax.core import preemption
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


def test_processes_search_in_parts(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  whole = Run.ranked(rng.permuted(np.tile(np.arange(9), (7, 1)), axis=1), rng.random((7, 9)), 4)
  asked = []

  def find(rows):
    asked.append((rows.start, rows.stop))
    return Run(whole.rows[rows], whole.scores[rows])

  def as_process(index, processes, name="dense", part=4):
    monkeypatch.setattr(hosts, "process_index", lambda: index)
    monkeypatch.setattr(hosts, "process_count", lambda: processes)
    monkeypatch.setattr(hosts, "is_main", lambda: index == 0)
    monkeypatch.setattr(hosts, "barrier", lambda name: None)
    search.shared(tmp_path / "runs" / name, 7, find, part)

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

  asked.clear()
  monkeypatch.setattr(preemption, "asked", lambda: len(asked) == 2)
  with pytest.raises(preemption.Preempted, match="part 2 of 4"):  # told to stop after two of the four
    as_process(0, 1, "bm25", part=2)
  monkeypatch.undo()
  for index in (1, 0):  # two go on from there, each with one of the others
    as_process(index, 2, "bm25", part=2)
  assert asked == [(0, 1), (1, 3), (5, 7), (3, 5)]
  np.testing.assert_array_equal(Run.open(tmp_path / "runs/bm25").rows, whole.rows)
