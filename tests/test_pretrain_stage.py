"""Pretraining as a stage: what it exports, what follows uses it, kills and SIGTERM, several corpora, from nothing."""

from __future__ import annotations

import importlib
import json
import pathlib
import shutil
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from support import tiny

from dptdr_jax import pipeline
from dptdr_jax.backbone import Backbone
from dptdr_jax.core import preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.data.store import TokenStore
from dptdr_jax.models import mlm
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.models.represent import hidden_states
from dptdr_jax.retriever import Retriever
from dptdr_jax.stages import order, scratch
from dptdr_jax.stages import pretrain as stage
from dptdr_jax.stages.layout import Layout

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 6


def make_config(directory: pathlib.Path, family: str = "bert", **pretrain):
  """configs/beir.py at the size of the tiny corpus, with pretraining."""
  sys.path.insert(0, str(ROOT))  # the configs import configs.base, as they do from the repository's root
  config = importlib.import_module("configs.beir").get_config()
  if not (directory / "data").exists():
    tiny.beir(directory / "data")
    tiny.backbone(directory / family, family=family, head=family == "roberta")
  config.backbone.path = str(directory / family)
  config.data.dir = str(directory / "data")
  config.prompt.length = 4
  config.text.passage_length = 32
  config.vector.update({"pooling": "first", "normalize": False, "temperature": 1.0})
  config.train.update({"steps": 2, "queries": 8, "evaluate_every": 2, "log_every": 1})
  config.evaluate.update({"examples": 2, "measures": ("RR@10", "R@100"), "other_poolings": ("mean",)})
  config.pretrain.update({"enabled": True, "steps": STEPS, "spans": 16, "span_tokens": 16, "shortest": 2})
  config.pretrain.update({"mlm_weight": 1.0, "normalize": False, "temperature": 1.0, "neighbours": 1, "overlap": False})
  config.pretrain.update({"log_every": 1, "checkpoint_every": 2, "evaluate_every": 3, "learning_rate": 1e-3})
  config.pretrain.update(pretrain)
  return config


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp("pretrain")


@pytest.fixture(scope="module")
def finished(directory):
  """(config, workdir) of a run that has ended."""
  config = make_config(directory)
  pipeline.run(config, directory / "work")
  return config, directory / "work"


def test_a_moved_run_finds_its_backbone(finished, tmp_path):
  _, workdir = finished
  shutil.copytree(workdir, tmp_path / "moved")
  retriever = Retriever.load(tmp_path / "moved/train1/retriever")
  assert tmp_path in pathlib.Path(retriever.backbone.path).resolve().parents
  assert retriever.hash == Retriever.load(workdir / "train1/retriever").hash


def weights(workdir: pathlib.Path) -> bytes:
  return (workdir / "pretrain/backbone/model.safetensors").read_bytes()


def manifest(workdir: pathlib.Path) -> dict:
  return json.loads((workdir / "pretrain/backbone/manifest.json").read_text())


