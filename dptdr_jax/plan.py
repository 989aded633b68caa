"""`python -m dptdr_jax.plan --config=configs/NAME.py --topology=v5e:4x4`: a run's steps, compiled for absent chips.

The compiler is the TPU's own, from the libtpu package (`pip install dptdr_jax[plan]`); `--topology=cpu:8` takes the
CPU's, for any number of simulated devices. Nothing runs. Printed for each step, a chip: memory against what the chip
has, operations, collectives with their bytes, and a time by roofline; of several topologies (--topology=A,B) a table in
Markdown, too. Exit status 0: everything fits; 1: something does not (what would is printed); 2: an error, of input or
any other.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from dptdr_jax.core import commands, progress
from dptdr_jax.core.errors import DptdrError, InputError
from dptdr_jax.reporting import tables
from dptdr_jax.settings import Settings

GIB = 2**30
_COLUMNS = [
  "topology", "step", "memory a chip, GiB (arguments, temporaries)", "TFLOP a chip", "between chips, MiB", "s a step",
  "steps", "hours",
]  # fmt: skip
_FEW = 8  # so many collectives are printed one by one
_SIZES = {"msmarco": (8_841_823, 502_939), "nq": (21_015_324, 58_880)}  # passages, training queries


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a chip has: bfloat16 operations a second, bytes of memory, bytes a second of memory and of all its links.

  From Google Cloud's system architecture pages of the four generations.
  """

  flops: float
  memory: float
  bandwidth: float
  links: float


CHIPS = {
  "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9),
  "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9),
  "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9),
  "v6e": Chip(918e12, 32 * GIB, 1640e9, 448e9),
}


_OPTIONS = {"v4": {"chip_config_name": "megacore"}}  # both cores of a chip as one device, as jax has them on a machine


@dataclasses.dataclass(frozen=True)
class Figures:
  """One compiled step, a chip.

  Attributes:
    arguments, temporaries: bytes; results lie where the donated arguments were.
    operations: of the matrix products.
    traffic: bytes between memory and chip.
    collectives: (kind, bytes, times, where).
  """

  arguments: int
  temporaries: int
  operations: float
  traffic: int
  collectives: tuple

  @property
  def memory(self) -> int:
    """Bytes in all."""
    return self.arguments + self.temporaries

  def seconds(self, chip: Chip) -> dict[str, float]:
    """Time by what would bound it; a step takes the longest at least, and their sum at most."""
    moved = sum(size * times for _, size, times, _ in self.collectives)
    return {
      "compute": self.operations / chip.flops, "memory": self.traffic / chip.bandwidth, "links": moved / chip.links
    }  # fmt: skip

  def bounds(self, chip: Chip) -> tuple[float, float]:
    """Seconds that a step takes at least and at most, by roofline."""
    seconds = self.seconds(chip).values()
    return max(seconds), sum(seconds)


class DoesNotFit(DptdrError):
  """The compiler gave up: bytes needed, where it says so."""


@dataclasses.dataclass(frozen=True)
class Step:
  """A step that can be compiled: `lower()` for a config; the field that cuts it smaller, with its largest value."""

  name: str
  lower: Callable[[Settings], tuple[Any, Any]]  # → (traced, lowered)
  chunk: str
  rows: int  # a chip's share of the batch
  repeats: float  # how often it runs, over all rounds and systems; 0: nothing says so
  epoch: float  # and in a pass over the corpus or the training queries


def main(_: list[str]) -> int:
  """Prints the plan; returns the exit status."""
  given = flags.FLAGS
  try:
    sizes = given.passages, given.queries
    options = {"sizes": sizes, "memory_gib": given.memory_gib}
    return plan(Settings.of(given.config), given.topology, given.steps, **options)
  except DptdrError as error:
    sys.stderr.write(f"error: {error}\n")
  except Exception:  # which Python would end with the status of what does not fit
    traceback.print_exc()
  return 2


