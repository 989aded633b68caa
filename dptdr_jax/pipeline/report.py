"""report: results.json, summary.json and report.html, of everything that the run has measured."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax

from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.store import Inputs, Kind, Making, Ref, neutral
from dptdr_jax.data.prepare import Corpus, Split
from dptdr_jax.models import convert
from dptdr_jax.pipeline.encode import run_of
from dptdr_jax.pipeline.models import BackboneInput
from dptdr_jax.reporting import examples, page
from dptdr_jax.settings import Settings


class SystemInput(Inputs):
  """A system and its measures by split."""

  name: str
  label: str
  measures: dict[str, Ref]


class PoolInput(Inputs):
  """A pool, and the title of its section."""

  title: str
  pool: Ref


class ExamplesInput(Inputs):
  """The run whose passages are shown."""

  run: Ref
  split: Ref
  split_name: str
  corpus: Ref


class ReportInputs(Inputs):
  """All that the report shows; of a run without queries its pretraining alone."""

  facts: tuple[str, ...]
  backbone: BackboneInput
  pretrain: Ref | None = None
  systems: tuple[SystemInput, ...] = ()
  trained: tuple[Ref, ...] = ()
  cross: Ref | None = None
  pools: tuple[PoolInput, ...] = ()
  refreshed: bool = False
  recommended: Ref | None = None
  examples: ExamplesInput | None = None
  title: str = neutral("report")


def build_report(inputs: ReportInputs, making: Making) -> None:
  """Writes results.json, summary.json and report.html."""
  facts, drawn = [*inputs.facts], []
  if inputs.pretrain is not None:
    facts.append(_pretrained(making.path(inputs.pretrain)))
    drawn.append(("Pretraining", _metrics(making.path(inputs.pretrain))))
  for number, ref in enumerate(inputs.trained, 1):
    drawn.append((f"Training, round {number}", _metrics(making.path(ref))))
  if inputs.cross is not None:
    drawn.append(("Cross-encoder", _metrics(making.path(inputs.cross))))
  results, summary, shown = None, None, []
  if inputs.systems:
    results, summary = _results(inputs, making)
    if inputs.recommended is not None:
      summary["recommended"] = files.read_json(making.path(inputs.recommended) / "recommended.json")
    summary["facts"] = facts
    example = inputs.examples
    split, corpus = Split(making.path(example.split), example.split_name), Corpus(making.path(example.corpus))
    shown = examples.choose(split, corpus.passages, run_of(example.run, making))
    files.write_json(making.directory / "results.json", results)
  files.write_json(making.directory / "summary.json", summary or {"facts": facts})
  text = page.render(
    inputs.title, facts=facts, results=results, summary=summary, curves=drawn, examples=shown,
    pools=[(pool.title, files.read_json(making.path(pool.pool) / "mining.json")) for pool in inputs.pools],
    refreshed=_refreshed(inputs, making),
  )  # fmt: skip
  with files.atomic_path(making.directory / "report.html") as partial:
    partial.write_text(text, encoding="utf-8")


REPORT = Kind("report", 1, build_report, together=False)


def facts(settings: Settings, dtype: str) -> tuple[str, ...]:
  """Lines about a run that its settings alone give."""
  prompt, starts = settings.prompt, settings.pretrain.enabled and settings.pretrain.tokenizer == "train"
  lines = [f"backbone {'from nothing' if starts else settings.backbone.path}, {dtype}"]
  if settings.data.format == "text":
    return tuple(lines)
  if settings.rounds:
    length = f", length {prompt.length}, {'tied' if prompt.tied else 'untied'}" if prompt.kind != "none" else ""
    lines.append(f"prompt {prompt.kind}{length}")
  lines += [f"pooling {settings.vector.pooling}", f"data {settings.data.format} {settings.data.dir}".strip(),
            f"index {settings.index.factory} (inner product)"]  # fmt: skip
  return (*lines, *(f"saved retriever {entry.partition('=')[0]}" for entry in settings.evaluate.retrievers))


def _results(inputs: ReportInputs, making: Making) -> tuple[dict, dict[str, Any]]:
  """results.json, and what the table and the report say beside it."""
  results: dict[str, dict] = {}
  intervals: dict[str, dict] = {}
  queries, passages = {}, 0
  for system in inputs.systems:
    results[system.name], intervals[system.name] = {}, {}
    for split, ref in system.measures.items():
      path = making.path(ref) / "measures.json"
      about = files.read_json(path)
      with files.fields_of(path):
        results[system.name][split], intervals[system.name][split] = about["means"], about["intervals"]
        queries[split], passages = about["queries"], about["passages"]
  summary: dict[str, Any] = {
    "rounds": len(inputs.trained), "passages": passages, "queries": queries, "intervals": intervals,
    "labels": {system.name: system.label for system in inputs.systems},
  }  # fmt: skip
  summary["backbone_parameters"] = _size(inputs.backbone, making)
  if inputs.trained:
    about = files.read_json(making.path(inputs.trained[-1]) / "facts.json")
    summary |= {"trained_parameters": about["trained"], "backbone_parameters": about["backbone"]}
  if inputs.cross is not None:
    summary["cross_parameters"] = files.read_json(making.path(inputs.cross) / "facts.json")["trained"]
  return results, summary


def _size(backbone: BackboneInput, making: Making) -> int:
  """Weights of a backbone, from its config.json."""
  shapes = convert.abstract_params(backbone.encoder(making), "float32")
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _pretrained(directory: pathlib.Path) -> str:
  path = directory / "backbone" / "manifest.json"
  about = files.read_json(path)
  with files.fields_of(path):
    kinds = "; ".join(
      f"{corpus['name']}: {corpus['passages']}, {corpus['truncated']} as long as is stored or longer"
      for corpus in about["corpora"]
    )
    return (f"pretrained: {about['steps']} steps of {about['spans']} spans, {about['tokens']:,} tokens (passages by "
            f"what they gave: {kinds})")  # fmt: skip


def _metrics(directory: pathlib.Path) -> list[dict]:
  path, records = directory / "metrics.jsonl", []
  with files.open_text(path) as stream:
    for number, line in enumerate(stream, 1):
      try:
        record = json.loads(line)
      except ValueError as error:
        raise InputError(f"broken JSON ({error})", path=path, line=number) from error
      if not isinstance(record, dict) or "step" not in record:
        raise InputError("not a record of metrics", path=path, line=number)
      records.append(record)
  return records


def _refreshed(inputs: ReportInputs, making: Making) -> list[tuple[str, dict[int, dict]]]:
  """Pools that were mined during training, by the step from which they were used."""
  listed = []
  for number, ref in enumerate(inputs.trained if inputs.refreshed else (), 1):
    places = (making.path(ref) / "generations").glob("*/mining.json")
    by_step = {about["from_step"]: about for about in map(files.read_json, places)}
    if by_step:
      listed.append((f"round {number}", dict(sorted(by_step.items()))))
  return listed
