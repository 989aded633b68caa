"""A run whose machine loses its disk, again and again, goes on from its remote copy and ends with the same bytes."""

from __future__ import annotations

import pathlib
import shutil
import signal

import numpy as np
import pytest
from support import forks, lost_disk, tiny

from dptdr_jax import pipeline
from dptdr_jax.backbone import Backbone
from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retriever import Retriever
from dptdr_jax.runtime.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]
MADE = ("results.json", "train1/retriever/prompts.safetensors", "train1/metrics.jsonl",
        "encode/train1/corpus/vectors-00000.npy")  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """A function (workdir, remote, point) that runs the main job once and returns its exit status and what it said."""
  directory = tmp_path_factory.mktemp("lost")
  data, backbone = tiny.beir(directory / "data"), tiny.backbone(directory / "backbone")
  usual = [
    f"--config={ROOT}/configs/beir.py", f"--config.data.dir=file://{data}", f"--config.backbone.path=file://{backbone}",
    "--config.train.steps=8", "--config.train.queries=8", "--config.train.checkpoint_every=2",
    "--config.train.evaluate_every=2", "--config.train.log_every=1", "--config.train.learning_rate=0.05",
    "--config.prompt.length=4", "--config.text.passage_length=32", "--config.encode.shard_passages=16",
    "--config.evaluate.examples=2",
  ]  # fmt: skip

  def run(workdir: pathlib.Path, remote: pathlib.Path, point: str) -> tuple[int, str]:
    said, own = pathlib.Path(f"{workdir}.said"), {"DPTDR_CACHE": f"{workdir}-cache"}  # every machine has its own
    arguments = [*usual, f"--workdir={workdir}", f"--remote=file://{remote}"]
    return forks.run(lost_disk.main, point, arguments, said=said, environment=own), said.read_text()

  return run


def test_every_machine_loses_its_disk_and_the_run_ends_the_same(command, tmp_path):
  status, said = command(tmp_path / "undisturbed", tmp_path / "other-remote", "none")
  assert status == 0, said[-3000:]
  expected = {name: (tmp_path / "undisturbed" / name).read_bytes() for name in MADE}
  remote, lives = tmp_path / "remote", []
  for number, point in enumerate(("checkpoint:4", "sigterm:6", "shard:4", "none", "none")):
    lives.append(command(tmp_path / f"machine{number}", remote, point))
    if point != "none":
      shutil.rmtree(tmp_path / f"machine{number}")
  statuses, said = zip(*lives, strict=True)
  assert statuses == (-signal.SIGKILL, 75, -signal.SIGKILL, 0, 0), [text[-2000:] for text in said]
  assert "train goes on after step 4" in said[1]
  assert "train goes on after step 7" in said[2]  # where SIGTERM stopped it
  assert "train1: done before" in said[3] and said[3].count(", shard") == 10 - 4
  for machine in ("machine3", "machine4"):
    assert {name: (tmp_path / machine / name).read_bytes() for name in MADE} == expected
  assert said[4].count("done before") == 6 and ", shard" not in said[4] and "trained retriever" in said[4]
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("DPTDR_CACHE", str(tmp_path / "cache"))
    look_at(remote, tmp_path / "undisturbed")


def test_a_workdir_is_local():
  with pytest.raises(InputError, match="memory://run: a run works on local files. Name a local --workdir and --remote"):
    pipeline.run(None, "memory://run")


def test_a_retriever_on_a_remote_finds_the_backbone_that_its_run_pretrained(tmp_path, monkeypatch):
  monkeypatch.setenv("DPTDR_CACHE", str(tmp_path / "cache"))
  backbone = tiny.backbone(tmp_path / "run/pretrain/backbone")
  retriever = Retriever.untuned(Backbone.load(backbone), passage_length=32)
  retriever.save(tmp_path / "run/train1/retriever")
  (tmp_path / "run").rename(tmp_path / "there")
  loaded = Retriever.load(f"file://{tmp_path}/there/train1/retriever")
  assert loaded.backbone.path == f"file://{tmp_path}/there/pretrain/backbone" and loaded.hash == retriever.hash


def look_at(remote: pathlib.Path, workdir: pathlib.Path) -> None:
  """What people read from a remote is what the run's directory holds."""
  here, there = (Retriever.load(place) for place in (workdir / "train1/retriever", f"file://{remote}/train1/retriever"))
  np.testing.assert_array_equal(here.encode_queries(["merge sort"]), there.encode_queries(["merge sort"]))
  vectors = Embeddings(f"file://{remote}/encode/train1/corpus")
  assert len(vectors) == 64 and vectors.source["retriever"] == here.hash == there.hash
  assert Checkpoints(remote / "train1/checkpoints").steps() == [7, 8]
