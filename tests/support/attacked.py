"""The run that tests of faults attack: one round with all that a run may make on the way, of seconds, on one device."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Sequence

from ml_collections import ConfigDict
from support import doom, forks, tiny

FIELDS = {
  "encode__shard_passages": 16, "index__factory": "IVF4,Flat", "evaluate__baselines": ("bm25",),
  "pretrain__enabled": True, "pretrain__steps": 4, "pretrain__checkpoint_every": 1, "pretrain__evaluate_every": 0,
  "pretrain__overlap": False, "pretrain__neighbours": 1,
  "train__steps": 6, "train__passages": 3, "train__refresh_every": 2, "train__checkpoint_every": 1,
  "train__evaluate_every": 3, "train__learning_rate": 0.05, "cross__enabled": True, "cross__checkpoint_every": 1,
  "cross__evaluate_every": 0, "mine__cross_encoder": True, "mine__negative_below": 0.8,
}  # fmt: skip
# What is made before round 1 is trained.
EARLY = ("corpus", "split", "tokens", "span_tokens", "pretrain", "bm25", "bm25_run", "candidates", "cross")


@dataclasses.dataclass(frozen=True)
class Attacked:
  """A config, and the directory of an undisturbed run of it.

  Attributes:
    directory: of data, backbone, config.py, the run (`work`) and its events (`work.events`, see `doom`).
  """

  directory: pathlib.Path

  @property
  def work(self) -> pathlib.Path:
    """The working directory of the undisturbed run."""
    return self.directory / "work"

  def config(self) -> ConfigDict:
    """The config; data and backbone are written first if they are not there."""
    if not (self.directory / "backbone").exists():
      tiny.backbone(self.directory / "backbone", layers=1)
    return tiny.config(self.directory, **FIELDS)

  def flags(self, workdir: pathlib.Path, *more: str) -> list[str]:
    """Flags of the main job."""
    return [f"--config={self.directory}/config.py", f"--workdir={workdir}", *more]

  def make(self) -> None:
    """Writes the config and runs it undisturbed."""
    forks.write(self.config(), self.directory / "config.py")
    self.run(self.work)

  def start(self, workdir: pathlib.Path, *more: str, point: str = "none") -> forks.Job:
    """The main job on one device, which is killed at a point (see `doom`); prints to WORKDIR.said."""
    events = workdir.with_suffix(".events")
    return forks.Job(doom.main, events, point, self.flags(workdir, *more), said=workdir.with_suffix(".said"))

  def run(self, workdir: pathlib.Path, *more: str) -> str:
    """Runs it to its end; returns what it printed."""
    status, said = self.start(workdir, *more).end()
    assert status == 0, said[-4000:]
    return said

  def early(self, workdir: pathlib.Path, store: pathlib.Path | None = None) -> None:
    """Makes a working directory, and a store with what is made before round 1 is trained; None: the directory's own."""
    store = store or workdir / "store"
    for directory in (workdir, store):
      directory.mkdir(parents=True)
    shutil.copy(self.work / "run.json", workdir)
    for name in ("dptdr.json", "inputs.json"):
      shutil.copy(self.work / "store" / name, store)
    for kind in EARLY:
      shutil.copytree(self.work / "store" / kind, store / kind)


def ended(workdir: pathlib.Path) -> dict[str, bytes]:
  """What a run ends with: measures, run files, what was trained and mined, metrics without times."""
  made = {}
  for pattern in ("results.json", "evaluate/runs/*", "*/retriever/*", "*/generations/*/pool/*", "*/pool/*",
                  "pretrain/backbone/*", "cross/model/*", "*/metrics.jsonl"):  # fmt: skip
    for path in sorted(workdir.glob(pattern)):
      read = {"metrics.jsonl": _timeless, "retriever.json": _placeless, "cross_encoder.json": _placeless}
      content = read.get(path.name, pathlib.Path.read_bytes)(path)
      made[path.relative_to(workdir).as_posix()] = content
  return made


def differ(one: dict[str, bytes], other: dict[str, bytes]) -> Sequence[str]:
  """The files that are not the same in both."""
  return sorted(name for name in {**one, **other} if one.get(name) != other.get(name))


def _placeless(path: pathlib.Path) -> bytes:
  """What a saved model says, without where its backbone lies: several stores are compared."""
  about = json.loads(path.read_text())
  about["backbone"] = {name: value for name, value in about["backbone"].items() if not name.endswith("path")}
  return json.dumps(about).encode()


def _timeless(path: pathlib.Path) -> bytes:
  records = [json.loads(line) for line in path.read_text().splitlines()]
  return json.dumps([{k: v for k, v in record.items() if k != "tokens_per_second"} for record in records]).encode()
