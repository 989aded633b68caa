"""Runs of the main job on the tiny corpus, in this process, and what tests ask of them."""

from __future__ import annotations

import dataclasses
import gzip
import os
import pathlib
import shutil
from typing import Any

from ml_collections import ConfigDict
from support import tiny

from dptdr_jax import Backbone, Retriever
from dptdr_jax.core.store import Making, Ref, Store, refs_of
from dptdr_jax.core.team import SOLO
from dptdr_jax.pipeline import run
from dptdr_jax.pipeline.graph import Graph, Node
from dptdr_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class Run:
  """A config and its directory; what is in memory is read again by every method."""

  config: ConfigDict
  workdir: pathlib.Path

  def run(self, *stages: str, **options: Any) -> Graph:
    return run.run(self.config, self.workdir, stages, **options)

  def change(self, **fields: Any) -> Run:
    """The same with other settings, by their names with '__' for '.'."""
    changed = self.config.copy_and_resolve_references()
    changed.update_from_flattened_dict({key.replace("__", "."): value for key, value in fields.items()})
    return Run(changed, self.workdir)

  def copy(self, workdir: pathlib.Path) -> Run:
    """A copy of the directory, which a test may change."""
    shutil.copytree(self.workdir, workdir, symlinks=True)
    return Run(self.config, workdir)

  def store(self, verify: bool = False) -> Store:
    return Store(self.workdir / "store", verify=verify)

  def plan(self, verify: bool = False) -> Graph:
    return run.plan(Settings.of(self.config), self.store(verify))

  def node(self, link: str) -> Node:
    """The artefact that a link of the run leads to."""
    return next(node for node in self.plan().nodes.values() if link in node.links)

  def nodes(self, kind: str) -> list[Node]:
    return [node for node in self.plan().nodes.values() if node.kind.name == kind]

  def path(self, node: Node) -> pathlib.Path:
    return self.workdir / "store" / str(node.ref)

  def making(self, node: Node, directory: pathlib.Path) -> Making:
    """What the build function of an artefact works with, writing to a directory of the test's."""
    directory.mkdir(parents=True, exist_ok=True)
    return Making(directory, SOLO, lambda: None, self.store(), frozenset(refs_of(node.inputs)))

  def forget(self, *nodes: Node) -> None:
    """Removes finished artefacts, as if they had never been made."""
    for node in nodes:
      shutil.rmtree(self.path(node))


def stored(workdir: pathlib.Path) -> set[str]:
  """KIND/KEY of all finished artefacts of a run."""
  paths = workdir.glob("store/*/*/artefact.json")
  return {f"{path.parent.parent.name}/{path.parent.name}" for path in paths if ".partial" not in path.parent.name}


def watch(monkeypatch) -> list[Ref]:
  """A list that gets the reference of every artefact that is built from now on, in any store."""
  built: list[Ref] = []
  build = Store._build

  def counted(self, kind, ref, inputs):
    built.append(ref)
    build(self, kind, ref, inputs)

  monkeypatch.setattr(Store, "_build", counted)
  return built


def kinds(refs: list[Ref]) -> dict[str, int]:
  """How many artefacts of each kind there are."""
  return {kind: sum(ref.kind == kind for ref in refs) for kind in sorted({ref.kind for ref in refs})}


def prompts(workdir: pathlib.Path, number: int = 1) -> bytes:
  return (workdir / f"train{number}/retriever/prompts.safetensors").read_bytes()


def rewrite(path: pathlib.Path, old: str = "", new: str = "") -> None:
  """Other bytes in a file, its size and time as they were; without `old` a bit of the last byte is flipped."""
  before, content = path.stat(), path.read_bytes()
  changed = content.replace(old.encode(), new.encode(), 1) if old else content[:-1] + bytes([content[-1] ^ 1])
  assert len(changed) == len(content) and changed != content, path
  path.write_bytes(changed)
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def everything(directory: pathlib.Path) -> ConfigDict:
  """A run of two rounds in which all that a run can make is made; data and files are written to `directory` first."""
  if not (directory / "elsewhere").exists():
    _write(directory)
  return tiny.config(
    directory, rounds=2, evaluate__splits=("dev", "test"), evaluate__other_poolings=("first",),
    evaluate__retrievers=(f"elsewhere={directory}/elsewhere",),
    pretrain__enabled=True, pretrain__mlm_weight=1.0, pretrain__overlap=False, pretrain__neighbours=1,
    train__passages=3, train__steps=7, train__refresh_every=2, train__sampling="simans",
    mine__runs=(str(directory / "other.trec"),), mine__dense__relative_margin=0.99,
    mine__cross_encoder=True, mine__pseudo_positives=True, mine__negative_below=0.5, mine__positive_above=0.504,
    cross__enabled=True, cross__head="first", index__factory="IVF4,Flat", index__search_parameters="nprobe=4",
  )  # fmt: skip


def _write(directory: pathlib.Path) -> None:
  """A BEIR folder with a third split, a backbone, a run file and a saved retriever."""
  data = tiny.beir(directory / "data")
  with gzip.open(data / "corpus.jsonl.gz", "rb") as packed:
    (data / "corpus.jsonl").write_bytes(packed.read())
  (data / "corpus.jsonl.gz").unlink()
  judged = (data / "qrels/dev.tsv").read_text().splitlines(keepends=True)
  (data / "qrels/test.tsv").write_text("".join(judged[:9]))
  (data / "qrels/dev.tsv").write_text("".join([judged[0], *judged[9:]]))
  asked = [line.split("\t")[0] for line in (data / "qrels/train.tsv").read_text().splitlines()[1:9]]
  lines = (f"{query} Q0 p{(7 * place + 11 * rank) % 64} {rank} {9 - rank} other\n"
           for place, query in enumerate(asked) for rank in (1, 2, 3))  # fmt: skip
  (directory / "other.trec").write_text("".join(lines))
  tiny.backbone(directory / "backbone")
  Retriever.untuned(Backbone.load(directory / "backbone"), passage_length=48).save(directory / "elsewhere")
