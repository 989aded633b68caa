"""`python -m dptdr_jax.pipeline.reference > docs/configuration.md`: all settings, from their declarations.

Which artefacts a setting changes is read off the graph: the inputs of a run with another value are compared with those
of a reference run, for several of these.
"""

from __future__ import annotations

import collections
import functools
import json
import pathlib
import re
import sys
import typing
from collections.abc import Iterator
from typing import Any

import pydantic

from dptdr_jax.core.store import described, is_neutral
from dptdr_jax.pipeline.graph import Graph
from dptdr_jax.pipeline.models import BackboneInput
from dptdr_jax.pipeline.outside import Files, Outside
from dptdr_jax.pipeline.prepare import TokenizerInput
from dptdr_jax.settings import Settings, declared

_EVERYTHING = {
  "rounds": 2, "pretrain.enabled": True, "cross.enabled": True, "mine.cross_encoder": True, "train.refresh_every": 2,
  "train.negatives": "bm25", "train.sampling": "simans", "index.factory": "IVF2,Flat", "mine.runs": ("runs/a.trec",),
}  # fmt: skip
# Reference runs in which different settings are read.
MODES: dict[str, dict[str, Any]] = {
  "everything": _EVERYTHING,
  "without denoising": _EVERYTHING | {"mine.cross_encoder": False, "train.refresh_every": 0},
  "from nothing": {"pretrain.enabled": True, "pretrain.tokenizer": "train"},
  "devices": {"index.backend": "devices"},
  "answers": {"evaluate.measures": ("RR@10", "Success@5")},
}
# Other values where the type does not give one.
_NEEDS_FILES = ("evaluate.retrievers",)  # read off elsewhere: its files are inputs of `vectors`
_OTHERS: dict[str, Any] = {
  "pretrain.corpora": ("data", "data"), "mine.sources": ("bm25", "dense"),
  "mine.runs": ("runs/b.trec",), "evaluate.splits": ("test",), "evaluate.graded_splits": ("dev",),
  "evaluate.measures": ("RR@10",), "evaluate.baselines": ("bm25",), "evaluate.other_poolings": ("mean",),
  "index.factory": "HNSW8", "data.format": "nq", "compute_dtype": "bfloat16",
  "text.query_template": "query: {text}", "text.passage_template": "passage: {text}", "train.simans_source": "bm25",
  "index.search_parameters": "nprobe=2",
}  # fmt: skip


class _Stub(Outside):
  """Files that need not be there."""

  def files(self, directory: Any, paths: Any) -> Files:
    return Files(hashes={pathlib.Path(path).name: "0" * 64 for path in paths}, directory=str(directory))


class _Format:
  """A data format whose files need not be there."""

  def files(self, split: str | None = None) -> list[pathlib.Path]:
    return [pathlib.Path(f"{split or 'corpus'}.jsonl")]


class ReferenceGraph(Graph):
  """The graph of a run without data, weights or devices."""

  directory = pathlib.Path("data")
  format = _Format()

  @functools.cached_property
  def tokenizer(self) -> TokenizerInput:
    """A tokenizer that need not be there."""
    return TokenizerInput(scratch=self.scratch) if self.scratch else TokenizerInput(files=_files("tokenizer.json"))

  @functools.cached_property
  def base(self) -> BackboneInput:
    """A backbone that need not be there."""
    return BackboneInput(made=self.scratch) if self.scratch else BackboneInput(files=_files("model.safetensors"))


def _files(name: str) -> Files:
  return Files(hashes={name: "0" * 64})


def other_value(name: str, info: pydantic.fields.FieldInfo, value: Any) -> Any:
  """A valid value of a setting that is not the given one."""
  if name in _OTHERS and _OTHERS[name] != value:
    return _OTHERS[name]
  choices = typing.get_args(info.annotation)
  if typing.get_origin(info.annotation) is typing.Literal:
    return next(choice for choice in choices if choice != value)
  if isinstance(value, bool):
    return not value
  if isinstance(value, int):
    return value + 1
  if isinstance(value, float):
    return 0.5 if value != 0.5 else 0.25
  return f"{value}x" if isinstance(value, str) else (*value, "x")


def changes() -> dict[str, list[str]]:
  """The kinds of artefacts whose inputs each setting changes, directly, in any of the reference runs."""
  kinds: dict[str, dict[str, None]] = {name: {} for name, _ in declared()}
  for mode in MODES.values():
    settings = Settings().replace(**mode)
    before = _inputs(settings)
    for name, info in declared():
      if name in _NEEDS_FILES:
        continue
      after = _inputs(settings.replace(**{name: other_value(name, info, settings.get(name))}))
      kinds[name] |= dict.fromkeys(kind for kind in {**before, **after} if before.get(kind) != after.get(kind))
  kinds["evaluate.retrievers"] = dict.fromkeys(("vectors", "report"))
  return {name: list(changed) for name, changed in kinds.items()}


def _inputs(settings: Settings) -> dict[str, collections.Counter[str]]:
  """Inputs of all artefacts by kind, without the keys of others: what a setting changes there it changes directly."""
  graph, inputs = ReferenceGraph(settings, _Stub()), collections.defaultdict(collections.Counter)
  for node in graph.nodes.values():
    text = json.dumps(described(node.inputs), sort_keys=True)
    inputs[node.kind.name][re.sub(r'"(\w+)/[0-9a-f]{20}"', r'"\1"', text)] += 1
  return dict(inputs)


def document() -> str:
  """docs/configuration.md."""
  changed = changes()
  lines = [
    "# Configuration",
    "",
    "Every setting, from its declaration in `dptdr_jax/settings.py`: set one by `--config.NAME=VALUE`. Generated by",
    "`python -m dptdr_jax.pipeline.reference > docs/configuration.md`.",
    "",
    "*Changes* names the artefacts that another value makes again, with all that is made from them. *Speed* settings",
    "change rounding, speed or memory, and no artefact.",
  ]
  for title, rows in _sections():
    lines += ["", f"## {title}", "", "| setting | default | meaning | changes |", "|---|---|---|---|"]
    lines += [_row(name, info, changed[name]) for name, info in rows]
  return "\n".join(lines) + "\n"


def _sections() -> Iterator[tuple[str, list[tuple[str, pydantic.fields.FieldInfo]]]]:
  grouped: dict[str, list] = {}
  for name, info in declared():
    grouped.setdefault(name.partition(".")[0] if "." in name else "run", []).append((name, info))
  for section, rows in grouped.items():
    about = Settings.model_fields.get(section)
    says = (about.annotation.__doc__ or "").split("\n")[0] if about else "A whole run."
    yield f"{section}: {says[0].lower()}{says[1:].rstrip('.')}", rows


def _row(name: str, info: pydantic.fields.FieldInfo, kinds: list[str]) -> str:
  extra = info.json_schema_extra
  says = info.description + (f" ({extra['source']})" if extra["source"] else "")
  if extra["unit"]:
    says += f"; {extra['unit']}"
  default = "''" if info.default == "" else info.default
  shown = "speed" if is_neutral(info) and not kinds else ", ".join(kinds)
  cells = name, default, says + _limits(info), shown
  return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _limits(info: pydantic.fields.FieldInfo) -> str:
  if typing.get_origin(info.annotation) is typing.Literal:
    return f". One of {', '.join(typing.get_args(info.annotation))}"
  signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
  limits = [f"{sign} {getattr(rule, name):g}" for rule in info.metadata for name, sign in signs.items()
            if getattr(rule, name, None) is not None]  # fmt: skip
  return f". {', '.join(limits)}" if limits else ""


if __name__ == "__main__":
  sys.stdout.write(document())
