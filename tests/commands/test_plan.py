"""`dptdr_jax.plan`: what a run's steps take on devices that are not here, what fits, and what is refused."""

from __future__ import annotations

import pytest
from support import tiny

from dptdr_jax import plan
from dptdr_jax.core.errors import InputError
from dptdr_jax.settings import Settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
  directory = tmp_path_factory.mktemp("plan")
  config = tiny.config(
    directory, compute_dtype="float32", train__queries=16, train__passages=4, vector__pooling="first",
    vector__normalize=False, pretrain__enabled=True, pretrain__mlm_weight=1.0, pretrain__spans=16,
  )  # fmt: skip
  return Settings.of(config)


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
  """Compiles each step once for all tests of this file."""
  measured: dict = {}

  def measure(step, settings, chips):
    key = (step.name, chips, settings.model_dump_json())
    if key not in measured:
      measured[key] = compile_and_measure(step, settings, chips)
    return measured[key]

  compile_and_measure, plan.measure = plan.measure, measure
  yield
  plan.measure = compile_and_measure


def test_all_steps_of_a_config_are_planned(settings, capsys):
  assert plan.plan(settings, ["cpu:8"], sizes=(1000, 100)) == 0
  printed = capsys.readouterr().out
  for step in ("pretrain: 8 × cpu", "train: 8 × cpu", "encode: 8 × cpu"):
    assert step in printed
  train = printed[printed.index("train: 8 × cpu, train") : printed.index("encode: 8")]
  # Two gathers of vectors and one sum of the prompts' gradient: 16 and 64 vectors of 32 float32, 2 · 2 layers · 4 · 32.
  assert train.count("all-gather") == 2 and train.count("all-reduce") == 1 and "all-to-all" not in train
  assert f"{16 * 32 * 4 / 2**20:9.2f} MiB × 1" in train


def test_several_topologies_end_in_a_table(settings, capsys):
  assert plan.plan(settings, ["cpu:8", "cpu:2"], ["encode"], sizes=(1000, 100)) == 0
  table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
  assert [line.split(" | ")[:2] for line in table[2:]] == [["| cpu:8", "encode"], ["| cpu:2", "encode"]]
  assert len({line.count("|") for line in table}) == 1


def test_step_that_does_not_fit_gets_a_suggestion(settings, capsys, monkeypatch):
  (step,) = plan.find_steps(settings, plan.find_devices("cpu:8")[1], ["train"])
  again = settings.replace(**{"train.remat": "attention"})
  whole, enough = (plan.measure(step, one, 8).memory for one in (settings, again))
  assert 0.97 * whole <= enough < whole
  assert plan.plan(settings, ["cpu:8"], ["train"], memory_gib=enough / plan.GIB) == 1
  printed = capsys.readouterr().out
  assert "fits with --config.train.passage_chunk=" in printed and "fits with --config.train.remat=" in printed
  monkeypatch.setattr(plan, "measure", lambda *of: plan.Figures(2**40, 0, 1.0, 1, ()))
  assert plan.plan(again.replace(**{"train.passage_chunk": 2}), ["cpu:8"], ["train"], memory_gib=1) == 1
  printed = capsys.readouterr().out
  assert "no chunk of [1] and no remat fits" in printed and "fits with" not in printed


def test_steps_count_all_rounds_and_all_encoded_systems(settings):
  more = settings.replace(**{"rounds": 2, "evaluate.other_poolings": ("mean",)})
  train, encode = plan.find_steps(more, plan.find_devices("cpu:8")[1], ["train", "encode"], (1000, 100))
  assert train.repeats == 2 * more.train.steps and train.epoch == 100 / 16
  # The untuned and the pretrained backbone by two poolings each, and the retrievers of two rounds.
  assert encode.repeats == pytest.approx(6 * encode.epoch)


def test_remat_adds_operations_and_fsdp_saves_memory(settings):
  devices = plan.find_devices("cpu:8")[1]

  def measure(*names: str, **changed) -> dict[str, plan.Figures]:
    made = settings.replace(**{key.replace("__", "."): value for key, value in changed.items()})
    return {step.name: plan.measure(step, made, 8) for step in plan.find_steps(made, devices, names)}

  whole, split = measure("train", "encode"), measure("train", "encode", fsdp=4)
  assert measure("train", train__remat="attention")["train"].operations > whole["train"].operations
  saved = {name: whole[name].arguments - split[name].arguments for name in whole}  # three quarters of the backbone
  assert saved["encode"] == saved["train"] > 0.5 * whole["train"].arguments


@pytest.mark.parametrize(
  ("fields", "topology", "only", "message"),
  [
    ({"pretrain.spans": 100}, "cpu:8", [], "pretrain.spans must be pairs that 8 devices can share evenly: 100"),
    ({"fsdp": 3}, "cpu:8", [], "a mesh of data=-1 × fsdp=3 does not fit 8 devices"),
    ({"text.passage_length": 10_000}, "cpu:8", [], "10000|positions"),
    ({"train.passage_chunk": 3}, "cpu:8", [], "a passage chunk of 3 does not divide"),
    ({}, "v9:2x2", [], "unknown topology"),
    ({}, "v5e:16", [], "unknown topology"),
    ({}, "cpu:8", ["mine"], "no such step"),
    ({}, "cpu:99", [], "only 8 simulated devices"),
  ],
)
def test_wrong_settings_topologies_and_steps_are_refused(settings, fields, topology, only, message):
  with pytest.raises(InputError, match=message):
    plan.plan(settings.replace(**fields), [topology], only)


def test_devices_and_weights_of_this_machine_are_not_asked_for(settings):
  elsewhere = settings.replace(**{"fsdp": 16, "backbone.sha256": "0" * 64})
  assert plan.plan(elsewhere, []) == 0


def test_unforeseen_error_is_not_the_status_of_what_does_not_fit(capsys):
  assert plan.main(["plan"]) == 2 and "Traceback" in capsys.readouterr().err


def test_roofline():
  figures = plan.Figures(0, 0, 2e12, 3 * 10**9, (("all-gather", 10**6, 2, ""),))
  seconds = figures.seconds(plan.Chip(1e12, 1, 1e9, 1e6))
  assert seconds == {"compute": 2.0, "memory": 3.0, "links": 2.0}
