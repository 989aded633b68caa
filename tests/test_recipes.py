"""The recipes end to end: configs/msmarco.py and configs/nq.py on the files they name, at small sizes."""

from __future__ import annotations

import functools
import importlib
import json
import pathlib
import sys

import ir_measures
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import formats, tiny

from dptdr_jax import pipeline
from dptdr_jax.data.store import TokenStore
from dptdr_jax.data.tokenizer import Tokenizer
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retriever import Retriever
from dptdr_jax.training.chunks import chunk_count

ROOT = pathlib.Path(__file__).parents[1]


def make_config(name: str, directory: pathlib.Path, data: pathlib.Path):
  """configs/NAME.py with a tiny RoBERTa and nothing but sizes changed."""
  sys.path.insert(0, str(ROOT))  # the configs import configs.base, as they do from the repository's root
  config = importlib.import_module(f"configs.{name}").get_config()
  config.backbone.path = str(tiny.backbone(directory / "backbone", family="roberta"))
  config.data.dir = str(data)
  config.prompt.length = 8
  config.text.update({"query_length": 16, "passage_length": 32})
  config.train.update({"steps": 4, "queries": 16, "checkpoint_every": 2, "evaluate_every": 2, "log_every": 1})
  config.train.update({"passages": min(config.train.passages, 4), "query_chunk": 1, "passage_chunk": 2})
  config.pretrain.update({"steps": 2, "spans": 16, "span_tokens": 16, "shortest": 2, "chunk": 1, "evaluate_every": 2})
  config.encode.shard_passages = 24
  return config


@pytest.fixture(scope="module")
def msmarco(tmp_path_factory):
  """(config, workdir) of the recipe for MS MARCO, TREC DL included."""
  directory = tmp_path_factory.mktemp("msmarco")
  config = make_config("msmarco", directory, formats.msmarco(directory / "data"))
  config.evaluate.splits = ("dev", "dl19", "dl20")
  pipeline.run(config, directory / "work")
  return config, directory / "work"


@pytest.fixture(scope="module")
def nq(tmp_path_factory):
  """(config, workdir) of the recipe for Natural Questions."""
  directory = tmp_path_factory.mktemp("nq")
  config = make_config("nq", directory, formats.nq(directory / "data"))
  pipeline.run(config, directory / "work")
  return config, directory / "work"


