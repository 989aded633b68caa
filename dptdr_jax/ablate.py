"""`python -m dptdr_jax.ablate --config=configs/NAME.py --workdir=DIR --arms=plain,rip,unm,dptdr`: runs compared.

An arm is a run with some fields changed; stages that arms have in common, with whatever run is in DIR/runs already, are
done once. DIR/ablation.{json,md,html} has the measures over all seeds with 95 % intervals, the paired difference of
every arm from the first with a randomisation test, and quality against trained parameters; an arm with a cross-encoder
(cross.enabled=True) stands there twice, before and after reranking. Started again, it goes on. An arm whose loss is no
longer finite is left out, and told at the end; the baselines that it was to measure go to another one, and without the
first arm there are no differences. It runs as one process. Other pairs, other measures: `python -m dptdr_jax.compare`.

Arms by name: plain (prompts alone, one round), rip, unm, dptdr (both), finetune, finetune-unm, finetune-dptdr (all
weights, the same steps, at a rate of 3e-5, whatever train.learning_rate is); unm-bm25, unm-dense (one source alone),
unm-raw (no denoising, of round 1's BM25 negatives neither). Any other: --arm="P8: prompt.length=8" --arm="16 negatives:
train.passages=17, train.queries=16"; what it does not say is as in the config.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import pathlib
import sys
from collections.abc import Collection, Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from dptdr_jax import pipeline
from dptdr_jax.core import commands, files, manifest, preemption, progress, remote
from dptdr_jax.core.errors import DptdrError, InputError, PassingError
from dptdr_jax.stages import common, comparison, evaluate, order, prepare, sources, systems

_PLAIN = {"pretrain.enabled": False, "rounds": 1, "train.refresh_every": 0}
_TUNED = {"prompt.kind": "none", "train.learning_rate": 3e-5}
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
    "pretrain.enabled": False, "rounds": 2, "mine.same_text": False, "mine.near_duplicate": 0.0,
    "mine.bm25.relative_margin": 0.0, "mine.bm25.absolute_margin": 0.0,
    "mine.dense.relative_margin": 0.0, "mine.dense.absolute_margin": 0.0,
    "mine.outside.relative_margin": 0.0, "mine.outside.absolute_margin": 0.0,
    "mine.cross_encoder": False, "mine.pseudo_positives": False,
  },
}  # fmt: skip


def main(_: list[str]) -> int:
  """Runs what is not yet done, then compares; exit status as of `dptdr_jax.main`."""
  preemption.install()
  given = flags.FLAGS
  try:
    if remote.is_remote(given.workdir):
      raise InputError("an ablation works on local files", path=given.workdir, fix="Name a local --workdir")
    arms, seeds = chosen(given.arms, given.arm), seeds_of(given.seeds)
    ablate(given.config, pathlib.Path(given.workdir), arms, seeds, given.one_seed, given.measure)
  except preemption.Preempted as stop:
    sys.stderr.write(f"stopped by SIGTERM: {stop}; the same command goes on from there\n")
    return preemption.EXIT_STATUS
  except DptdrError as error:
    sys.stderr.write(f"error: {error}\n")
    return 1 if isinstance(error, PassingError) else 2
  return 0


def seeds_of(texts: list[str]) -> list[int]:
  """Seeds as they are written.

  Raises:
    InputError: none, one that is no whole number, or one that is there twice.
  """
  try:
    found = [int(text) for text in texts]
  except ValueError:
    found = []
  if not found or len(set(found)) < len(found):
    raise InputError("seeds are whole numbers, no two of them the same", value=texts, fix="Name some: --seeds=0,1,2")
  return found


def chosen(names: list[str], own: list[str]) -> dict[str, dict]:
  """Arms by name, with their changed fields.

  Raises:
    InputError: an unknown name, one that is there twice, or fields that cannot be read.
  """
  if unknown := [name for name in names if name not in ARMS]:
    raise InputError("no such arm", value=unknown, fix=f"Known: {', '.join(ARMS)}; or --arm='NAME: field=value'")
  if len(set(names)) < len(names):
    raise InputError("an arm is named twice", value=names)
  found = {name: ARMS[name] for name in names}
  for text in own:
    name, colon, fields = text.partition(":")
    if not colon or name.strip() in found:
      raise InputError("an arm is 'NAME: field=value, …', with a name of its own", value=text)
    if name.strip() in comparison.BASELINES.values() or name.strip().endswith(comparison.RERANKED):
      raise InputError("the table has a row of this name", value=name.strip(), fix="Give the arm another one")
    found[name.strip()] = _fields(fields, text)
    if "seed" in found[name.strip()]:
      raise InputError("an arm has the seeds of --seeds", value=text)
  if not found:
    raise InputError("no arms", fix="Name some: --arms=plain,rip,unm,dptdr")
  return found


def _fields(text: str, whole: str) -> dict:
  """'a.b=1, c=(1, 2)' → {'a.b': 1, 'c': (1, 2)}; what is no literal is a string."""
  found, rest = {}, text.strip()
  for part in _split(rest):
    field, equals, value = part.partition("=")
    if not equals:
      raise InputError("an arm's fields are field=value", value=whole)
    try:
      found[field.strip()] = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
      found[field.strip()] = value.strip()
  return found


def _split(text: str) -> list[str]:
  """Cuts at commas outside of brackets."""
  parts, depth = [""], 0
  for letter in text:
    depth += (letter in "([") - (letter in ")]")
    if letter == "," and not depth:
      parts.append("")
    else:
      parts[-1] += letter
  return [part for part in parts if part.strip()]


def configured(config: ConfigDict, fields: dict, seed: int) -> ConfigDict:
  """The config of one run of an arm.

  Raises:
    InputError: a field that the config does not have, or a value of another type.
  """
  changed = config.copy_and_resolve_references()
  changed.lock()  # an unknown field is an error
  for field, value in fields.items():
    try:
      changed.update_from_flattened_dict({field: value})
    except (KeyError, TypeError) as error:
      told = str(error.args[0]).splitlines()[-1].strip()  # 'Did you mean …', or what type is wanted
      raise InputError(f"an arm's field cannot be set ({told})", value=f"{field}={value}") from None
  if not changed.pretrain.enabled and "pretrain.tokenizer" not in fields:
    changed.pretrain.tokenizer = "backbone"  # the arm is of the backbone that is named
  if not sources.mines_with_retriever(changed):  # nothing is mined that these could denoise
    for name in ("cross_encoder", "pseudo_positives"):
      changed.mine[name] &= f"mine.{name}" in fields  # what the arm itself says is checked
    changed.mine.runs = changed.mine.runs if common.mines_first(changed) else ()
  sources.check_names(changed.mine.retrievers)
  there, asked = sources.retrievers(changed), changed.mine.retrievers
  changed.mine.retrievers = tuple(name for name in asked if name in there)
  if changed.train.simans_source in set(asked) - set(changed.mine.retrievers):
    changed.train.simans_source = sources.DENSE  # nothing that is there has its scores, so that all is drawn at random
  changed.seed = seed
  return changed


@contextlib.contextmanager
def _of_arm(name: str) -> Iterator[None]:
  """Names the arm in what is wrong with it."""
  try:
    yield
  except InputError as error:
    raise InputError(f"arm {name}: {error}") from error


def _baselines_once(
  configs: Sequence[ConfigDict], directories: Sequence[pathlib.Path], failed: Collection[int] = ()
) -> list[ConfigDict]:
  """The configs with BM25 and saved retrievers left to the first run that asks for them, and the untuned backbone to
  the first that shows it before and after pretraining; none is left to a run that has failed.

  What a run has measured stays with it: an arm that is added, or named before it, makes nothing anew.
  """
  made = [config.copy_and_resolve_references() for config in configs]
  have = [_measured_baselines(directory) for directory in directories]
  for baseline in ("bm25", "retrievers", "backbone"):
    able = [run for run, config in enumerate(configs) if run not in failed and config.evaluate[baseline]]
    if baseline == "backbone":
      able = [run for run in able if configs[run].pretrain.enabled] or able
    shown = next((run for run in able if baseline in have[run]), able[0] if able else None)
    for run, config in enumerate(made):
      if run != shown and baseline not in have[run]:
        config.evaluate[baseline] = () if baseline == "retrievers" else False
  return made


def _measured_baselines(directory: pathlib.Path) -> set[str]:
  """Those of 'bm25', 'backbone' and 'retrievers' that a run's finished evaluation has."""
  encoded, made = (manifest.read(directory / stage / manifest.NAME) for stage in ("encode", "evaluate"))
  found = {name for name in ("bm25", "backbone") if made and made["made_from"]["config"]["evaluate"][name]}
  return found | ({"retrievers"} if made and encoded and encoded["made_from"]["files"].get("retrievers") else set())


