"""A finished run is served with its last retriever, its corpus and that corpus' own vectors."""

import json
import time

import numpy as np
import pytest
from support import server, tiny

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.formats.beir import Beir
from dptdr_jax.data.prepare import Corpus, write_corpus
from dptdr_jax.retrieval.embeddings import write_vectors
from dptdr_jax.serving.from_run import FinishedRun


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """What a run leaves. The first round's vectors are there, too, and zeros: they must not be used."""
  directory = tmp_path_factory.mktemp("runs") / "My run"
  backbone = server.models(tmp_path_factory.mktemp("models"))
  corpus = directory / "store" / "corpus" / "key"
  corpus.mkdir(parents=True)
  write_corpus(Beir(tiny.beir(tmp_path_factory.mktemp("data"), passages=40)), corpus)
  (directory / "prepare").mkdir()
  (directory / "prepare" / "corpus").symlink_to(corpus)
  read = Corpus(corpus)
  for number in (1, 2):
    retriever = server.retriever(backbone, number)
    retriever.save(directory / f"train{number}" / "retriever")
    vectors = retriever.encode_passages(read.passages.take(range(40)))
    place = directory / "store" / "vectors" / f"key{number}"
    place.mkdir(parents=True)
    about = {"retriever": retriever.hash, "kind": "passage"}
    made = vectors if number == 2 else 0 * vectors
    write_vectors(
      place, ids=read.ids, width=32, source=about, make=lambda rows, made=made: made[rows.start : rows.stop]
    )
  server.cross_encoder(backbone).save(directory / "cross" / "model")
  retriever.save(directory / "retriever")
  (directory / "retriever/search.json").write_text('{"weight": 0.5}')
  return directory, retriever, vectors


def test_finished_run_is_served_at_once_and_again(run):
  directory, retriever, vectors = run
  for removed in (0, 1):
    started = server.Server([f"--workdir={directory}", *server.FLAGS], own_programs=True)
    try:
      about = wait_for_documents(started.wait(), 40 - removed)
      assert about["name"] == "my-run" and about["hash"] == retriever.hash and about["fusion"] == "weight 0.5"
      assert about["modes"] == ["vector", "bm25", "fused", "reranked"] and about["documents"]["pending"] == 0
      assert "dptdr_documents_encoded_total{" not in started.client.get("/metrics").text  # the run's vectors are used
      hits = started.client.post("/tasks/my-run/search", json={"query": "merge sort", "k": 50}).json()["hits"]
      expected = vectors[removed:] @ retriever.encode_queries(["merge sort"])[0]
      np.testing.assert_allclose([hit["score"] for hit in hits], np.sort(expected)[::-1], rtol=0, atol=1e-5)
      assert hits[0]["id"] == f"p{np.argmax(expected) + removed}" and hits[0]["title"] in tiny.TOPICS
      started.client.delete("/tasks/my-run/documents/p0")  # and it does not come back
      assert started.stop() == 0
    finally:
      started.kill()
  manifest = json.loads((directory / "serve" / "tasks.json").read_text())
  assert manifest["tasks"]["my-run"]["imported"] == "key" and any((directory / "serve" / "compiled").iterdir())


def wait_for_documents(started, count):
  end = time.monotonic() + 60
  while (about := started.client.get("/tasks").json()["tasks"][0])["documents"]["documents"] < count:
    assert time.monotonic() < end
    time.sleep(0.1)
  return about


def test_directory_without_a_retriever_or_a_corpus_is_refused(run, tmp_path):
  with pytest.raises(InputError, match="no trained retriever"):
    FinishedRun.of(tmp_path)
  (tmp_path / "train3").symlink_to(run[0] / "train2")
  with pytest.raises(InputError, match="no corpus"):
    FinishedRun.of(tmp_path)


@pytest.mark.parametrize(
  "flags, message",
  [
    ([], "one of --workdir and --backbone"),
    (["--backbone=x"], "needs --state"),
    (["--backbone=x", "--state=y", "--host=0.0.0.0"], "for this machine alone"),
    (["--backbone=x", "--state=y", "--task=a"], "NAME=RETRIEVER_DIR"),
    (["--workdir=/nonexistent"], "no trained retriever"),
  ],
)
def test_flags_that_cannot_work_end_with_one_line(flags, message):
  status, said = server.Server(flags).end(300)
  assert status == 2 and message in said and "Traceback" not in said