@pytest.mark.parametrize("name", ["msmarco", "nq"])
@pytest.mark.parametrize("devices", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_chunks_divide_a_devices_share(name, devices):
  sys.path.insert(0, str(ROOT))
  config = importlib.import_module(f"configs.{name}").get_config()
  train, pretrain = config.train, config.pretrain
  for rows, chunk in (
    (train.queries, train.query_chunk), (train.queries * train.passages, train.passage_chunk),
    (pretrain.spans, pretrain.chunk),
  ):  # fmt: skip
    assert chunk_count(-(-rows // devices) * devices, devices, chunk, "row") >= 1


def results_of(workdir: pathlib.Path) -> dict:
  return json.loads((workdir / "results.json").read_text())


def stored_passages(config, workdir: pathlib.Path) -> list[str]:
  tokenizer = Tokenizer(config.backbone.path)
  store = TokenStore(workdir / "prepare/tokens/corpus")
  return [tokenizer.decode(store[row].tolist()) for row in range(len(store))]


def test_msmarco_measures_are_those_of_ir_measures_on_the_official_files(msmarco):
  config, workdir = msmarco
  results = results_of(workdir)
  assert list(results) == ["bm25", "backbone", "pretrain", "train1", "train2"]
  files = {"dev": "qrels.dev.small.tsv", "dl19": "2019qrels-pass.txt", "dl20": "2020qrels-pass.txt"}
  for split, name in files.items():
    graded = "(rel=2)" if split != "dev" else ""
    expected = [f"RR{graded}@10", *(f"R{graded}@{k}" for k in (20, 50, 100, 1000)), "nDCG@10"]
    qrels = list(ir_measures.read_trec_qrels(str(pathlib.Path(config.data.dir, name))))
    for system, splits in results.items():
      assert list(splits[split]) == expected
      lines = (workdir / f"evaluate/runs/{system}.{split}.trec").read_text().splitlines()
      ranked = (line.split() for line in lines)  # by rank: ir-measures would order ties in BM25's scores by id
      run = [ir_measures.ScoredDoc(query, passage, -float(rank)) for query, _, passage, rank, _, _ in ranked]
      oracle = ir_measures.calc_aggregate(map(ir_measures.parse_measure, expected), qrels, run)
      assert splits[split] == pytest.approx({str(measure): value for measure, value in oracle.items()}, abs=1e-9)


@pytest.mark.parametrize("name", ["msmarco", "nq"])
def test_every_strategy_of_the_paper_is_in_the_recipe(request, name):
  config, workdir = request.getfixturevalue(name)
  assert list(results_of(workdir)) == ["bm25", "backbone", "pretrain", "train1", "train2"]
  assert Pool.open(workdir / "mine1/pool").names == ("bm25", "dense") and not (workdir / "train3").exists()
  recipe = importlib.import_module(f"configs.{name}").get_config().pretrain
  assert config.pretrain.enabled and config.train.restart and (recipe.spans, recipe.span_tokens) == (2048, 128)
  assert (recipe.learning_rate, recipe.warmup, recipe.weight_decay, recipe.epochs) == (1e-4, 0.1, 0.01, 8.0)
  assert (recipe.mlm_weight, recipe.mask_rate, recipe.short_share) == (1.0, 0.15, 0.1)


def test_msmarco_runs_are_written_in_its_own_format_too(msmarco):
  _, workdir = msmarco
  for split in ("dev", "dl19"):
    trec = [line.split() for line in (workdir / f"evaluate/runs/train1.{split}.trec").read_text().splitlines()]
    own = [
      line.split("\t") for line in (workdir / f"evaluate/runs/train1.{split}.msmarco.tsv").read_text().splitlines()
    ]
    assert own == [[query, passage, rank] for query, _, passage, rank, _, _ in trec]


def test_msmarco_titles_stand_before_the_separator_token(msmarco):
  config, workdir = msmarco
  passages = stored_passages(config, workdir)
  for row, (topic, text) in enumerate(tiny.sentences(formats.PASSAGES, 14, seed=0)):
    assert passages[row] == (f"{topic}</s>{text}" if row % 7 else text)
  separator = Tokenizer(config.backbone.path).sep_id
  assert separator in TokenStore(workdir / "prepare/tokens/corpus")[1]


def test_msmarco_has_one_prompt_and_trains_on_the_official_negatives(msmarco):
  config, workdir = msmarco
  tensors = load_file(workdir / "train1/retriever/prompts.safetensors")
  assert {name.split("/")[0] for name in tensors} == {"prompt"}
  retriever = Retriever.load(workdir / "train1/retriever")
  assert retriever.settings.separator == "</s>" and retriever.spec.position_shift == 8
  data = json.loads((workdir / "prepare/text/prepared.json").read_text())
  assert data["splits"]["train"] == {"queries": formats.TRAIN, "trainable": formats.TRAIN, "skipped": 1}
  lines = [json.loads(line) for line in (workdir / "train1/metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
  assert [line["step"] for line in lines if "dev/RR@10" in line] == [2, 4]
  assert config.train.negatives == "source"


def test_nq_counts_answers_in_the_passages_found(nq):
  _, workdir = nq
  corpus = [text for _, text in tiny.sentences(formats.PASSAGES, 14, seed=0)]
  answers = [" ".join(corpus[row].split()[:2]) for row, _ in formats.asked(formats.HELD_OUT, 3)]
  results = results_of(workdir)
  for system, splits in results.items():
    assert list(splits) == ["test"] and list(splits["test"]) == ["Success@5", "Success@20", "Success@100"]
    lines = [line.split() for line in (workdir / f"evaluate/runs/{system}.test.trec").read_text().splitlines()]
    for k in (5, 20, 100):
      hit = {
        query for query, _, passage, rank, _, _ in lines
        if int(rank) <= k and f" {answers[int(query.split('-')[-1])]} " in f" {corpus[int(passage) - 1]} "
      }  # fmt: skip
      assert splits["test"][f"Success@{k}"] == pytest.approx(len(hit) / len(answers))
  assert 0 < results["train1"]["test"]["Success@5"] < 1


def test_nq_has_a_prompt_for_each_side_and_stores_half_precision(nq):
  config, workdir = nq
  tensors = load_file(workdir / "train1/retriever/prompts.safetensors")
  assert {name.split("/")[0] for name in tensors} == {"query", "passage"}
  assert np.abs(tensors["query/table"] - tensors["passage/table"]).max() > 1e-3
  vectors = Embeddings(workdir / "encode/train1/corpus")
  assert vectors.dtype == "float16" and len(vectors) == formats.PASSAGES
  retriever = Retriever.load(workdir / "train1/retriever")
  corpus = tiny.sentences(formats.PASSAGES, 14, seed=0)
  np.testing.assert_allclose(vectors.take(np.arange(8)), retriever.encode_passages(corpus[:8]), atol=4e-3)
  assert stored_passages(config, workdir)[0] == f"{corpus[0][0]}</s>{corpus[0][1]}"
  data = json.loads((workdir / "prepare/text/prepared.json").read_text())
  assert data["splits"]["train"]["skipped"] == 7
  assert "Success@20" in (workdir / "report.html").read_text()


@pytest.mark.parametrize("resumed", ["msmarco", "nq"])
def test_a_rerun_of_a_recipe_does_nothing(request, resumed):
  config, workdir = request.getfixturevalue(resumed)
  before = {path: path.stat().st_mtime_ns for path in workdir.glob("*/manifest.json")}
  pipeline.run(config, workdir)
  assert {path: path.stat().st_mtime_ns for path in workdir.glob("*/manifest.json")} == before


def test_the_originals_files_give_the_same_run_as_text_and_as_token_ids(tmp_path):
  tokenizer = Tokenizer(tiny.backbone(tmp_path / "backbone", family="roberta"))
  made = {}
  for kind, encode in (("text", str), ("ids", functools.partial(ids_of, tokenizer))):
    config = make_config("base", tmp_path, formats.original(tmp_path / kind, encode))
    config.data.source = "original"
    config.train.update({"query_chunk": 0, "passage_chunk": 0, "passages": 3})
    config.evaluate.backbone = False
    pipeline.run(config, tmp_path / f"work-{kind}")
    made[kind] = results_of(tmp_path / f"work-{kind}")
    made[f"{kind} prompts"] = (tmp_path / f"work-{kind}/train1/retriever/prompts.safetensors").read_bytes()
  assert made["text"] == made["ids"] and list(made["ids"]) == ["bm25", "train1"]
  assert made["text prompts"] == made["ids prompts"]


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
  return tokenizer.encode([text])[0]