def ablate(
  config: ConfigDict, workdir: pathlib.Path, arms: dict[str, dict], seeds: list[int], one_seed: list[str], measure: str
) -> None:
  """Runs every arm with every seed and writes the comparison, anew after each run.

  Raises:
    InputError: whatever can be known to fail before any work is done, in any arm.
  """
  if unknown := [name for name in one_seed if name not in arms]:
    raise InputError("one_seed names arms of this ablation", value=unknown, fix=f"Arms: {', '.join(arms)}")
  planned = []
  for seed, (name, fields) in itertools.product(seeds, arms.items()):
    if seed == seeds[0] or name not in one_seed:
      with _of_arm(name):
        planned.append((name, seed, configured(config, fields, seed)))
  runs = workdir / "runs"
  directories = [runs / f"{_safe(name)}-{seed}" for name, seed, _ in planned]
  asked = [changed for _, _, changed in planned]
  configs = _baselines_once(asked, directories)
  if len(set(directories)) < len(directories):
    raise InputError("two arms have names that are the same but for signs", value=list(arms))
  named = {str(split): evaluate.name_on(config, str(split), measure) for split in config.evaluate.splits}
  for (name, _, changed), directory in zip(planned, directories, strict=True):
    with _of_arm(name):
      if changed.evaluate.measures != config.evaluate.measures:
        raise InputError("arms are compared by the measures of the config", value=changed.evaluate.measures)
      _check(changed, directory, measure, named, arms)
  done: dict[int, comparison.Done] = {}
  failed: dict[int, DptdrError] = {}
  waiting = list(range(len(planned)))
  while waiting:
    run = waiting.pop(0)
    (name, seed, _), changed, directory = planned[run], configs[run], directories[run]
    again = ", again with baselines of one that failed" if run in done else ""
    progress.say(f"{name}, seed {seed} ({run + 1} of {len(planned)}{again})")
    others = [other for other in sorted({*directories, *runs.glob("*")}) if other != directory]
    if linked := pipeline.share(changed, directory, others):
      progress.say(f"  shared with other arms: {', '.join(linked)}")
    try:
      pipeline.run(changed, directory)
    except (InputError, PassingError):
      raise
    except DptdrError as error:  # a loss that is not finite, say: no reason for the others to wait
      failed[run] = error
      if done.pop(run, None) and done:
        comparison.write(workdir, list(done.values()), named, arms)
      progress.say(f"  failed: {error}")
      before, configs = configs, _baselines_once(asked, directories, failed)
      waiting = sorted({*waiting, *(other for other in done if configs[other] != before[other])})
      continue
    done[run] = comparison.Done(name, seed, changed.rounds, directory)
    comparison.write(workdir, list(done.values()), named, arms)
  if done:
    progress.say(files.open_text(workdir / "ablation.md").read())
  if failed:
    told = [f"{planned[run][0]}, seed {planned[run][1]} failed: {error}" for run, error in failed.items()]
    raise DptdrError("; ".join(told))


