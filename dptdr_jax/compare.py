"""`python -m dptdr_jax.compare --runs=DIR[:SYSTEM],DIR[:SYSTEM],…`: systems against the first, query by query.

SYSTEM is a name in DIR/results.json; without one it is the last round's retriever. For every measure that both have:
the two means, the difference with its 95 % bootstrap interval over queries, and p of a paired randomisation test
(two-sided, not corrected for several tests). Both are over queries: what another seed would give is in neither.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np
from absl import flags

from dptdr_jax.core import commands, files, progress
from dptdr_jax.core.errors import DptdrError, InputError
from dptdr_jax.stages import comparison
from dptdr_jax.stages.layout import Layout


def main(_: list[str]) -> int:
  """Prints a table; exit status 0, or 2 after an error of input."""
  given = flags.FLAGS
  try:
    progress.say(compare(given.runs, given.split, given.measures))
  except DptdrError as error:
    sys.stderr.write(f"error: {error}\n")
    return 2
  return 0


def compare(named: list[str], split: str, wanted: list[str]) -> str:
  """A Markdown table of the systems after the first against it.

  Args:
    named: 'DIR' or 'DIR:SYSTEM'.
    wanted: measures; [] for all that both have.

  Raises:
    InputError: fewer than two, a system or a measure that is not there, or other queries.
  """
  if len(named) < 2:
    raise InputError("two systems at least are compared", value=named, fix="--runs=DIR:SYSTEM,DIR:SYSTEM")
  (reference, first), *others = [(each, _measured(each, split)) for each in named]
  lines = [f"| {split}, against {reference} | measure | there | here | difference [95 %] | p |", "|---" * 6 + "|"]
  for name, (ids, values) in others:
    if ids != first[0]:
      raise InputError(f"{name} and {reference} have other queries", value=split)
    if missing := [measure for measure in wanted if measure not in values or measure not in first[1]]:
      raise InputError("not measured in both", value=missing, fix=f"There are {', '.join(values)}")
    for measure in wanted or [measure for measure in values if measure in first[1]]:
      mine, theirs = values[measure], first[1][measure]
      cells = name, measure, f"{theirs.mean():.4f}", f"{mine.mean():.4f}"
      lines.append(f"| {' | '.join(cells)} | {comparison.shown(comparison.paired(mine, theirs))} |")
  return "\n".join(lines)


def _measured(named: str, split: str) -> tuple[list[str], dict[str, np.ndarray]]:
  """The ids of a split's queries, and of each measure its values, float [J]."""
  directory, _, system = named.partition(":")
  layout = Layout.of(pathlib.Path(directory))
  if not system:
    if not layout.summary.is_file():
      raise InputError("no evaluated run here", path=directory)
    if not (rounds := files.read_json(layout.summary)["rounds"]):
      known = ", ".join(files.read_json(layout.results))
      raise InputError("nothing was trained in this run", path=directory, fix=f"Name DIR:SYSTEM; there are {known}")
    system = f"train{rounds}"
  path = layout.per_query(system, split)
  if not path.is_file():
    raise InputError("no such system, or it is not measured on this split", path=path, value=split)
  with np.load(path) as found:
    return comparison.query_ids(layout, split), dict(found)


def define() -> None:
  """Defines the flags: not on import, where two commands in one process would clash."""
  flags.DEFINE_list("runs", None, "DIR or DIR:SYSTEM of each, with commas between; the others against the first.")
  flags.DEFINE_string("split", "dev", "Which queries.")
  flags.DEFINE_list("measures", [], "Which measures; none: all that both have.")


if __name__ == "__main__":
  define()
  commands.start(main, ["runs"])
