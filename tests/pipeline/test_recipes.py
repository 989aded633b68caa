"""configs/msmarco.py and configs/nq.py end to end at small sizes, on files in the official formats."""

from __future__ import annotations

import importlib
import json
import pathlib
from collections.abc import Callable

import ir_measures
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import formats, runs, tiny

from dptdr_jax.data.store import TokenStore
from dptdr_jax.data.tokenizer import Tokenizer
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retriever import Retriever
from dptdr_jax.training.chunks import chunk_count


def recipe(name: str):
  return importlib.import_module(f"configs.{name}").get_config()


def run_recipe(directory: pathlib.Path, name: str, write: Callable, **fields) -> runs.Run:
  """Runs configs/NAME.py with a tiny RoBERTa; sizes alone are changed."""
  write(directory / "data")
  tiny.backbone(directory / "backbone", family="roberta", layers=1)
  own = recipe(name)
  config = tiny.config(
    directory, name, prompt__length=8, text__query_length=16, train__queries=16, train__query_chunk=1,
    train__passage_chunk=2, train__passages=min(own.train.passages, 4), train__negatives=own.train.negatives,
    pretrain__chunk=1, encode__shard_passages=24, evaluate__measures=own.evaluate.measures, **fields,
  )  # fmt: skip
  one = runs.Run(config, directory / "work")
  one.run()
  return one


@pytest.fixture(scope="module")
def msmarco(tmp_path_factory) -> runs.Run:
  splits = ("dev", "dl19", "dl20")
  return run_recipe(tmp_path_factory.mktemp("msmarco"), "msmarco", formats.msmarco, evaluate__splits=splits)


@pytest.fixture(scope="module")
def nq(tmp_path_factory) -> runs.Run:
  return run_recipe(tmp_path_factory.mktemp("nq"), "nq", formats.nq)


