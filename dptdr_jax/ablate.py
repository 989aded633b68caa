"""`python -m dptdr_jax.ablate --config=configs/NAME.py --workdir=DIR --arms=plain,rip,unm,dptdr`: runs compared.

An arm is a run with some settings changed. All runs share the store DIR/store, so that what they have in common is made
once. DIR/ablation.{json,md,html} has the measures over all seeds with 95 % intervals, the paired difference of each arm
from the first with a randomisation test, and quality against trained parameters. An arm has a row as it is, one fused
with BM25, and one reranked if it has a cross-encoder. Started again, it resumes. An arm whose loss is not finite is
left out, and named at the end. It runs as one process. Other pairs, other measures: `python -m dptdr_jax.compare`.

Arms by name: plain (prompts alone, one round), rip, unm, dptdr (both). finetune, finetune-unm and finetune-dptdr train
all weights for the same steps, at a rate of 3e-5 whatever train.learning_rate is. unm-bm25 and unm-dense have one
source of negatives. unm-raw denoises nothing, not even round 1's BM25 negatives. Any other: --arm="P8: prompt.length=8"
--arm="16 negatives: train.passages=17, train.queries=16". Other settings are as in the config.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Iterator, Mapping

from absl import flags
from ml_collections import ConfigDict, config_flags

from dptdr_jax.core import commands, files, marks, preemption, progress, remote
from dptdr_jax.core.errors import DptdrError, InputError, RetryableError
from dptdr_jax.core.store import Store
from dptdr_jax.pipeline import evaluate, rules, run, sources, systems
from dptdr_jax.pipeline.graph import Graph, mines_first
from dptdr_jax.reporting import comparison
from dptdr_jax.settings import Settings

_BASELINES = {"bm25": "BM25", "backbone": "untuned backbone", "pretrain": "pretrained backbone"}
_FUSED, _RERANKED = ", fused", ", reranked"
_COMMA = re.compile(r",(?![^(\[]*[)\]])")  # outside of brackets
_PLAIN = {"pretrain.enabled": False, "rounds": 1, "train.refresh_every": 0}
_TUNED = {"prompt.kind": "none", "prompt.tied": True, "train.learning_rate": 3e-5}
ARMS: dict[str, dict] = {
  "plain": _PLAIN,
  "rip": _PLAIN | {"pretrain.enabled": True},
  "unm": {"pretrain.enabled": False, "rounds": 2},
  "dptdr": {"pretrain.enabled": True, "rounds": 2},
  "finetune": _PLAIN | _TUNED,
  "finetune-unm": _TUNED | {"pretrain.enabled": False, "rounds": 2},
  "finetune-dptdr": _TUNED | {"pretrain.enabled": True, "rounds": 2},
  "unm-bm25": {"pretrain.enabled": False, "rounds": 2, "mine.sources": ("bm25",)},
  "unm-dense": {"pretrain.enabled": False, "rounds": 2, "mine.sources": ("dense",)},
  "unm-raw": {
    "pretrain.enabled": False, "rounds": 2, "mine.same_text": False, "mine.bm25.relative_margin": 0.0,
    "mine.dense.relative_margin": 0.0, "mine.runs_relative_margin": 0.0, "mine.cross_encoder": False,
    "mine.pseudo_positives": False,
  },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Planned:
  """One run: an arm with a seed."""

  arm: str
  seed: int
  settings: Settings
  workdir: pathlib.Path


def main(_: list[str]) -> int:
  """Runs what is not yet done, then compares; exit status as of `dptdr_jax.main`."""
  preemption.install()
  given = flags.FLAGS

  def work() -> None:
    if remote.is_remote(given.workdir):
      raise InputError("an ablation works on local files", path=given.workdir, fix="Name a local --workdir")
    arms, seeds = chosen(given.arms, given.arm), seeds_of(given.seeds)
    ablate(given.config, pathlib.Path(given.workdir).expanduser(), arms, seeds, given.one_seed, given.measure)

  return commands.status_of(work)


def seeds_of(texts: list[str]) -> list[int]:
  """Seeds as they are written.

  Raises:
    InputError: none, one that is no whole number, or one that is there twice.
  """
  try:
    seeds = [int(text) for text in texts]
  except ValueError:
    seeds = []
  if not seeds or len(set(seeds)) < len(seeds):
    raise InputError("seeds are whole numbers, no two of them the same", value=texts, fix="Name some: --seeds=0,1,2")
  return seeds


def chosen(names: list[str], own: list[str]) -> dict[str, dict]:
  """Arms by name, with their changed settings.

  Raises:
    InputError: an unknown name, one that is there twice, or settings that cannot be read.
  """
  if unknown := [name for name in names if name not in ARMS]:
    raise InputError("no such arm", value=unknown, fix=f"Known: {', '.join(ARMS)}; or --arm='NAME: setting=value'")
  if len(set(names)) < len(names):
    raise InputError("an arm is named twice", value=names)
  arms = {name: ARMS[name] for name in names}
  for text in own:
    name, colon, fields = text.partition(":")
    name = name.strip()
    if not colon or name in arms:
      raise InputError("an arm is 'NAME: setting=value, …', with a name of its own", value=text)
    if name in _BASELINES.values() or name.endswith((_FUSED, _RERANKED)):
      raise InputError("the table has a row of this name", value=name, fix="Give the arm another one")
    arms[name] = _fields(fields, text)
    if "seed" in arms[name]:
      raise InputError("the seeds of an arm are those of --seeds", value=text)
  if not arms:
    raise InputError("no arms", fix="Name some: --arms=plain,rip,unm,dptdr")
  return arms


def _fields(text: str, whole: str) -> dict:
  """'a.b=1, c=(1, 2)' → {'a.b': 1, 'c': (1, 2)}; what is no literal is a string."""
  fields = {}
  for part in filter(str.strip, _COMMA.split(text)):
    name, equals, value = part.partition("=")
    if not equals:
      raise InputError("an arm's settings are setting=value", value=whole)
    try:
      fields[name.strip()] = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
      fields[name.strip()] = value.strip()
  return fields


def configured(base: Settings, fields: Mapping, seed: int) -> Settings:
  """The settings of one run of an arm; what the config asks for and the arm has no use for is left out.

  Raises:
    InputError: a setting that does not exist, or a value that it cannot have.
  """
  changed = base.replace(**fields, seed=seed)
  further: dict = {}
  if not changed.pretrain.enabled and "pretrain.tokenizer" not in fields:
    further["pretrain.tokenizer"] = "backbone"
  if not sources.mines_with_retriever(changed):  # nothing is mined that these could denoise
    further |= {f"mine.{name}": False for name in ("cross_encoder", "pseudo_positives") if f"mine.{name}" not in fields}
    further |= {} if mines_first(changed) else {"mine.runs": ()}
  return changed.replace(**further)


def ablate(
  config: ConfigDict, workdir: pathlib.Path, arms: dict[str, dict], seeds: list[int], one_seed: list[str], measure: str
) -> None:
  """Runs every arm with every seed, and writes the comparison after each run.

  Raises:
    InputError: whatever can be known to fail before any work, in any arm; `workdir` holds something else.
  """
  base = Settings.of(config)
  if unknown := [name for name in one_seed if name not in arms]:
    raise InputError("--one_seed names no arm of this ablation", value=unknown, fix=f"Arms: {', '.join(arms)}")
  planned = []
  for seed, (name, fields) in itertools.product(seeds, arms.items()):
    if seed == seeds[0] or name not in one_seed:
      with _of_arm(name):
        directory = workdir / "runs" / (re.sub(r"[\W_]", "-", name) + f"-{seed}")
        planned.append(Planned(name, seed, configured(base, fields, seed), directory))
  if len({one.workdir for one in planned}) < len(planned):
    raise InputError("two arms have names that are the same but for signs", value=list(arms))
  named = {split: _measure_on(base, split, measure) for split in base.evaluate.splits}
  for one in planned:
    with _of_arm(one.arm):
      _check(one.settings, base, named, measure, arms)
  marks.claim(workdir, "dptdr_jax ablation")
  done: list[tuple[Planned, Graph]] = []
  failed: list[str] = []
  for number, one in enumerate(planned, 1):
    progress.say(f"{one.arm}, seed {one.seed} ({number} of {len(planned)})")
    try:
      graph = run.run(ConfigDict(one.settings.model_dump()), one.workdir, store=workdir / "store")
    except (InputError, RetryableError):
      raise
    except DptdrError as error:  # a loss that is not finite, say: no reason for the other arms to wait
      failed.append(f"{one.arm}, seed {one.seed} failed: {error}")
      progress.say(f"  failed: {error}")
      continue
    done.append((one, graph))
    _write(workdir, done, named, arms)
  if done:
    progress.say((workdir / "ablation.md").read_text(encoding="utf-8"))
  if failed:
    raise DptdrError("; ".join(failed))


@contextlib.contextmanager
def _of_arm(name: str) -> Iterator[None]:
  """Names the arm in what is wrong with it."""
  try:
    yield
  except InputError as error:
    raise InputError(f"arm {name}: {error}") from error


def _measure_on(settings: Settings, split: str, measure: str) -> str:
  if measure not in (known := settings.evaluate.measures):
    raise InputError("--measure is not in evaluate.measures", value=measure, fix=f"There are {', '.join(known)}")
  return evaluate.name_on(measure, split in settings.evaluate.graded_splits)


def _check(settings: Settings, base: Settings, named: dict[str, str], measure: str, arms: dict[str, dict]) -> None:
  """Raises InputError for what can be known to fail in an arm, or cannot be compared."""
  if settings.evaluate.measures != base.evaluate.measures:
    raise InputError("arms are compared by the measures of the config", value=settings.evaluate.measures)
  rules.check(settings)
  if settings.data.format == "text":
    raise InputError("arms are compared by queries, and this data has none", value=settings.data.format)
  if clash := [one.name for one in systems.systems(settings) if one.kind == "saved" and one.name in arms]:
    raise InputError("an arm and one of evaluate.retrievers have one name", value=clash)
  if not settings.rounds:
    raise InputError("arms are compared by the retrievers that they train, and rounds is 0")
  for split, name in named.items():
    if split not in settings.evaluate.splits or _measure_on(settings, split, measure) != name:
      raise InputError(f"the comparison is by {name} on {split}, which the arm does not measure")
  stages = {"cross"} if settings.cross.enabled else set()
  rules.check_devices(settings, {"train", *stages, *({"pretrain"} if settings.pretrain.enabled else ())})


def _write(
  workdir: pathlib.Path, done: list[tuple[Planned, Graph]], named: dict[str, str], arms: dict[str, dict]
) -> None:
  """Writes ablation.json, ablation.md and ablation.html of the runs so far."""
  store, reference = Store(workdir / "store"), next(iter(arms))
  compared = {}
  for split, measure in named.items():
    baselines, by_arm = _values(store, done, split)
    ordered = {
      name: by_arm[name] for arm in arms for name in (arm, f"{arm}{_FUSED}", f"{arm}{_RERANKED}") if name in by_arm
    }
    compared[split] = comparison.compare(baselines, ordered, measure, reference)
  there = any(one.arm == reference for one, _ in done)
  files.write_json(workdir / "ablation.json", {**compared, "arms": arms, "reference": reference if there else None})
  for name, text in (("md", comparison.markdown), ("html", comparison.html)):
    with files.atomic_path(workdir / f"ablation.{name}") as partial:
      partial.write_text(text(compared, named, reference), encoding="utf-8")


def _values(store: Store, done: list[tuple[Planned, Graph]], split: str) -> tuple[dict, dict[str, comparison.Arm]]:
  """Measures of every query: of the baselines, and of the arms by seed."""
  baselines: dict[str, dict] = {}
  arms: dict[str, tuple[dict, int, list[str]]] = {}
  for one, graph in done:
    summary = files.read_json(store.path(graph.report) / "summary.json")
    for system in systems.systems(one.settings):
      rows = {"trained": one.arm, "fused": f"{one.arm}{_FUSED}", "reranked": f"{one.arm}{_RERANKED}"}
      if system.kind == "trained" and system.number < one.settings.rounds:
        continue
      ids, values = evaluate.measured(store.path(graph.measured[system.name][split]))
      if system.kind not in rows or system.name == systems.FUSED_BACKBONE:
        baselines.setdefault(_BASELINES.get(system.name, system.label), values)
        continue
      count = summary["trained_parameters"] + (summary["cross_parameters"] if system.kind == "reranked" else 0)
      arms.setdefault(rows[system.kind], ({}, count, ids))[0][one.seed] = values
  return baselines, {name: comparison.Arm(*parts) for name, parts in arms.items()}


def define() -> None:
  """Defines the flags: not on import, where two commands in one process would clash."""
  config_flags.DEFINE_config_file("config", None, "Config file; --config.a.b=v overrides a setting of all arms.")
  flags.DEFINE_string("workdir", None, "Directory of all runs and of the comparison.")
  flags.DEFINE_list("arms", [], "Names of arms; the others are compared with the first.")
  flags.DEFINE_multi_string("arm", [], "An arm of your own: 'NAME: setting=value, setting=value'.")
  flags.DEFINE_list("seeds", ["0"], "Seeds of each arm.")
  flags.DEFINE_list("one_seed", [], "Arms that run with the first seed alone.")
  flags.DEFINE_string("measure", "RR@10", "What the tests and the plot are about.")


if __name__ == "__main__":
  define()
  commands.start(main, ["config", "workdir"])