def metrics(workdir: pathlib.Path) -> list[dict]:
  """Lines of the stage's metrics.jsonl without what the clock says."""
  lines = (workdir / "pretrain/metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def test_the_run_uses_and_reports_the_pretrained_backbone(finished):
  config, workdir = finished
  results = json.loads((workdir / "results.json").read_text())
  assert list(results) == ["bm25", "backbone", "backbone-mean", "pretrain", "pretrain-mean", "train1"]
  assert len({json.dumps(figures) for figures in results.values()}) == len(results)
  about = manifest(workdir)
  before, after = Backbone.load(config.backbone.path), Backbone.load(workdir / "pretrain/backbone")
  assert about["hash"] == after.hash and about["parent"]["hash"] == before.hash != after.hash
  assert about["tokenizer"] == after.tokenizer.hash == before.tokenizer.hash
  assert about["steps"] == STEPS and about["corpora"][0]["name"] == "data"
  assert sum(about["corpora"][0]["passages"].values()) == 64 and about["corpora"][0]["truncated"] == 0
  batches = stage.make_batches(config, [TokenStore(workdir / "pretrain/tokens/0")], before)
  assert about["tokens"] == sum(batches.tokens(step) for step in range(STEPS))
  by_epochs = config.copy_and_resolve_references()
  by_epochs.pretrain.update({"steps": 0, "epochs": 1.3})
  assert stage.steps_of(by_epochs, batches) == 11  # 64 passages, 8 a step
  loop = types.SimpleNamespace(_batches=batches, state=types.SimpleNamespace(step=10))
  stage.PretrainLoop.restored(loop, {"corpora": [{"epoch": 1, "passage": 16}], "tokens": 7})
  assert loop.tokens == 7
  with pytest.raises(InputError, match="another place of the corpora"):
    stage.PretrainLoop.restored(loop, {"corpora": [{"epoch": 1, "passage": 8}], "tokens": 7})
  assert Retriever.load(workdir / "train1/retriever").backbone.hash == after.hash
  page = (workdir / "report.html").read_text()
  assert all(words in page for words in ("Pretraining", "Uniformity", "dev/RR@10", "Tokens per second", "whole"))


def test_the_clock_starts_after_the_step_that_compiles(monkeypatch):
  loop, now = types.SimpleNamespace(tokens=0, _seen=0, _clock=None), iter([100.0, 101.0, 104.0, 106.0])
  monkeypatch.setattr(stage, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
  found = [stage.PretrainLoop.figures(loop, {"tokens": 8.0}, written) for written in (True, False, True, True)]
  assert found == [{}, {}, {"tokens_per_second": 4.0}, {"tokens_per_second": 4.0}] and loop.tokens == 32


def test_metrics_hold_what_a_reader_wants(finished):
  lines = metrics(finished[1])
  losses = [line for line in lines if "loss" in line]
  assert [line["step"] for line in losses] == list(range(1, STEPS + 1))
  wanted = {"loss", "contrastive_loss", "accuracy", "mlm_loss", "mlm_accuracy", "gradient_norm", "alignment",
            "uniformity", "learning_rate"}  # fmt: skip
  assert wanted <= set(losses[0])
  assert [line["step"] for line in lines if "dev/R@100" in line] == [0, 3, 6]
  assert losses[0]["loss"] == pytest.approx(losses[0]["contrastive_loss"] + losses[0]["mlm_loss"])


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_export_is_transformers_own(directory, finished, family, tmp_path):
  workdir = finished[1]
  if family == "roberta":
    workdir = tmp_path / "work"
    pipeline.run(make_config(tmp_path, family, steps=2, evaluate_every=0), workdir, ["prepare", "pretrain"])
    made, given = (
      load_file(place / "model.safetensors") for place in (workdir / "pretrain/backbone", tmp_path / family)
    )
    for name, tensor in given.items():
      if name.startswith("lm_head"):  # the checkpoint's own was trained on, two steps at 1e-3
        np.testing.assert_allclose(made[name], tensor, atol=5e-3)
        assert (made[name] != tensor).any(), name
  exported = workdir / "pretrain/backbone"
  kind = {"bert": transformers.BertForMaskedLM, "roberta": transformers.RobertaForMaskedLM}[family]
  model, report = kind.from_pretrained(exported, output_loading_info=True)
  assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
  own, texts = Backbone.load(exported), ["merge heap stable", "node", "prime factor modulo integer fraction divisor"]
  loaded = transformers.AutoTokenizer.from_pretrained(exported)
  batch = loaded(texts, padding=True, return_tensors="pt")
  ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
  lengths = mask.sum(1)
  for row, text in enumerate(own.tokenizer.encode(texts)):
    assert ids[row, : lengths[row]].tolist() == own.tokenizer.wrap(text)
  with torch.no_grad():
    wanted = model.eval()(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
  hidden = hidden_states(own.config, PromptSpec("none"), own.params, None, ids, lengths)
  real = mask > 0
  np.testing.assert_allclose(hidden[real], wanted.hidden_states[-1].numpy()[real], atol=1e-4)
  head = mlm.head_from_huggingface(load_file(exported / "model.safetensors"), own.config)
  assert np.abs(head["bias"]).max() > 1e-4, "a fresh head's is 0"
  logits = mlm.logits(head, own.params["embeddings"]["word"], hidden, own.config, np.float32)
  np.testing.assert_allclose(logits[real], wanted.logits.numpy()[real], atol=1e-4)


def test_sigterm_saves_and_says_so(finished, monkeypatch, tmp_path):
  config, undisturbed = finished
  workdir = tmp_path / "work"
  shutil.copytree(undisturbed / "prepare", workdir / "prepare")
  asked = iter([False] * 5 + [True] * 9)
  monkeypatch.setattr(preemption, "asked", lambda: next(asked, False))
  with pytest.raises(preemption.Preempted, match="pretrain stands at step"):
    pipeline.run(config, workdir, ["pretrain"])
  monkeypatch.undo()
  pipeline.run(config, workdir, ["pretrain"])
  assert weights(workdir) == weights(undisturbed) and manifest(workdir) == manifest(undisturbed)


def test_several_corpora_a_token_budget_and_contrast_alone(directory, finished, tmp_path, caplog):
  lines = tmp_path / "more.jsonl"
  lines.write_text("".join(json.dumps({"text": text}) + "\n" for _, text in tiny.sentences(20, 12, 7)))
  tiny.backbone(tmp_path / "headed", head=True)
  config = make_config(
    directory, corpora=(str(finished[1]), str(lines)), weights=(1.0, 1.0), steps=0, tokens=400, mlm_weight=0.0,
    evaluate_every=0, chunk=1, remat="layer", fsdp=2, normalize=True, temperature=0.1, max_stored_tokens=13,
    dropout=0.0, overlap=True,
  )  # fmt: skip
  config.backbone.path = str(tmp_path / "headed")
  pipeline.run(config, tmp_path / "work", ["prepare", "pretrain"])
  about = manifest(tmp_path / "work")
  assert [corpus["truncated"] for corpus in about["corpora"]] == [64, 0]  # of 15 and of 12 tokens
  assert (
    f"{finished[1]}: 64 of 64 passages have 13 tokens or more" in caplog.text and "20 passages have" not in caplog.text
  )
  assert [corpus["passage"] for corpus in about["corpora"]] == [4 * about["steps"] % 64, 4 * about["steps"] % 20]
  assert 2 <= about["steps"] <= 4  # about 8 tokens a span
  assert f"{lines}: both spans of 20 of 20 passages are the whole text unless one is drawn short, and" in caplog.text
  made, given = (load_file(tmp_path / f"{place}/model.safetensors") for place in ("work/pretrain/backbone", "headed"))
  heads = [name for name in given if name.startswith("cls.")]  # not trained, and kept
  assert len(heads) == 5 and all((made[name] == given[name]).all() for name in heads)
  assert "mlm_loss" not in metrics(tmp_path / "work")[0]


def begin_again(directory):
  """A run whose text is prepared and whose tokenizer is not."""
  shutil.copytree(directory / "again/prepare/text", directory / "begun/prepare/text")
  return directory / "begun"


def test_from_nothing(directory, tmp_path, monkeypatch):
  shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_positions": 64}
  config = make_config(directory, tokenizer="train", vocabulary=400, shape=shape, steps=2, evaluate_every=2)
  pipeline.run(config, tmp_path / "work")  # the backbone that the config names is not read
  about = manifest(tmp_path / "work")
  assert about["parent"]["path"] == str(tmp_path / "work/prepare/backbone")
  assert "backbone from nothing" in (tmp_path / "work/report.html").read_text()
  base = Backbone.load(tmp_path / "work/prepare/backbone")
  assert base.config.family == "roberta" and base.tokenizer.vocab_size == base.config.vocab_size <= 400
  results = json.loads((tmp_path / "work/results.json").read_text())
  assert list(results) == ["bm25", "backbone", "backbone-mean", "pretrain", "pretrain-mean", "train1"]
  exported = tmp_path / "work/pretrain/backbone"
  _, report = transformers.RobertaForMaskedLM.from_pretrained(exported, output_loading_info=True)
  assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
  again = make_config(directory, tokenizer="train", vocabulary=400, shape=shape)
  again.backbone.path = ""
  pipeline.run(again, tmp_path / "again", ["prepare"])
  with monkeypatch.context() as stopped, pytest.raises(preemption.Preempted, match="tokenizer will be trained again"):
    stopped.setattr(preemption, "asked", lambda: True)
    scratch.make(again, Layout.of(begin_again(tmp_path)))
  for name in ("model.safetensors", "tokenizer.json"):
    assert (tmp_path / "again/prepare/backbone" / name).read_bytes() == (base.tokenizer.directory / name).read_bytes()


def test_text_alone_ends_with_a_backbone(directory, tmp_path, capsys, caplog):
  config = make_config(directory, steps=2, overlap=True)
  texts = tmp_path / "texts"
  texts.mkdir()
  config.data.update({"source": "text", "dir": str(texts)})
  with pytest.raises(InputError, match="no text in this folder. It wants .txt"):
    pipeline.run(config, tmp_path / "work")
  words = [text for _, text in tiny.sentences(40, 12, seed=3)]
  (texts / "a.txt").write_text("\n".join([*words[:19], "", words[19]]))
  (texts / "b.jsonl").write_text("".join(json.dumps({"title": "T", "text": text}) + "\n" for text in words[20:]))
  (texts / "README.md").write_text("left alone")
  pipeline.run(config, tmp_path / "work")
  assert f"backbone: {tmp_path}/work/pretrain/backbone" in capsys.readouterr().out
  assert sorted(path.parent.name for path in tmp_path.glob("work/*/manifest.json")) == ["prepare", "pretrain", "report"]
  assert "40 of 40 passages are so short that both of their spans are the whole text" in caplog.text
  data = PreparedData(tmp_path / "work/prepare/text")
  assert [data.ids[row] for row in (0, 19, 20)] == ["a.txt:1", "a.txt:21", "b.jsonl:1"] and len(data.ids) == 40
  page = (tmp_path / "work/report.html").read_text()
  assert "Pretraining" in page and "passages by what they gave: data: {" in page
  assert Backbone.load(tmp_path / "work/pretrain/backbone").config.hidden_size == 32
  config.pretrain.enabled = False
  with pytest.raises(InputError, match="all that it is for is pretraining"):
    pipeline.run(config, tmp_path / "other")


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"mlm_weight": 0.0, "contrast_weight": 0.0}, "nor both 0"),
    ({"span_tokens": 500}, "500 tokens don't fit"),
    ({"corpora": ("nowhere.txt",)}, "nowhere.txt: no such corpus"),
    ({"tokenizer": "other"}, "unknown pretrain.tokenizer"),
    ({"corpora": ()}, "pretrain.corpora is empty"),
    ({"weights": (1.0, 2.0)}, "1 corpora need as many weights"),
    ({"steps": 0, "epochs": 0.0}, "pretraining has no steps"),
    ({"spans": 18}, "spans must be pairs that 1 processes and 8 devices can share"),
    ({"neighbours": 0}, "pretrain.neighbours must be at least 1"),
    ({"spans": 64, "chunk": 3}, "a span chunk of 3 does not divide the 8 rows"),
    ({"fsdp": 3}, "does not fit 8 devices"),
    ({"fsdp": 8, "tokenizer": "train", "shape": {"hidden_size": 36}}, "does not divide over 8 devices"),
    ({"mask_rate": 1.5}, "mask_rate must lie between"),
    ({"mask_rate": 0.0, "tokenizer": "train"}, "mask_rate must lie between"),
    ({"shortest": 8}, "don't go with a shortest of 8"),
    ({"schedule": "steep"}, "unknown decay"),
    ({"tokenizer": "train", "vocabulary": 100}, "at least 261 ids"),
  ],
)
def test_what_cannot_work_is_said_before_any_work(directory, tmp_path, fields, message):
  with pytest.raises(InputError, match=message):
    pipeline.run(make_config(directory, **fields), tmp_path / "work")
  assert not list(tmp_path.glob("work/*/manifest.json"))


