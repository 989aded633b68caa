"""Pretraining: what it exports and writes, several corpora, from nothing, and text without queries."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from support import runs, tiny

from dptdr_jax import Backbone, Retriever
from dptdr_jax.core import preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.prepare import Corpus
from dptdr_jax.models import mlm
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.models.represent import hidden_states
from dptdr_jax.pipeline import prepare


def manifest(made: runs.Run) -> dict:
  return json.loads((made.workdir / "pretrain/backbone/manifest.json").read_text())


def test_manifest_says_what_the_backbone_was_made_from(whole):
  about = manifest(whole)
  before, after = Backbone.load(whole.config.backbone.path), Backbone.load(whole.workdir / "pretrain/backbone")
  assert about["hash"] == after.hash and about["parent"] == {"path": whole.config.backbone.path, "hash": before.hash}
  assert about["hash"] != before.hash and about["tokenizer"] == after.tokenizer.hash == before.tokenizer.hash
  (corpus,) = about["corpora"]
  assert (about["steps"], corpus["name"], corpus["truncated"]) == (2, "data", 0)
  assert sum(corpus["passages"].values()) == 64 and corpus["passage"] == 2 * 8
  assert 2 * 16 * 3 < about["tokens"] <= 2 * 16 * 18
  assert Retriever.load(whole.workdir / "train1/retriever").backbone.hash == after.hash


def test_metrics_hold_losses_geometry_and_trials(whole):
  lines = [json.loads(line) for line in (whole.workdir / "pretrain/metrics.jsonl").read_text().splitlines()]
  losses = [line for line in lines if "loss" in line]
  assert [line["step"] for line in losses] == [1, 2]
  wanted = {"loss", "contrastive_loss", "accuracy", "mlm_loss", "mlm_accuracy", "gradient_norm", "alignment",
            "uniformity", "learning_rate"}  # fmt: skip
  assert wanted <= set(losses[0])
  assert [line["step"] for line in lines if "dev/R@100" in line] == [0, 2]
  assert losses[0]["loss"] == pytest.approx(losses[0]["contrastive_loss"] + losses[0]["mlm_loss"])


def test_exported_backbone_is_transformers_own(whole):
  exported = whole.workdir / "pretrain/backbone"
  model, report = transformers.BertForMaskedLM.from_pretrained(exported, output_loading_info=True)
  assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
  own, texts = Backbone.load(exported), ["merge heap stable", "node", "prime factor modulo integer fraction divisor"]
  batch = transformers.AutoTokenizer.from_pretrained(exported)(texts, padding=True, return_tensors="pt")
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
  assert np.abs(head["bias"]).max() > 1e-6, "a fresh head's is 0"
  logits = mlm.logits(head, own.params["embeddings"]["word"], hidden, own.config, np.float32)
  np.testing.assert_allclose(logits[real], wanted.logits.numpy()[real], atol=1e-4)


def test_several_corpora_and_contrast_alone(whole, tmp_path, caplog):
  lines = tmp_path / "more.jsonl"
  lines.write_text("".join(json.dumps({"text": text}) + "\n" for _, text in tiny.sentences(20, 12, 7)))
  tiny.backbone(tmp_path / "backbone", layers=1, head=True)
  config = tiny.config(
    tmp_path, pretrain__enabled=True, pretrain__corpora=(str(whole.workdir), str(lines)), pretrain__steps=0,
    pretrain__epochs=0.5, pretrain__mlm_weight=0.0, pretrain__evaluate_every=0, pretrain__chunk=1,
    pretrain__remat="layer", pretrain__overlap=False, fsdp=2, backbone__dropout=0.0,
  )  # fmt: skip
  made = runs.Run(config, tmp_path / "work")
  made.run("prepare", "pretrain")
  about = manifest(made)
  assert [corpus["name"] for corpus in about["corpora"]] == [str(whole.workdir), str(lines)]
  assert sum(corpus["passage"] for corpus in about["corpora"]) % 8 == 0 < about["steps"]
  assert f"{lines}: both spans of 20 of 20 passages are the whole text unless one is drawn short, and" in caplog.text
  exported, given = (load_file(tmp_path / f"{place}/model.safetensors") for place in ("work/pretrain/backbone",
                                                                                      "backbone"))  # fmt: skip
  heads = [name for name in given if name.startswith("cls.")]  # not trained, and kept
  assert len(heads) == 5 and all((exported[name] == given[name]).all() for name in heads)
  assert "mlm_loss" not in (made.workdir / "pretrain/metrics.jsonl").read_text()


def test_run_from_nothing_makes_its_tokenizer_and_backbone(tmp_path, monkeypatch):
  shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32, "max_positions": 64}
  config = tiny.config(
    tmp_path, pretrain__enabled=True, pretrain__tokenizer="train", pretrain__vocabulary=400, pretrain__mlm_weight=1.0,
    pretrain__evaluate_every=0, rounds=0, backbone__path="", evaluate__baselines=("backbone",),
    **{f"pretrain__shape__{name}": value for name, value in shape.items()},
  )  # fmt: skip
  made = runs.Run(config, tmp_path / "work")
  made.run()
  (node,) = made.nodes("scratch")
  base = Backbone.load(made.path(node))
  assert base.config.family == "roberta" and base.tokenizer.vocab_size == base.config.vocab_size <= 400
  assert manifest(made)["parent"] == {"path": str(made.path(node).resolve()), "hash": base.hash}
  assert list(json.loads((tmp_path / "work/results.json").read_text())) == ["backbone", "pretrain"]
  assert "backbone from nothing" in (tmp_path / "work/report.html").read_text()
  _, report = transformers.RobertaForMaskedLM.from_pretrained(
    tmp_path / "work/pretrain/backbone", output_loading_info=True
  )
  assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
  making = made.making(node, tmp_path / "again")
  with monkeypatch.context() as stopped, pytest.raises(preemption.Preempted, match="tokenizer will be trained again"):
    stopped.setattr(preemption, "asked", lambda: True)
    prepare.build_scratch(node.inputs, making)
  prepare.build_scratch(node.inputs, making)
  for name in ("model.safetensors", "tokenizer.json"):
    assert (tmp_path / "again" / name).read_bytes() == (made.path(node) / name).read_bytes()


def test_text_without_queries_ends_with_a_backbone(tmp_path, capsys, caplog):
  texts = tmp_path / "texts"
  texts.mkdir()
  tiny.backbone(tmp_path / "backbone", hidden=16, layers=1, heads=2)
  config = tiny.config(tmp_path, pretrain__enabled=True, data__format="text", data__dir=str(texts))
  made = runs.Run(config, tmp_path / "work")
  with pytest.raises(InputError, match="no text in this folder"):
    made.run()
  words = [text for _, text in tiny.sentences(40, 12, seed=3)]
  (texts / "a.txt").write_text("\n".join([*words[:19], "", words[19]]))
  (texts / "b.jsonl").write_text("".join(json.dumps({"title": "T", "text": text}) + "\n" for text in words[20:]))
  (texts / "README.md").write_text("left alone")
  made.run()
  assert f"backbone: {tmp_path}/work/pretrain/backbone" in capsys.readouterr().out
  assert {name.partition("/")[0] for name in runs.stored(made.workdir)} == {
    "corpus",
    "span_tokens",
    "pretrain",
    "report",
  }
  assert "40 of 40 passages are so short that both of their spans are the whole text" in caplog.text
  corpus = Corpus(made.workdir / "prepare/corpus")
  assert [corpus.ids[row] for row in (0, 19, 20)] == ["a.txt:1", "a.txt:21", "b.jsonl:1"] and len(corpus) == 40
  page = (made.workdir / "report.html").read_text()
  assert "Pretraining" in page and "passages by what they gave: data: {" in page
  assert not (made.workdir / "results.json").exists()
