"""fuse: BM25 and a retriever as one system, its weight chosen on dev; the system that a run recommends."""

from __future__ import annotations

import shutil

import numpy as np

from dptdr_jax.core import files
from dptdr_jax.core.store import Inputs, Kind, Making, Ref
from dptdr_jax.data.prepare import Split
from dptdr_jax.pipeline import evaluate, pools
from dptdr_jax.pipeline.encode import run_of
from dptdr_jax.pipeline.trials import CHOOSES
from dptdr_jax.reporting import comparison
from dptdr_jax.retrieval import fusion

SEARCH = "search.json"


class DevRuns(Inputs):
  """What BM25 and the retriever rank for the dev queries."""

  bm25: Ref
  dense: Ref
  split: Ref
  name: str


class FusionInputs(Inputs):
  """How the two are fused; without a dev split by reciprocal ranks."""

  dev: DevRuns | None


class FusedRunInputs(Inputs):
  """A fused run."""

  bm25: Ref
  dense: Ref
  fusion: Ref
  depth: int


class PublishedInputs(Inputs):
  """The last retriever with the way in which it was searched."""

  trained: Ref
  fusion: Ref


class RecommendedInputs(Inputs):
  """The measures of all systems: on dev, which chooses, and on the reported splits."""

  dev: dict[str, Ref]
  measured: dict[str, dict[str, Ref]]
  baselines: tuple[str, ...]


def build_fusion(inputs: FusionInputs, making: Making) -> None:
  """Writes search.json."""
  about: dict = {"mode": "fused", "fusion": "reciprocal_ranks"}
  if inputs.dev is not None:
    dev = inputs.dev
    qrels = pools.qrels(Split(making.path(dev.split), dev.name))
    weight, value = fusion.choose_weight(run_of(dev.bm25, making), run_of(dev.dense, making), qrels, CHOOSES)
    about |= {"fusion": "weighted", "weight": weight, "scaled": fusion.SCALED, "chosen_by": CHOOSES, "value": value}
  files.write_json(making.directory / SEARCH, about)


def build_fused(inputs: FusedRunInputs, making: Making) -> None:
  """Writes the run."""
  path = making.path(inputs.fusion) / SEARCH
  about = files.read_json(path)
  runs = [run_of(ref, making) for ref in (inputs.bm25, inputs.dense)]
  with files.fields_of(path):
    depth = min(inputs.depth, sum(run.depth for run in runs))
    weight = about["weight"] if about["fusion"] == "weighted" else None
  fused = fusion.reciprocal_ranks(runs, depth) if weight is None else fusion.weighted(*runs, weight, depth)
  fused.save(making.directory / "run")


def build_published(inputs: PublishedInputs, making: Making) -> None:
  """Writes retriever/: what training saved, and search.json beside it."""
  place = making.directory / "retriever"
  files.remove(place)
  shutil.copytree(making.path(inputs.trained) / "retriever", place)
  shutil.copyfile(making.path(inputs.fusion) / SEARCH, place / SEARCH)


def build_recommended(inputs: RecommendedInputs, making: Making) -> None:
  """Writes recommended.json: the best system on dev, and how far it is above each baseline, query by query."""
  means = {}
  for name, ref in inputs.dev.items():
    values = evaluate.measured(making.path(ref))[1]
    measure = next(iter(values)) if CHOOSES not in values else CHOOSES
    means[name] = float(values[measure].mean())
  best = max(means, key=means.get)
  differences: dict[str, dict] = {}
  for split, ref in inputs.measured[best].items():
    ours = evaluate.measured(making.path(ref))[1]
    differences[split] = {}
    for name in inputs.baselines:
      if name != best:
        theirs = evaluate.measured(making.path(inputs.measured[name][split]))[1]
        differences[split][name] = _differences(ours, theirs)
  about = {"system": best, "chosen_by": f"{measure} on dev", "dev": means, "differences": differences}
  files.write_json(making.directory / "recommended.json", about)


def _differences(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, dict]:
  return {name: comparison.difference(values, theirs[name]) for name, values in ours.items()}


FUSION = Kind("fusion", 1, build_fusion, together=False)
FUSED_RUN = Kind("fused_run", 1, build_fused, together=False)
PUBLISHED = Kind("published", 1, build_published, together=False)
RECOMMENDED = Kind("recommended", 1, build_recommended, together=False)
