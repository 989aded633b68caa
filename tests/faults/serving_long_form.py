"""A server killed (SIGKILL) many times while documents stream in and tasks change: `python
tests/faults/serving_long_form.py --kills=10 --seed=0`.

Ends with status 1 if something that was acknowledged is missing or wrong. The suite has a shorter form.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import sys
import tempfile
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from support import deaths, server


def main() -> int:
  """Returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--kills", type=int, default=10)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--longest", type=float, default=5.0, help="seconds from ready to a kill, at most")
  options = parser.parse_args()
  generator = random.Random(options.seed)
  with tempfile.TemporaryDirectory() as directory:
    home = pathlib.Path(directory)
    mortal = deaths.Deaths(home, server.models(home), home / "state", options.seed)
    try:
      for number in range(options.kills):
        mortal.life(generator.uniform(0.2, options.longest))
        sys.stdout.write(f"kill {number + 1}: {_count(mortal)}\n")
        sys.stdout.flush()
      mortal.last()
    except AssertionError:
      traceback.print_exc()
      return 1
  sys.stdout.write(f"everything that was acknowledged is there: {_count(mortal)}\n")
  return 0


def _count(mortal: deaths.Deaths) -> str:
  counts = [f"{len(known)} documents of {task}" for task, known in mortal.ledger.documents.items()]
  return f"{', '.join(counts)}, {len(mortal.ledger.tasks)} tasks known"


if __name__ == "__main__":
  sys.exit(main())
