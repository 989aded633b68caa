"""`python -m dptdr_jax.compare --runs=DIR[:SYSTEM],DIR[:SYSTEM],…`: systems against the first, query by query.

SYSTEM is a name in DIR/results.json; default: the last round's retriever. Printed for every measure that both have:
both means, the difference with its 95 % bootstrap interval over queries, and p of a paired randomisation test
(two-sided, not corrected for several tests). Interval and p are over queries: they say nothing about other seeds.
"""

from __future__ import annotations

import pathlib

import numpy as np
from absl import flags

from dptdr_jax.core import commands, files, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.pipeline import evaluate
from dptdr_jax.reporting import comparison, tables


def main(_: list[str]) -> int:
  """Prints a table; exit status 0, or 2 after an error of input."""
  given = flags.FLAGS
  return commands.status_of(lambda: progress.say(compare(given.runs, given.split, given.measures)))


def compare(named: list[str], split: str, wanted: list[str]) -> str:
  """A Markdown table of the systems after the first against it.

  Args:
    named: 'DIR' or 'DIR:SYSTEM'.
    wanted: measures; []: all that both have.

  Raises:
    InputError: fewer than two, a system or a measure that is not there, or other queries.
  """
  if len(named) < 2:
    raise InputError("at least two systems are compared", value=named, fix="--runs=DIR:SYSTEM,DIR:SYSTEM")
  (reference, (ids, theirs)), *others = [(each, _measured(each, split)) for each in named]
  rows = []
  for name, (here, mine) in others:
    if here != ids:
      raise InputError(f"{name} and {reference} have other queries", value=split)
    common = [measure for measure in mine if measure in theirs]
    if missing := [measure for measure in wanted if measure not in common]:
      raise InputError("not measured in both", value=missing, fix=f"There are {', '.join(common)}")
    for measure in wanted or common:
      values = mine[measure], theirs[measure]
      means = float(values[1].mean()), float(values[0].mean())
      rows.append((name, measure, *means, comparison.difference(*values)))
  return tables.paired(f"{split}, against {reference}", rows)


def _measured(named: str, split: str) -> tuple[list[str], dict[str, np.ndarray]]:
  """The ids of a split's queries, and of each measure its values, float [J]."""
  directory, _, system = named.partition(":")
  workdir = pathlib.Path(directory).expanduser()
  if not system:
    if not (workdir / "results.json").is_file():
      raise InputError("no evaluated run here", path=directory)
    known = list(files.read_json(workdir / "results.json"))
    trained = [name for name in known if name.startswith("train")]
    if not trained:
      raise InputError("nothing was trained in this run", path=directory,
                       fix=f"Name DIR:SYSTEM; there are {', '.join(known)}")  # fmt: skip
    system = trained[-1]
  path = workdir / "evaluate" / "runs" / f"{system}.{split}.trec"
  if not path.is_file():
    raise InputError("no such system, or it is not measured on this split", path=path, value=split)
  return evaluate.measured(path.resolve().parent)


def define() -> None:
  """Defines the flags: not on import, where two commands in one process would clash."""
  flags.DEFINE_list("runs", None, "DIR or DIR:SYSTEM of each, separated by commas; the others against the first.")
  flags.DEFINE_string("split", "dev", "Which queries.")
  flags.DEFINE_list("measures", [], "Which measures; default: all that both have.")


if __name__ == "__main__":
  define()
  commands.start(main, ["runs"])