@pytest.mark.parametrize("name", ["msmarco", "nq"])
@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_chunks_divide_a_devices_share(name, devices):
  config = recipe(name)
  train, pretrain = config.train, config.pretrain
  for rows, chunk in (
    (train.queries, train.query_chunk), (train.queries * train.passages, train.passage_chunk),
    (pretrain.spans, pretrain.chunk),
  ):  # fmt: skip
    assert chunk_count(-(-rows // devices) * devices, devices, chunk, "row") >= 1


def results_of(one: runs.Run) -> dict:
  return json.loads((one.workdir / "results.json").read_text())


def counts_of(one: runs.Run, split: str) -> dict:
  return json.loads((one.workdir / f"prepare/splits/{split}/counts.json").read_text())


def stored_passages(one: runs.Run) -> list[str]:
  tokenizer, store = Tokenizer(one.config.backbone.path), TokenStore(one.store().path(one.plan().tokens()) / "tokens")
  return [tokenizer.backend.decode(store[row].tolist(), skip_special_tokens=False) for row in range(len(store))]


def test_msmarco_measures_equal_ir_measures_on_the_official_files(msmarco):
  results = results_of(msmarco)
  files = {"dev": "qrels.dev.small.tsv", "dl19": "2019qrels-pass.txt", "dl20": "2020qrels-pass.txt"}
  for split, name in files.items():
    graded = "(rel=2)" if split != "dev" else ""
    expected = [f"RR{graded}@10", *(f"R{graded}@{k}" for k in (20, 50, 100, 1000)), "nDCG@10"]
    qrels = list(ir_measures.read_trec_qrels(str(pathlib.Path(msmarco.config.data.dir, name))))
    for system, splits in results.items():
      assert list(splits[split]) == expected
      trec = msmarco.workdir / f"evaluate/runs/{system}.{split}.trec"
      lines = [line.split() for line in trec.read_text().splitlines()]
      # By rank, as ir-measures would order ties in BM25's scores by id.
      ranked = [ir_measures.ScoredDoc(query, passage, -float(rank)) for query, _, passage, rank, _, _ in lines]
      oracle = ir_measures.calc_aggregate(map(ir_measures.parse_measure, expected), qrels, ranked)
      assert splits[split] == pytest.approx({str(measure): value for measure, value in oracle.items()}, abs=1e-9)
      own = [line.split("\t") for line in (trec.resolve().parent / "run.msmarco.tsv").read_text().splitlines()]
      assert own == [[query, passage, rank] for query, _, passage, rank, _, _ in lines], "MS MARCO's own format"


@pytest.mark.parametrize("name", ["msmarco", "nq"])
def test_recipe_has_every_strategy_of_the_paper(request, name):
  one = request.getfixturevalue(name)
  assert list(results_of(one)) == ["bm25", "backbone", "pretrain", "train1", "train2", "fused-backbone", "fused"]
  assert Pool.open(one.workdir / "mine1/pool").names == ("bm25", "dense") and not (one.workdir / "train3").exists()
  pretrain = recipe(name).pretrain
  assert (pretrain.enabled, pretrain.spans, pretrain.span_tokens, pretrain.epochs) == (True, 2048, 128, 8.0)
  assert (pretrain.learning_rate, pretrain.warmup, pretrain.weight_decay) == (1e-4, 0.1, 0.01)
  assert (pretrain.mlm_weight, pretrain.short_share) == (1.0, 0.1)


def test_msmarco_joins_titles_ties_prompts_and_trains_on_the_official_negatives(msmarco):
  passages = stored_passages(msmarco)
  for row, (topic, text) in enumerate(tiny.sentences(formats.PASSAGES, 14, seed=0)):
    assert passages[row] == (f"{topic}</s>{text}" if row % 7 else text)
  tensors = load_file(msmarco.workdir / "train1/retriever/prompts.safetensors")
  assert {name.split("/")[0] for name in tensors} == {"prompt"}
  retriever = Retriever.load(msmarco.workdir / "train1/retriever")
  assert retriever.settings.separator == "</s>" and retriever.spec.position_shift == 8
  assert counts_of(msmarco, "train") == {"queries": formats.TRAIN, "trainable": formats.TRAIN, "skipped": 1}
  assert recipe("msmarco").train.negatives == "source"


def test_nq_counts_answers_in_the_retrieved_passages(nq):
  corpus = [text for _, text in tiny.sentences(formats.PASSAGES, 14, seed=0)]
  answers = [" ".join(corpus[row].split()[:2]) for row, _ in formats.asked(formats.HELD_OUT, 3)]
  results = results_of(nq)
  for system, splits in results.items():
    assert list(splits) == ["test"] and list(splits["test"]) == ["Success@5", "Success@20", "Success@100"]
    lines = [line.split() for line in (nq.workdir / f"evaluate/runs/{system}.test.trec").read_text().splitlines()]
    for k in (5, 20, 100):
      hits = {
        query for query, _, passage, rank, _, _ in lines
        if int(rank) <= k and f" {answers[int(query.split('-')[-1])]} " in f" {corpus[int(passage) - 1]} "
      }  # fmt: skip
      assert splits["test"][f"Success@{k}"] == pytest.approx(len(hits) / len(answers))
  assert 0 < results["train1"]["test"]["Success@5"] < 1 and counts_of(nq, "train")["skipped"] == 7


def test_nq_has_a_prompt_for_each_side_and_stores_half_precision(nq):
  tensors = load_file(nq.workdir / "train1/retriever/prompts.safetensors")
  assert {name.split("/")[0] for name in tensors} == {"query", "passage"}
  assert np.abs(tensors["query/table"] - tensors["passage/table"]).max() > 1e-3
  retriever, corpus = Retriever.load(nq.workdir / "train1/retriever"), tiny.sentences(formats.PASSAGES, 14, seed=0)
  stored = [Embeddings(nq.path(node)) for node in nq.nodes("vectors")]
  vectors = next(one for one in stored if one.source["retriever"] == retriever.hash and len(one) == formats.PASSAGES)
  assert vectors.dtype == "float16"
  np.testing.assert_allclose(vectors.take(np.arange(8)), retriever.encode_passages(corpus[:8]), atol=4e-3)
  assert stored_passages(nq)[0] == f"{corpus[0][0]}</s>{corpus[0][1]}"