def _check(
  config: ConfigDict, directory: pathlib.Path, measure: str, named: dict[str, str], arms: dict[str, dict]
) -> None:
  """Raises InputError for what can be known to fail in an arm, or cannot be compared."""
  order.check(config)
  if not common.has_queries(config):
    raise InputError("arms are compared by queries, and this data has none", value=config.data.source)
  if clash := [name for name in systems.saved(config) if name in arms]:
    raise InputError("an arm and one of evaluate.retrievers have one name", value=clash)
  if not config.rounds:
    raise InputError("arms are compared by the retrievers that they train, and rounds is 0")
  prepare.outside_files(config)
  for split, name in named.items():
    if split not in config.evaluate.splits or evaluate.name_on(config, split, measure) != name:
      raise InputError(f"the comparison is by {name} on {split}, which the arm does not measure")
  if manifest.read(directory / "evaluate" / manifest.NAME) is None:  # what is done needs none of these devices
    for stage in order.stages(config):
      stage.fits(config)


def _safe(name: str) -> str:
  """A name as a directory's."""
  return "".join(letter if letter.isalnum() else "-" for letter in name)


def define() -> None:
  """Defines the flags: not on import, where two commands in one process would clash."""
  config_flags.DEFINE_config_file("config", None, "Config file; --config.a.b=v overrides a field of all arms.")
  flags.DEFINE_string("workdir", None, "Directory of all runs and of the comparison.")
  flags.DEFINE_list("arms", [], "Names of arms, the first one is what the others are compared with.")
  flags.DEFINE_multi_string("arm", [], "An arm of your own: 'NAME: field=value, field=value'.")
  flags.DEFINE_list("seeds", ["0"], "Seeds of each arm.")
  flags.DEFINE_list("one_seed", [], "Arms that run with the first seed alone.")
  flags.DEFINE_string("measure", "RR@10", "What the tests and the plot are about.")


if __name__ == "__main__":
  define()
  commands.start(main, ["config", "workdir"])
