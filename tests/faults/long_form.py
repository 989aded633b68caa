"""Two processes, one of them killed at drawn points of every stage, many times: `python tests/faults/long_form.py
--runs=20 --kills=5 --out=DIR`. The same command goes on where it ended.

Every run is started once, by launch/local_cluster.sh, which starts both processes again after each kill, and ends with
the same bytes as an undisturbed one, or this ends with status 1. DIR/kills.jsonl has a record of every kill.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import random
import sys
import time
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from support import attacked, forks, pair, tiny

# What one round has not: a second one, with mining between them; and weights that are split over processes.
MORE = {"rounds": 2, "fsdp": 2, "pretrain__evaluate_every": 3}


def main() -> int:
  """Does the runs that are not done yet; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
  parser.add_argument("--runs", type=int, default=20)
  parser.add_argument("--kills", type=int, default=5, help="of a run, each in another stage")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  options = parser.parse_args()
  out = options.out.absolute()
  out.mkdir(parents=True, exist_ok=True)
  flags = _inputs(out)

  undisturbed, whole = out / "undisturbed", out / "undisturbed.done"
  if not whole.exists():
    pair.undisturbed(undisturbed, flags)
    whole.touch()
  lives = draw(pair.events(undisturbed), options.runs, options.kills, options.seed)
  equal = [_run(out, number, flags, kills) for number, kills in enumerate(lives)]
  _say(out, lives, equal)
  return 0 if all(equal) else 1


def draw(found: pair.Events, runs: int, kills: int, seed: int) -> list[list[pair.Kill]]:
  """Draws the kills of each run: stages in their order, those that had the fewest so far; every other one between a
  write and its rename, where the stage has any."""
  generator = random.Random(seed)
  stages = list(dict.fromkeys(event.split()[0] for event in found[0] if not event.startswith("start ")))
  had: collections.Counter = collections.Counter()
  lives = []
  for _ in range(runs):
    drawn = sorted(stages, key=lambda stage: (had[stage], generator.random()))[:kills]
    had.update(drawn)
    drawn.sort(key=stages.index)
    lives.append([pair.draw(found, stage, had[stage] % 2 == 0, generator) for stage in drawn])
  return lives


def _inputs(out: pathlib.Path) -> list[str]:
  """The run's flags; its data are written once, so that a resumed run finds the files that it began with."""
  if not (out / "config.py").exists():
    tiny.backbone(out / "backbone", layers=1)
    forks.write(tiny.config(out, **attacked.FIELDS | MORE), out / "config.py")
  return [f"--config={out}/config.py"]


def _run(out: pathlib.Path, number: int, flags: Sequence[str], kills: Sequence[pair.Kill]) -> bool:
  """One run through its kills, unless it is done; whether it ended as the undisturbed one."""
  workdir = out / f"run{number:02}"
  done = workdir.with_suffix(".json")
  if not done.exists():
    started = time.monotonic()
    records = pair.run(workdir, flags, kills)
    differ = attacked.differ(attacked.ended(workdir), attacked.ended(out / "undisturbed"))
    with open(out / "kills.jsonl", "a", encoding="utf-8") as stream:
      for record in records:
        stream.write(json.dumps({"run": number, **record}) + "\n")
        _print(f"run {number:2}  {_line(record)}")
    done.write_text(json.dumps({"kills": len(records), "of": len(kills), "differ": differ}))
    _print(f"run {number:2}  {time.monotonic() - started:.0f} s, {'equal' if not differ else f'DIFFERS: {differ}'}")
  return not json.loads(done.read_text())["differ"]


def _line(record: dict) -> str:
  progress = f"{record['kind']} {record['at'] + 1} of {record['of']}"
  between = ", between a write and its rename" if record["between"] else ""
  return f"{record['time']}  process {record['victim']} in {record['stage']} at {progress}{between}"


def _say(out: pathlib.Path, lives: Sequence[Sequence[pair.Kill]], equal: Sequence[bool]) -> None:
  """Prints the counts that the runs had."""
  records = [json.loads(line) for line in (out / "kills.jsonl").read_text().splitlines()]
  stages = collections.Counter(record["stage"] for record in records)
  victims = collections.Counter(record["victim"] for record in records)
  _print(
    f"{sum(equal)} of {len(equal)} runs equal to the undisturbed one; "
    f"{len(records)} of {sum(map(len, lives))} planned kills; by stage {dict(stages)}; by process {dict(victims)}; "
    f"{sum(record['between'] for record in records)} between a write and its rename"
  )


def _print(text: str) -> None:
  sys.stdout.write(f"{text}\n")
  sys.stdout.flush()


if __name__ == "__main__":
  sys.exit(main())