def test_what_cannot_change_the_weights_does_not_undo_them(finished):
  config, workdir = finished
  layout = Layout.of(workdir)

  def keys(**fields):
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return {item.stage.name: item.key for item in order.plan(changed, layout)}

  usual = keys()
  beside = {"checkpoint_every": 5, "evaluate_every": 1, "chunk": 2, "epochs": 3.0, "tokens": 10**6, "vocabulary": 999}
  assert keys(**{f"pretrain__{name}": value for name, value in beside.items()}, train__checkpoint_every=7) == usual
  other = keys(pretrain__learning_rate=2e-3)
  assert [name for name in usual if usual[name] == other[name]] == ["prepare"]
  for field, value, stay in (
    ("data__dev_split", "", ["prepare", "pretrain", "mine0"]),  # it tries and chooses, and RIP chooses nothing
    ("text__query_template", "query: {text}", ["pretrain"]), ("data__max_stored_tokens", 200, ["pretrain"]),
  ):  # fmt: skip
    other = keys(**{field: value})
    assert [name for name in usual if usual[name] == other[name]] == stay, field
  # Every stage that learns names the splits, which `prepare` does not depend on.
  crossed = {"cross__enabled": True, "cross__pair_length": 48}
  usual, other = keys(**crossed), keys(**crossed, data__train_split="dev", data__dev_split="train")
  assert "cross" in usual and [name for name in usual if usual[name] == other[name]] == ["prepare", "pretrain"]
