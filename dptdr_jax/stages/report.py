"""report: DIR/report.html (measures, curves, queries with their top passages) and the table that a run ends with."""

from __future__ import annotations

import html
import json
import pathlib
from collections.abc import Mapping

from ml_collections import ConfigDict

from dptdr_jax.core import files
from dptdr_jax.stages import common, drawing, negatives_shown
from dptdr_jax.stages.layout import Layout

_COLUMNS = 3  # of curves
CURVES = {
  "loss": "Loss",
  "accuracy": "Accuracy in the batch",
  "gradient_norm": "Gradient norm",
  "learning_rate": "Learning rate",
  "contrastive_loss": "Loss of the contrast",
  "mlm_loss": "Loss of the language model",
  "mlm_accuracy": "Accuracy of the language model",
  "alignment": "Alignment (lower is better)",
  "uniformity": "Uniformity (lower is better)",
  "tokens_per_second": "Tokens per second",
}


def run(config: ConfigDict, workdir: files.Path) -> None:
  """Writes DIR/report.html: measures, curves, and the examples that `evaluate` chose."""
  layout = Layout.of(workdir)
  body = [f"<h1>{html.escape(layout.root.resolve().name)}</h1>"]
  pretrained = [_curves(layout.pretrain, "Pretraining")] if config.pretrain.enabled else []
  if common.has_queries(config):
    body += _measured(config, layout, pretrained)
  else:
    body += [f"<p>{html.escape(common.origin(config, layout))}</p>", *pretrained]
  with files.atomic_path(layout.report) as partial:
    page = _PAGE.format(title=html.escape(layout.root.resolve().name), body="\n".join(body))
    partial.write_text(page, encoding="utf-8")


def _measured(config: ConfigDict, layout: Layout, pretrained: list[str]) -> list[str]:
  """The sections of a run that has been evaluated."""
  results, summary = files.read_json(layout.results), files.read_json(layout.summary)
  return [
    _facts(summary),
    _measures(results, summary),
    *pretrained,
    *(_curves(layout.train(number), f"Training, round {number}") for number in range(1, summary["rounds"] + 1)),
    *([_curves(layout.stage("cross"), "Cross-encoder")] if config.cross.enabled else []),
    *(part for number in range(1, config.rounds + 1) for part in negatives(config, layout, number)),
    _examples(files.read_json(layout.examples)),
  ]


def negatives(config: ConfigDict, layout: Layout, number: int) -> list[str]:
  """Sections about the negatives of round `number`: what was mined before it, and while it trained.

  Of more than one generation there is a table, and all about the first and the last.
  """
  users = [f"round {number}"] if number > 1 or common.draws_from_bm25(config) else []
  if number == 1 and config.cross.enabled and config.cross.negatives == "bm25":
    users.append("the cross-encoder")
  parts = []
  if users:
    title = f"Negatives of {' and '.join(users)}"
    parts.append(negatives_shown.section(title, files.read_json(layout.mining(number - 1))))
  found = _generations(config, layout, number)
  if len(found) > 1:
    parts.append(negatives_shown.overview(f"Negatives mined while round {number} trained", found))
  shown = sorted({min(found), max(found)}) if found else []
  parts += [negatives_shown.section(f"Negatives of round {number} from step {step:,}", found[step]) for step in shown]
  return parts


def _generations(config: ConfigDict, layout: Layout, number: int) -> dict[int, Mapping]:
  """What was mined while a round trained, by the step from which it held."""
  every, found, which = config.train.refresh_every, {}, 0
  while every and (path := layout.generation(number, which) / "mining.json").exists():
    found[(which + 1) * every] = files.read_json(path)
    which += 1
  return found


def table(config: ConfigDict, layout: Layout, seconds: Mapping[str, float]) -> str:
  """Returns the table that a run ends with; of one without queries, where its backbone is.

  Args:
    config: of the run.
    layout: its paths; its stages are done.
    seconds: time of each stage.
  """
  lines, ended = [], ["time: " + " · ".join(f"{name} {value:,.0f} s" for name, value in seconds.items())]
  if not common.has_queries(config):
    return "\n".join([f"backbone: {layout.pretrained}", *ended, f"report: {layout.report}"])
  results, summary = files.read_json(layout.results), files.read_json(layout.summary)
  for split in _splits(results):
    names = _measure_names(results, split)
    systems = [name for name in results if split in results[name]]
    lines.append(f"{split} ({summary['queries'][split]:,} queries, {summary['passages']:,} passages)")
    widths = {name: max(11, len(name) + 2) for name in names}
    lines.append(f"  {'':<35}" + "".join(f"{name:>{widths[name]}}" for name in names))
    for system in systems:
      found = results[system][split]
      figures = "".join(f"{found.get(name, float('nan')):>{widths[name]}.4f}" for name in names)
      lines.append(f"  {summary['labels'].get(system, system):<35}{figures}")
  return "\n".join([*lines, *_share(summary), *ended, f"report: {layout.report}"])


