"""Two processes by launch/local_cluster.sh, one of which is killed at drawn points; the script starts both again.

As a program it stands in for `python -m dptdr_jax.main` there: it runs the main job and strikes at the next point.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from support import doom, quick

ROOT = pathlib.Path(__file__).parents[2]
PROCESSES = 2
SPARE = 5  # further attempts: on a busy machine gloo may give up on a slow process, after 30 s
RENAMES = ("rename", "finish", "checkpoint")

Events = Mapping[int, collections.Counter]  # of each process: how often 'STAGE KIND' came in an undisturbed run


@dataclasses.dataclass(frozen=True)
class Kill:
  """SIGKILL to process `victim` just before the event `at` (from 0) of `kind` in `stage` as process `clock` counts."""

  victim: int
  clock: int
  stage: str
  kind: str
  at: int
  of: int  # events that there are

  @property
  def between(self) -> bool:
    """Whether the victim has something whole under its temporary name and has not renamed it yet."""
    return self.kind in RENAMES and self.clock == self.victim


def undisturbed(workdir: pathlib.Path, flags: Sequence[str]) -> Events:
  """Runs the main job as two processes, in one attempt; returns its events."""
  log = workdir.with_suffix(".doom")
  for left in reversed(range(SPARE)):
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.rmtree(log, ignore_errors=True)
    try:
      run(workdir, flags, restarts=0)
      break
    except AssertionError:
      if not left:
        raise
  return events(workdir)


def run(workdir: pathlib.Path, flags: Sequence[str], kills: Sequence[Kill] = (), restarts: int | None = None) -> list:
  """Runs the main job as two processes to its end, through all `kills`; one that was broken off goes on.

  Returns:
    A record for each kill that was made, in order.
  """
  log = workdir.with_suffix(".doom")
  (log / "bin").mkdir(parents=True, exist_ok=True)
  (log / "plan.json").write_text(json.dumps([dataclasses.asdict(kill) for kill in kills]))
  shim = log / "bin" / "python"
  shim.write_text(
    "#!/bin/sh\n"
    f'[ "$1 $2" = "-m dptdr_jax.main" ] || exec {sys.executable} "$@"\n'
    f'shift 2; exec {sys.executable} -m support.pair {log} "$@"\n'
  )
  shim.chmod(0o755)
  environment = os.environ | {
    "PATH": f"{log / 'bin'}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    "XLA_FLAGS": quick.xla_flags(),
    "RESTARTS": str(len(kills) + SPARE if restarts is None else restarts), "PAUSE": "0", "GRACE": "2",
  }  # fmt: skip
  command = ["bash", str(ROOT / "launch/local_cluster.sh"), str(PROCESSES), "2", "--", *flags, f"--workdir={workdir}"]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  logs = [path.read_text(errors="replace")[-3000:] for path in sorted((workdir / "logs").glob("*.log"))]
  assert done.returncode == 0, "\n".join([done.stderr[-2000:], *logs])
  return _records(log)


def events(workdir: pathlib.Path) -> Events:
  """The events of a run that nothing disturbed."""
  log = workdir.with_suffix(".doom")
  lines = {index: (log / f"events-{index}").read_text().splitlines() for index in range(PROCESSES)}
  return {index: collections.Counter(found) for index, found in lines.items()}


def draw(found: Events, stage: str, renames: bool, generator: random.Random) -> Kill:
  """Draws a kill in `stage`: between a write and its rename, or by the progress that is shown; evenly among these."""
  wanted = RENAMES if renames else ("progress",)
  clocks = [(index, kind) for index in range(PROCESSES) for kind in wanted if found[index][f"{stage} {kind}"]]
  if not clocks:  # no such events in this stage
    return draw(found, stage, not renames, generator)
  clock, kind = generator.choice(clocks)
  # At the other's progress a process is at work too, or waits. Process 0 has most renames, so the other gets more here.
  victim = clock if renames else generator.choice((0, 1, 1, 1))
  count = found[clock][f"{stage} {kind}"]
  return Kill(victim, clock, stage, kind, generator.randrange(count), count)


def _records(log: pathlib.Path) -> list[dict]:
  path = log / "kills.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def strike(log: pathlib.Path, kill: Kill) -> None:
  """Notes the kill, then makes it."""
  record = dataclasses.asdict(kill) | {"between": kill.between, "time": time.strftime("%F %T")}
  with open(log / "kills.jsonl", "a", encoding="utf-8") as stream:
    stream.write(json.dumps(record) + "\n")
  os.kill(int((log / f"pid-{kill.victim}").read_text()), signal.SIGKILL)


def main(log: pathlib.Path, flags: list[str]) -> None:
  """One process of the run: says who it is, and strikes where the plan has the next kill by its count."""
  me = next(int(flag.removeprefix("--process=")) for flag in flags if flag.startswith("--process="))
  quick.collect_seldom()
  (log / f"pid-{me}").write_text(str(os.getpid()))
  plan, done = json.loads((log / "plan.json").read_text()), len(_records(log))
  kill = Kill(**plan[done]) if done < len(plan) else None
  point = f"{kill.stage}:{kill.kind}:{kill.at}" if kill is not None and kill.clock == me else "none"
  doom.main(log / f"events-{me}", point, flags, functools.partial(strike, log, kill))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), sys.argv[2:])
