"""Executables that stand in for the real ones on PATH: they record how they were called and do as they are told."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[2]

# The main job: attempt N of process K does line N of actions-K; `hang` waits for SIGTERM, `deaf` for SIGKILL.
_PYTHON = """
case "$*" in
  *'-m dptdr_jax.main '*) ;;
  *'-m dptdr_jax.plan '*) exit "$(cat "$fakes/plan" 2>/dev/null || echo 0)" ;;
  '-c import jax'*) exit "$(cat "$fakes/gpus" 2>/dev/null || echo 0)" ;;
  '-m pip '*) exit 0 ;;
  *) exec REAL "$@" ;;
esac
process=0
for flag in "$@"; do case $flag in --process=*) process=${flag#*=} ;; esac; done
echo run >>"$fakes/attempts-$process"
echo $$ >"$fakes/main-$process.pid"
wait_for_term() { while true; do sleep 0.05; done; }
hang() { trap 'exit 75' TERM; touch "$fakes/hangs-$process"; wait_for_term; }
deaf() { trap '' TERM; touch "$fakes/hangs-$process"; wait_for_term; }
action=$(sed -n "$(wc -l <"$fakes/attempts-$process")p" "$fakes/actions-$process")
echo "process $process does: $action"
eval "$action"
"""


class Fakes:
  """A directory of fakes, first on PATH."""

  def __init__(self, directory: pathlib.Path):
    self.directory = directory
    self.bin = directory / "bin"
    self.bin.mkdir(parents=True)

  def tool(self, name: str, body: str, path: pathlib.Path | None = None) -> None:
    """Writes a fake: `$fakes` is the directory, calls go to calls-NAME, one a line."""
    path = path or self.bin / name
    head = f'#!/usr/bin/env bash\nfakes={self.directory}\necho "{name} $*" >>"$fakes/calls-{name}"\n'
    path.write_text(head + body)
    path.chmod(0o755)

  def python(self, *actions: Sequence[str], path: pathlib.Path | None = None) -> None:
    """A `python` whose main job does `actions[K]`, one an attempt, as process K; everything else is the real one's."""
    for process, lines in enumerate(actions):
      (self.directory / f"actions-{process}").write_text("\n".join(lines) + "\n")
    self.tool("python", _PYTHON.replace("REAL", sys.executable), path)

  def tell(self, name: str, word: str) -> None:
    (self.directory / name).write_text(f"{word}\n")

  def calls(self, name: str, containing: str = "") -> list[str]:
    """The calls of a fake, those that contain a text."""
    path = self.directory / f"calls-{name}"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if containing in line]

  def jobs(self) -> list[str]:
    """How the main job was called, all processes together."""
    return self.calls("python", "-m dptdr_jax.main")

  def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """Starts a script of launch/."""
    variables = {**os.environ, "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "PAUSE": "0", **environment}
    return subprocess.Popen(
      ["bash", str(ROOT / "launch" / script), *arguments],
      env=variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

  def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Runs a script of launch/ to its end; returns its status and what it printed."""
    return self.end(self.start(script, *arguments, **environment))

  def end(self, running: subprocess.Popen) -> tuple[int, str]:
    """The status of a script, and what it printed."""
    try:
      printed, _ = running.communicate(timeout=60)
    finally:
      running.kill()
    return running.returncode, printed

  def stop(self, running: subprocess.Popen, number: signal.Signals = signal.SIGTERM, processes: int = 1) -> tuple:
    """Sends a signal when all processes of the main job hang; returns as `end`."""
    deadline = time.monotonic() + 60
    while len(list(self.directory.glob("hangs-*"))) < processes and time.monotonic() < deadline:
      time.sleep(0.05)
    running.send_signal(number)
    return self.end(running)
