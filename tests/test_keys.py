"""Keys of stages: what a stage does not read makes nothing anew."""

from __future__ import annotations

import pytest
from test_rounds import make_config

from dptdr_jax.stages import order
from dptdr_jax.stages.layout import Layout


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp("keys")


def test_a_round_on_bm25_alone_does_not_depend_on_the_retriever_to_come(directory):
  def keys(**fields) -> dict[str, str]:
    config = make_config(directory, train__negatives="bm25", **fields)
    return {item.stage.name: item.key for item in order.plan(config, Layout.of(directory / "planned"))}

  usual, later = keys(), keys(mine__dense__relative_margin=0.5, mine__sources=("dense",), mine__cross_encoder=False)
  assert [name for name in usual if usual[name] == later[name]] == ["prepare", "mine0", "train1"]
  assert keys(mine__bm25__depth=5)["mine0"] != usual["mine0"]
  assert keys(encode__shard_passages=7) == usual, "how much a kill may lose changes no vector"
  assert list(keys(rounds=1)) == ["prepare", "mine0", "train1", "encode", "evaluate", "report"]
  assert "mine0" not in keys(rounds=1, train__passages=1), "no negative would be drawn"


def test_what_is_dear_of_a_pool_stays_for_what_it_does_not_depend_on(directory):
  def mined(**fields) -> order.Planned:
    plan = order.plan(make_config(directory, **fields), Layout.of(directory / "planned"))
    return next(item for item in plan if item.stage.name == "mine1")

  def kept(**fields) -> set[str]:
    changed = mined(**fields)
    return {part for part in changed.stage.kept_of(mined().made_from, changed.made_from) if "-of-" not in part}

  encoded = {"vectors", "index", "retrievers"}
  (directory / "another.trec").touch()
  assert kept(mine__runs=(str(directory / "another.trec"),)) == encoded | {"runs/bm25", "runs/dense"}
  assert kept(mine__bm25__depth=5, mine__dense__relative_margin=0.5) == encoded | {"runs/dense"}
  assert kept(mine__dense__depth=5) == kept(index__factory="IVF4,Flat") == encoded | {"runs/bm25"}
  assert kept(train__steps=3) == kept(encode__dtype="float16") == {"runs/bm25"}
  assert not kept(seed=1, data__train_split="dev", data__dev_split="")


def test_what_is_encoded_depends_on_the_baselines_and_on_the_pretraining_below(directory):
  def key(stage: str = "encode", **fields) -> str:
    config = make_config(directory, pretrain__enabled=True, pretrain__steps=5, **fields)
    return {item.stage.name: item.key for item in order.plan(config, Layout.of(directory / "planned"))}[stage]

  for rounds in (0, 1):
    usual = key(rounds=rounds)
    assert key(rounds=rounds, pretrain__log_every=3) == usual
    assert key(rounds=rounds, evaluate__other_poolings=("first",)) != usual
    assert key(rounds=rounds, evaluate__backbone=True) != usual
    assert key(rounds=rounds, pretrain__learning_rate=3e-3) != usual


def test_what_a_training_does_not_read_is_not_in_its_key(directory):
  def keys(**fields) -> dict[str, str]:
    config = make_config(directory, cross__pair_length=48, cross__length=4, **fields)
    return {item.stage.name: item.key for item in order.plan(config, Layout.of(directory / "planned"))}

  def same(**fields) -> set[str]:
    there = keys(**fields)
    return {name for name, key in keys(cross__enabled=True).items() if there.get(name) == key}

  crossed = {"cross__enabled": True}
  training, later = {"prepare", "mine0", "cross", "train1", "mine1", "train2"}, {"encode", "evaluate", "report"}
  assert keys()["train1"] == keys(**crossed)["train1"], "random negatives: mine0 is the cross-encoder's alone"
  assert same(**crossed, train__restart=False) == training - {"train2"}
  assert same(**crossed, train__simans_source="bm25") == training | later
  assert same(**crossed, mine__bm25__quota=3) == {"prepare", "train1"}
  assert same(**crossed, vector__temperature=0.1) == {"prepare", "mine0", "cross"}
  denoised = {"mine__cross_encoder": True}
  assert {"train1", "cross"} <= same(**crossed, **denoised, mine__pseudo_positives=True)
  unread = {"mine__negative_below": 0.05, "mine__positive_above": 0.95, "cross__depth": 9}
  assert same(**crossed, **unread) == training | later, "the cross-encoder is not asked"
  for stage, early in (("mine1", {}), ("train1", {"train__refresh_every": 2})):
    for field, value in unread.items():
      there = keys(**crossed, **denoised, **early, **{field: value})
      assert there[stage] != keys(**crossed, **denoised, **early)[stage], field
  drawn = {"train__sampling": "simans", "train__simans_source": "bm25"}
  assert keys(**drawn)["train1"] != keys(**drawn, train__simans_a=3.0)["train1"]