def plan(
  settings: Settings,
  topologies: Sequence[str],
  only: Sequence[str] = (),
  *,
  sizes: tuple[int, int] = (0, 0),
  memory_gib: float = 0,
) -> int:
  """Compiles the steps of a config for each topology and prints what they take; 1 where one does not fit, else 0.

  Args:
    only: names of steps; empty: all of the config.
    sizes: passages of the corpus and training queries; 0: those of the benchmark that the config is for.
    memory_gib: of a chip; 0: as the topology has it.
  """
  from dptdr_jax.pipeline import rules

  fits, rows = True, []
  of_topologies = [find_devices(topology) for topology in topologies]
  rules.check(settings, here=False)
  for topology, (family, devices) in zip(topologies, of_topologies, strict=True):
    chip = CHIPS.get(family)
    memory = memory_gib * GIB if memory_gib else (chip.memory if chip else math.inf)
    planned = settings
    if settings.compute_dtype == "auto":
      planned = settings.replace(compute_dtype="float32" if family == "cpu" else "bfloat16")
    for step in find_steps(planned, devices, only, sizes):
      progress.say(f"{step.name}: {len(devices)} × {family}, {step.chunk}={planned.get(step.chunk)}")
      try:
        figures = measure(step, planned, len(devices))
        enough = figures.memory <= memory
        rows.append(report(topology, step, figures, chip, memory))
      except DoesNotFit as error:
        enough = False
        progress.say(f"  does not fit: {error}")
        rows.append([topology, step.name, f"does not fit: {error}", *[""] * (len(_COLUMNS) - 3)])
      if not enough:
        fits = False
        suggest(step, planned, len(devices), memory)
  if len(topologies) > 1:
    progress.say(tables.markdown(_COLUMNS, rows))
  return 0 if fits else 1


def find_devices(topology: str) -> tuple[str, list]:
  """The family ('v5e', …, 'cpu') and the devices, of which none need be here."""
  family, _, shape = topology.partition(":")
  if family == "cpu" and shape.isdigit():
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={shape} {os.environ.get('XLA_FLAGS', '')}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    devices = jax.devices("cpu")
    if len(devices) < int(shape):  # jax has started already, with fewer
      raise InputError(f"only {len(devices)} simulated devices", value=topology, fix="Name the largest cpu:N first")
    return family, devices[: int(shape)]
  if family not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
    raise InputError("unknown topology", value=topology, fix=f"Name one of {', '.join(CHIPS)} and a shape: v5e:4x4")
  # Without these libtpu looks for the machine that it believes to be on, and for a lock on chips that nobody uses here.
  os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "JAX_PLATFORMS": "cpu"}
  os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  from jax.experimental import topologies

  try:
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **_OPTIONS.get(family, {}))
  except Exception as error:  # of many kinds: no libtpu, a shape that does not exist
    reason = str(error).splitlines()[0]
    raise InputError(f"the TPU compiler cannot be had ({reason})", value=topology,
                     fix="pip install 'dptdr_jax[plan]', and a shape that the platform offers") from error  # fmt: skip
  return family, list(described.devices)


