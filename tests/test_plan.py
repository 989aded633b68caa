"""The plan of a run: what its steps take on chips that are not here, and what fits."""

from __future__ import annotations

import pytest
from test_rounds import make_config

from dptdr_jax import plan
from dptdr_jax.core.errors import InputError


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  made = make_config(tmp_path_factory.mktemp("plan"), train__queries=16, train__passages=4, vector__pooling="first")
  made.pretrain.update({"enabled": True, "spans": 32, "span_tokens": 16, "shortest": 2})
  return made


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
  """What one test has compiled is compiled no more: a program and its figures are the same each time."""
  measured: dict = {}

  def measure(step, config, chips):
    key = (step.name, chips, config.to_json())
    if key not in measured:
      measured[key] = compile_and_measure(step, config, chips)
    return measured[key]

  compile_and_measure, plan.measure = plan.measure, measure
  yield
  plan.measure = compile_and_measure


def test_all_steps_of_a_config_are_planned(config, capsys):
  assert plan.plan(config, ["cpu:8"], sizes=(1000, 100)) == 0
  printed = capsys.readouterr().out
  for step in ("pretrain: 8 × cpu", "train: 8 × cpu", "encode: 8 × cpu"):
    assert step in printed
  train = printed[printed.index("train: 8 × cpu, train") : printed.index("encode: 8")]
  # Two gathers of vectors and one sum of the prompts' gradient: 16 and 64 vectors of 32 float32, 2 · 2 layers · 4 · 32.
  assert train.count("all-gather") == 2 and train.count("all-reduce") == 1 and "all-to-all" not in train
  assert f"{16 * 32 * 4 / 2**20:9.2f} MiB × 1" in train


def test_several_topologies_end_in_a_table(config, capsys):
  assert plan.plan(config, ["cpu:8", "cpu:2"], ["encode"], sizes=(1000, 100)) == 0
  table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
  assert [line.split(" | ")[:2] for line in table[2:]] == [["| cpu:8", "encode"], ["| cpu:2", "encode"]]
  assert len({line.count("|") for line in table}) == 1


def test_what_does_not_fit_is_told_with_what_does(config, capsys, monkeypatch):
  (step,) = plan.find_steps(config, plan.find_devices("cpu:8")[1], ["train"])
  whole = plan.measure(step, config, 8).memory
  again = config.copy_and_resolve_references()
  again.train.remat = "attention"
  enough = plan.measure(step, again, 8).memory
  assert 0.97 * whole <= enough < whole
  assert plan.plan(config, ["cpu:8"], ["train"], memory_gib=enough / plan.GIB) == 1
  printed = capsys.readouterr().out
  assert "fits with --config.train.passage_chunk=" in printed and "fits with --config.train.remat=" in printed
  again.train.passage_chunk = 2
  monkeypatch.setattr(plan, "measure", lambda *of: plan.Figures(2**40, 0, 1.0, 1, ()))
  assert plan.plan(again, ["cpu:8"], ["train"], memory_gib=1) == 1
  printed = capsys.readouterr().out
  assert "no chunk of [1] and no remat fits" in printed and "fits with" not in printed


def test_a_run_trains_in_all_rounds_and_encodes_by_all_systems(config):
  devices = plan.find_devices("cpu:8")[1]
  made = config.copy_and_resolve_references()
  made.rounds, made.evaluate.backbone, made.evaluate.other_poolings = 2, True, ("mean",)
  train, encode = plan.find_steps(made, devices, ["train", "encode"], (1000, 100))
  assert train.repeats == 2 * made.train.steps and train.epoch == 100 / 16
  # The untuned and the pretrained backbone by two poolings each, and the retrievers of two rounds.
  assert encode.repeats == pytest.approx(6 * encode.epoch)


def test_what_is_computed_again_is_work_and_what_is_split_takes_less_memory(config):
  devices = plan.find_devices("cpu:8")[1]

  def measure(*names, **changed):
    made = config.copy_and_resolve_references()
    for name, value in changed.items():
      section, _, field = name.rpartition("__")
      (made[section] if section else made)[field] = value
    return {step.name: plan.measure(step, made, 8) for step in plan.find_steps(made, devices, names)}

  usual, split = measure("train", "encode"), measure("train", "encode", fsdp=4)
  again = measure("train", train__remat="attention")
  assert again["train"].operations > usual["train"].operations
  saved = {name: usual[name].arguments - split[name].arguments for name in usual}  # three quarters of the backbone
  assert saved["encode"] == saved["train"] > 0.5 * usual["train"].arguments


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"pretrain.spans": 100}, "pretrain.spans must be pairs that 8 devices can share evenly: 100"),
    ({"fsdp": 3}, "a mesh of data=-1 × fsdp=3 does not fit 8 devices"),
    ({"train.remat": "some"}, "unknown train.remat"),
    ({"text.passage_length": 10_000}, "10000|positions"),
    ({"train.passage_chunk": 3}, "a passage chunk of 3 does not divide"),
  ],
)
def test_what_the_main_job_would_refuse(config, fields, message):
  made = config.copy_and_resolve_references()
  made.update_from_flattened_dict(fields)
  with pytest.raises(InputError, match=message):
    plan.plan(made, ["cpu:8"])


def test_what_needs_devices_and_weights_that_are_not_here_is_not_asked_of_those_that_are(config):
  made = config.copy_and_resolve_references()
  made.fsdp, made.backbone.sha256 = 16, "0" * 64
  plan.check(made)


def test_an_error_that_nobody_foresaw_is_not_taken_for_what_does_not_fit(monkeypatch, capsys):
  monkeypatch.setattr(plan, "flags", None)
  assert plan.main(["plan"]) == 2 and "Traceback" in capsys.readouterr().err


def test_roofline():
  figures = plan.Figures(0, 0, 2e12, 3 * 10**9, (("all-gather", 10**6, 2, ""),))
  seconds = figures.seconds(plan.Chip(1e12, 1, 1e9, 1e6))
  assert seconds == {"compute": 2.0, "memory": 3.0, "links": 2.0}


@pytest.mark.parametrize(
  ("topology", "only", "message"),
  [
    ("v9:2x2", [], "unknown topology"),
    ("v5e:16", [], "unknown topology"),
    ("cpu:8", ["mine"], "no such step"),
    ("cpu:99", [], "only 8 simulated devices"),
  ],
)
def test_what_cannot_be_planned(config, topology, only, message):
  with pytest.raises(InputError, match=message):
    plan.plan(config, [topology], only)
