"""What stops a run from outside ends it soon, with one line and an exit status of its own; the next start goes on."""

from __future__ import annotations

import os
import pathlib
import resource
import shutil
import signal
import tempfile
import time

import pytest
from support import forks
from support.attacked import Attacked, differ, ended


def stop(job: forks.Job, growing: pathlib.Path, number: int) -> tuple[int, str, float]:
  """Sends a signal when a file has grown; returns the exit status, what was printed, and the seconds that it took."""
  before = growing.stat().st_size if growing.exists() else 0
  while not (growing.exists() and growing.stat().st_size > before):
    assert job.process.is_alive(), job.end()
    time.sleep(0.05)
  began = time.monotonic()
  os.kill(job.process.pid, number)
  return *job.end(), time.monotonic() - began


def test_told_to_stop_it_saves_ends_within_30_seconds_and_resumes(attacked, tmp_path):
  workdir, step = tmp_path / "work", 0
  attacked.early(workdir)
  # Without negatives that it might be waiting for: see test_processes.
  long = [f"--config.{name}" for name in ("train.steps=5000", "train.refresh_every=0", "mine.cross_encoder=False")]
  for number in (signal.SIGTERM, signal.SIGINT):
    job = attacked.start(workdir, *long)
    status, said, seconds = stop(job, workdir / "train1/metrics.jsonl", number)
    assert status == 75 and seconds < 30
    assert said.splitlines()[-1].startswith("stopped: train is at step") and "Traceback" not in said
    assert not step or f"train resumes after step {step}" in said
    step = int(said.splitlines()[-1].split()[5])
    assert (workdir / f"train1/checkpoints/{step}").is_dir()


def fill(attacked: Attacked, workdir: pathlib.Path, out: pathlib.Path) -> None:
  """Starts a run again and again, on a disk that takes larger and larger files; writes down how each start ended."""
  from dptdr_jax.pipeline.run import run

  limits, lines = resource.getrlimit(resource.RLIMIT_FSIZE), []
  null = os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, 1), os.dup2(null, 2)
  for kilobytes in (1, 4, 16, 64, 256, 1024):
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, limits[1]))  # writing beyond fails as with a quota
    try:
      run(attacked.config(), workdir)
      lines.append("done")
    except Exception as error:
      lines.append(f"{type(error).__name__} {error}")
  resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  out.write_text("\n".join(lines))


def test_full_disk_is_one_line_and_costs_nothing_that_is_made(attacked, tmp_path):
  workdir, out = tmp_path / "work", tmp_path / "out"
  status, said = forks.Job(fill, attacked, workdir, out, said=tmp_path / "said").end()
  assert status == 0, said[-3000:]
  *failed, last = out.read_text().splitlines()
  assert last == "done" and len([line for line in failed if line != "done"]) >= 3
  for line in failed:
    assert line == "done" or (line.startswith("InputError") and "no space left on the disk. Free some" in line), line
  assert not differ(ended(workdir), ended(attacked.work))


def as_nobody(flags: list[str]) -> None:
  """The main job without the rights of root, for whom nothing is read-only."""
  if os.geteuid() == 0:
    os.seteuid(65534)
  forks.job(flags)


@pytest.mark.parametrize("where", ["workdir", "store"])
def test_read_only_directory_is_one_line(attacked, where):
  with tempfile.TemporaryDirectory() as name:
    place = pathlib.Path(name)
    place.chmod(0o755)
    for part in ("data", "backbone"):
      shutil.copytree(attacked.directory / part, place / part)
    copy = Attacked(place)
    forks.write(copy.config(), place / "config.py")
    (place / "store").mkdir(), (place / "runs").mkdir()
    (place / "runs").chmod(0o777 if where == "store" else 0o555)
    (place / "store").chmod(0o555)
    (place / "said").mkdir(mode=0o777)
    flags = copy.flags(place / "runs/one", f"--store={place}/store")
    status, said = forks.Job(as_nobody, flags, said=place / "said/said").end()
  assert status == 2, said[-3000:]
  error = [line for line in said.splitlines() if "ermission denied" in line]
  assert len(error) == 1 and error[0].startswith(f"error: {place}/{'store' if where == 'store' else 'runs'}"), said
  assert "Traceback" not in said