def find_steps(settings: Settings, devices: list, only: Sequence[str], sizes: tuple[int, int] = (0, 0)) -> list[Step]:
  """The config's steps, each with the shapes of a full batch.

  How often they run leaves out what train.refresh_every encodes meanwhile, and saved retrievers of other shapes
  (evaluate.retrievers); what mining encodes, evaluation takes over.

  Raises:
    InputError: no such step, or a batch that the devices cannot share.
  """
  from dptdr_jax.pipeline import rules, systems
  from dptdr_jax.runtime import mesh as meshes
  from dptdr_jax.runtime.buckets import ON_ACCELERATOR
  from dptdr_jax.training import shapes

  encoder, dtype, count = rules.encoder_of(settings), settings.compute_dtype, len(devices)

  def lower(make: Callable) -> Callable[[Settings], tuple[Any, Any]]:
    return lambda changed: make(changed, encoder, dtype, meshes.make_mesh(fsdp=changed.fsdp, devices=devices))

  usual = _SIZES.get(settings.data.format, (0, 0))
  passages, queries = (given or known for given, known in zip(sizes, usual, strict=True))
  train, pretrain = settings.train, settings.pretrain
  tokens = settings.encode.batch_tokens or ON_ACCELERATOR
  encoded = max(1, tokens // settings.text.passage_length) * count
  epochs = {"pretrain": passages * 2 / pretrain.spans, "train": queries / train.queries, "encode": passages / encoded}
  untuned = sum(system.kind == "untuned" for system in systems.systems(settings))
  known = {
    "pretrain": Step("pretrain", lower(shapes.pretrain), "pretrain.chunk", pretrain.spans // count,
                     pretrain.steps or pretrain.epochs * epochs["pretrain"], epochs["pretrain"]),
    "train": Step("train", lower(shapes.train), "train.passage_chunk",
                  math.ceil(train.queries * train.passages / count),
                  settings.rounds * (train.steps or train.epochs * epochs["train"]), epochs["train"]),
    "encode": Step("encode", lower(shapes.encode), "encode.batch_tokens", tokens,
                   (untuned + settings.rounds) * epochs["encode"], epochs["encode"]),
  }  # fmt: skip
  if not settings.rounds or settings.data.format == "text":
    del known["train"]
  if settings.data.format == "text":
    del known["encode"]
  wanted = list(only) or [name for name in known if name != "pretrain" or pretrain.enabled]
  if unknown := [name for name in wanted if name not in known]:
    raise InputError("no such step", value=unknown, fix=f"Known: {', '.join(known)}")
  if "pretrain" in wanted and (pretrain.spans < 4 or pretrain.spans % 2 or pretrain.spans % count):
    raise InputError(f"pretrain.spans must be pairs that {count} devices can share evenly", value=pretrain.spans)
  return [known[name] for name in wanted]


def measure(step: Step, settings: Settings, chips: int) -> Figures:
  """Compiles a step.

  Raises:
    DoesNotFit: the compiler ran out of the chip's memory.
  """
  import jax

  from dptdr_jax.runtime import programs

  traced, lowered = step.lower(settings)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    needed = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", str(error))
    raise DoesNotFit(f"the compiler needs {needed[1]} of {needed[2]}" if needed else "out of memory") from None
  memory = compiled.memory_analysis()
  program = programs.Program(compiled.as_text())
  collectives = tuple((made.kind, made.size, made.times, made.where) for made in program.collectives())
  return Figures(
    memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
    memory.temp_size_in_bytes, programs.operations(traced) / chips, program.traffic(), collectives,
  )  # fmt: skip


def report(topology: str, step: Step, figures: Figures, chip: Chip | None, memory: float) -> list[str]:
  """Prints what a step takes; returns the same in the columns of the table."""
  share = f" of {memory / GIB:.0f}" if math.isfinite(memory) else ""
  arguments, temporaries = f"{figures.arguments / GIB:.2f}", f"{figures.temporaries / GIB:.2f}"
  size, work = f"{figures.memory / GIB:.2f}", figures.operations / 1e12
  said = [f"memory   {size} GiB{share + ' GiB' if share else ''}: arguments {arguments}, temporaries {temporaries}",
          f"work     {work:.2f} TFLOP, {figures.traffic / GIB:.1f} GiB moved at most"]  # fmt: skip
  said += _collectives(figures.collectives)
  moved = sum(size * times for _, size, times, _ in figures.collectives)
  row = [topology, step.name, f"{size}{share} ({arguments}, {temporaries})", f"{work:.1f}", f"{moved / 2**20:,.1f}"]
  if chip is None:
    row += [""] * (len(_COLUMNS) - len(row))
  else:
    seconds, (low, high) = figures.seconds(chip), figures.bounds(chip)
    parts = ", ".join(f"{name} {value:.4f}" for name, value in seconds.items())
    bound = max(seconds, key=seconds.get)
    said.append(f"time     {low:.3f} to {high:.3f} s a step by roofline ({parts}); bound by {bound}")
    for name, count in ("epoch", step.epoch), ("run", step.repeats):
      if count:
        said.append(f"{name:<8} {count:,.0f} steps: {low * count / 3600:.2f} to {high * count / 3600:.2f} h")
    hours = f"{low * step.repeats / 3600:.2f} – {high * step.repeats / 3600:.2f}" if step.repeats else ""
    row += [f"{low:.3f} – {high:.3f}", f"{step.repeats:,.0f}" if step.repeats else "", hours]
  progress.say("\n".join(f"  {line}" for line in said))
  return row


def _collectives(made: Sequence[tuple]) -> list[str]:
  """A line for each; of more than a few, as where weights are gathered layer by layer, a line for each kind."""
  if len(made) <= _FEW:
    return [f"{kind:<17}{size / 2**20:9.2f} MiB × {times}  ({where})" for kind, size, times, where in made]
  lines = []
  for kind in sorted({kind for kind, *_ in made}):
    sizes = [(size, times, where) for each, size, times, where in made if each == kind]
    largest, _, where = max(sizes)
    moved, count = sum(size * times for size, times, _ in sizes), sum(times for _, times, _ in sizes)
    lines.append(f"{kind:<17}{moved / 2**20:9.2f} MiB in {count}, the largest {largest / 2**20:.2f} MiB ({where})")
  return lines


def suggest(step: Step, settings: Settings, chips: int, memory: float) -> None:
  """Looks for what fits, and prints it, or what else there is.

  First the largest chunk, by halves. Then more remat: with the config's own chunk where a smaller one would be enough,
  else with the smallest.
  """
  now = settings.get(step.chunk) or step.rows
  sizes = [size for size in _smaller(step.rows) if size < now]
  fitting = next((size for size in sizes if _tell_if_fits(step, settings, {step.chunk: size}, chips, memory)), None)
  chunk = {step.chunk: sizes[-1]} if sizes and fitting is None else {}
  again = [chunk | {f"{step.name}.remat": remat} for remat in _more_remat(step, settings)]
  if any(_tell_if_fits(step, settings, fields, chips, memory) for fields in again) or fitting is not None:
    return
  others = {"pretrain": "a larger fsdp, fewer pretrain.spans",
            "train": "a smaller train.query_chunk, shorter texts, a shorter prompt, fsdp",
            "encode": "shorter texts, fsdp"}[step.name]  # fmt: skip
  tried = f"no chunk of {sizes}" + (" and no remat" if again else "")
  progress.say(f"  {tried} fits. What else helps: {others}; more chips; a chip with more memory")


def _tell_if_fits(step: Step, settings: Settings, fields: Mapping[str, Any], chips: int, memory: float) -> bool:
  """Compiles the step with some fields changed; where it fits, prints them."""
  tried = settings.replace(**fields)
  try:
    figures = measure(step, tried, chips)
  except DoesNotFit:
    return False
  if fits := figures.memory <= memory:
    named = " ".join(f"--config.{name}={value}" for name, value in fields.items())
    progress.say(f"  fits with {named}: {figures.memory / GIB:.2f} GiB")
  return fits


def _more_remat(step: Step, settings: Settings) -> list[str]:
  """The values of remat that compute more again than the step's own, least first."""
  from dptdr_jax.models.encoder import REMAT

  return list(REMAT[REMAT.index(settings.get(f"{step.name}.remat")) + 1 :]) if step.name != "encode" else []


def _smaller(rows: int) -> list[int]:
  """Divisors of a chip's rows, each about half of the one before, largest first."""
  sizes = [rows]
  for size in range(rows - 1, 0, -1):
    if rows % size == 0 and 2 * size <= sizes[-1]:
      sizes.append(size)
  return sizes


def define() -> None:
  """Defines the flags: not on import, where two commands in one process would clash."""
  config_flags.DEFINE_config_file("config", None, "Config file; --config.a.b=v overrides a field.")
  flags.DEFINE_list("topology", None, "Chips: v4:2x2x1, v5e:4x4, v5p:2x2x2, v6e:4x4, …, or cpu:N; several: a table.")
  flags.DEFINE_list("steps", [], "Which of pretrain, train and encode; default: those that the config has.")
  flags.DEFINE_integer("passages", 0, "Passages of the corpus; 0: those of MS MARCO or NQ by data.format.")
  flags.DEFINE_integer("queries", 0, "Training queries; 0: those of MS MARCO or NQ by data.format.")
  flags.DEFINE_float("memory_gib", 0, "Memory of a chip in GiB, where it is not what the topology says.")


if __name__ == "__main__":
  define()
  commands.start(main, ["config", "topology"])
