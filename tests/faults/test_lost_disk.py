"""A run whose machine loses its disk, again and again, goes on from its remote copy and ends with the same bytes."""

from __future__ import annotations

import shutil
import signal

import fsspec
import pytest
from support import forks, lost_disk
from support.attacked import differ, ended

from dptdr_jax.core.store import Store
from dptdr_jax.pipeline.run import run


def test_every_machine_loses_its_disk_and_the_run_ends_the_same(attacked, tmp_path):
  lives, remote = {}, f"--remote=file://{tmp_path}/remote"
  for number, point in enumerate(("kill:2", "term:1", "upload", "none")):
    workdir = tmp_path / f"machine{number}"
    if not number:
      attacked.early(workdir)
    flags = attacked.flags(workdir, remote)
    lives[point] = forks.Job(lost_disk.main, point, flags, said=workdir.with_suffix(".said")).end()
    if point != "none":
      shutil.rmtree(workdir)
  said = {point: text for point, (_, text) in lives.items()}
  statuses = [status for status, _ in lives.values()]
  assert statuses == [-signal.SIGKILL, 75, -signal.SIGKILL, 0], [text[-2000:] for text in said.values()]
  assert "train resumes after step 2" in said["term:1"]
  assert "train resumes after step" in said["upload"] and "cross" in said["upload"]
  assert "train resumes after step 6" in said["none"], "artefact.json was not there: the copy was not finished"
  assert not differ(ended(workdir), ended(attacked.work))


def test_a_remote_that_is_no_file_system_gives_all_back(attacked, tmp_path, monkeypatch):
  url = "memory://faults"
  try:
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(attacked.work, first, symlinks=True)
    run(attacked.config(), first, url=url)
    monkeypatch.setattr(Store, "_build", lambda store, kind, ref, inputs: pytest.fail(f"{ref} is made again"))
    run(attacked.config(), second, url=url)
  finally:
    fsspec.filesystem("memory").store.clear()
  assert not differ(ended(second), ended(attacked.work))
