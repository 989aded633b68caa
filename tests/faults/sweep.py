"""Damages every file of a finished run, one at a time, and starts it again: `python tests/faults/sweep.py --out=DIR`.

Each file is lost, cut to half, or has one bit flipped, before or after the store has looked at it. The run must end
with the same measures and run files, or with one line and status 2; of a bit that is flipped after the store has looked
readers need not know. The same command goes on where it ended. DIR/cases.jsonl has every case.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys

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
  lines = record.read_text().splitlines() if record.exists() else []
  wrong = {damage.Case(*case): how for case, how in map(json.loads, lines)}
  wanted = [case for case in damage.cases(out / "finished")
            if options.only in case.file and not (case.late and case.harm == "flipped")]  # fmt: skip
  for case in wanted:
    if case not in wrong:
      wrong[case] = damage.try_case(case, config, out / "finished", out / "work")
      with open(record, "a", encoding="utf-8") as stream:
        stream.write(json.dumps([case, wrong[case]]) + "\n")
      if wrong[case]:
        sys.stdout.write(f"{case}\n{wrong[case]}\n")
        sys.stdout.flush()
  bad = sum(bool(wrong[case]) for case in wanted)
  sys.stdout.write(f"{len(wanted)} cases, {len(wanted) - bad} as they should be\n")
  return 1 if bad else 0


if __name__ == "__main__":
  sys.exit(main())