def _share(summary: Mapping) -> list[str]:
  """What was trained, where something was."""
  trained, whole = summary.get("trained_parameters"), summary["backbone_parameters"]
  return [f"trained: {trained:,} parameters, {trained / whole:.2%} of the backbone's {whole:,}"] if trained else []


def _splits(results: Mapping) -> list[str]:
  return list(dict.fromkeys(split for system in results.values() for split in system))


def _measure_names(results: Mapping, split: str) -> list[str]:
  return list(dict.fromkeys(name for system in results.values() for name in system.get(split, {})))


def _facts(summary: Mapping) -> str:
  rows = "".join(f"<li>{html.escape(line)}</li>" for line in [*summary["facts"], *_share(summary)])
  return f"<ul>{rows}</ul>"


def _measures(results: Mapping, summary: Mapping) -> str:
  parts = ["<h2>Measures</h2>"]
  for split in _splits(results):
    names = _measure_names(results, split)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = []
    for system in results:
      if split not in results[system]:
        continue
      cells = "".join(_cell(results[system][split], summary["intervals"][system][split], name) for name in names)
      rows.append(f"<tr><th>{html.escape(summary['labels'].get(system, system))}</th>{cells}</tr>")
    parts.append(
      f"<h3>{html.escape(split)}: {summary['queries'][split]:,} queries, {summary['passages']:,} passages</h3>"
      f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
    )
  parts.append("<p class=note>In brackets: 95 % bootstrap interval over queries.</p>")
  return "\n".join(parts)


def _cell(figures: Mapping, intervals: Mapping, name: str) -> str:
  if name not in figures:
    return "<td>–</td>"
  low, high = intervals[name]
  return f"<td>{figures[name]:.4f}<br><small>[{low:.3f}, {high:.3f}]</small></td>"


def _curves(directory: pathlib.Path, title: str) -> str:
  with open(directory / "metrics.jsonl", encoding="utf-8") as stream:
    records = [json.loads(line) for line in stream]
  panels = [name for name in CURVES if any(name in record for record in records)]
  panels += sorted({name for record in records for name in record if name.startswith("dev/")})
  lines = -(-len(panels) // _COLUMNS)
  figure, axes = drawing.panels(lines, _COLUMNS, (4.2, 2.8))
  for axis in axes.flat[len(panels) :]:
    axis.set_visible(False)
  for axis, name in zip(axes.flat, panels, strict=False):
    points = [(record["step"], record[name]) for record in records if name in record]
    axis.plot(*zip(*points, strict=True), marker="o" if name.startswith("dev/") else None, linewidth=1.2, markersize=3)
    axis.set_title(CURVES.get(name, name), fontsize=9)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
  return f"<h2>{title}</h2>{drawing.svg(figure)}"


def _examples(examples: list[Mapping]) -> str:
  parts = ["<h2>Queries and their top passages</h2>"]
  for example in examples:
    verdict = "right" if example["right"] else "wrong"
    items = "".join(_hit(hit) for hit in example["top"])
    wanted = "" if any(hit["relevant"] for hit in example["top"]) else _wanted(example)
    parts.append(
      f"<details open class={verdict}><summary>{html.escape(example['query'])}"
      f" <small>{html.escape(example['split'])} · first relevant at rank {example['rank'] or '–'}</small></summary>"
      f"<ol>{items}</ol>{wanted}</details>"
    )
  return "\n".join(parts)


def _hit(hit: Mapping) -> str:
  mark = "relevant" if hit["relevant"] else "other"
  return (
    f"<li class={mark}><b>{html.escape(hit['title'] or hit['id'])}</b> <small>{hit['score']:.3f}</small> "
    f"{html.escape(hit['text'])}</li>"
  )


def _wanted(example: Mapping) -> str:
  wanted = example["wanted"]
  if wanted is None:
    return ""
  name, text = html.escape(wanted["title"] or wanted["id"]), html.escape(wanted["text"])
  return f"<p class=note>wanted: <b>{name}</b> {text}</p>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }}
table {{ border-collapse: collapse }} td, th {{ padding: .3rem .8rem; text-align: right }}
tr {{ border-bottom: 1px solid #d8dee4 }}
th:first-child {{ text-align: left }} small, .note {{ color: #59636e }} svg {{ max-width: 100%; height: auto }}
details {{ margin: .6rem 0; padding: .4rem .8rem; border-left: 4px solid #cf222e; background: #f6f8fa }}
.warning {{ color: #9a6700; font-weight: 600 }}
details.right {{ border-color: #1a7f37 }} li.relevant {{ color: #1a7f37 }} ol {{ margin: .3rem 0 }}
</style></head><body>
{body}
</body></html>
"""
