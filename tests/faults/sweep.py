"""Damages every file of a finished run, one at a time, and runs it again: `python tests/faults/sweep.py --out=DIR`.

Each file is lost, cut to half, or has one bit flipped; each time in a copy of the run, which is then started until it
ends: with the same measures and run files, or with one line that says what is wrong (status 2). `late` files are
damaged after the store has looked at them, so that their readers have to notice; of a flipped bit they need not.
The same command goes on where it ended. DIR/cases.jsonl has every case.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from support import quick

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick.xla_flags()}
quick.collect_seldom()

from support import damage, runs  # noqa: E402

from dptdr_jax.pipeline.run import run  # noqa: E402


def main() -> int:
  """Tries the cases that are not tried yet; returns the exit status: 0 if all ended as they should."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--only", default="", help="cases whose file has this in its name")
  options = parser.parse_args()
  out = options.out.absolute()
  out.mkdir(parents=True, exist_ok=True)
  config, record = runs.everything(out), out / "cases.jsonl"
  run(config, out / "finished")
  tried = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
  tried = {damage.Case(**one["case"]): damage.Outcome(**one["outcome"]) for one in tried}
  wanted = [case for case in damage.cases(out / "finished") if options.only in case.file]
  for number, case in enumerate(wanted, 1):
    if case in tried:
      continue
    began = time.monotonic()
    tried[case] = outcome = damage.try_case(case, config, out / "finished", out / "work")
    with open(record, "a", encoding="utf-8") as stream:
      stream.write(json.dumps({"case": dataclasses.asdict(case), "outcome": dataclasses.asdict(outcome)}) + "\n")
    if not outcome.is_good(case):
      _print(f"{case}: {outcome.how}: {outcome.said}")
    if number % 50 == 0:
      _print(f"{number} of {len(wanted)} cases, the last in {time.monotonic() - began:.1f} s")
  _say({case: tried[case] for case in wanted})
  return 0 if all(outcome.is_good(case) for case, outcome in tried.items()) else 1


def _say(tried: dict[damage.Case, damage.Outcome]) -> None:
  """Prints the counts by harm and by kind of artefact."""
  table = collections.defaultdict(collections.Counter)
  for case, outcome in tried.items():
    table[f"harm {case.harm}{', late' if case.late else ''}"][outcome.how] += 1
    table[f"kind {case.kind}"][outcome.how] += 1
  for label, counts in sorted(table.items()):
    _print(f"{label:20} " + ", ".join(f"{count} {how}" for how, count in counts.most_common()))
  bad = [case for case, outcome in tried.items() if not outcome.is_good(case)]
  _print(f"{len(tried)} cases, {len(tried) - len(bad)} as they should be")


def _print(text: str) -> None:
  sys.stdout.write(f"{text}\n")
  sys.stdout.flush()


if __name__ == "__main__":
  sys.exit(main())
