"""`dptdr_jax.main`, and what all commands share: exit statuses, wrong flags in one line, configs from anywhere."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from commands.common import call
from support import quick, tiny

from dptdr_jax.core import commands
from dptdr_jax.core.errors import InputError, RetryableError
from dptdr_jax.core.preemption import Preempted

CONFIG, PLACE = "--config=configs/beir.py", "--workdir=nowhere"
OWN = """
import os, pathlib, threading, time
from configs import beir

METRICS = pathlib.Path("work/train1/metrics.jsonl")


def size():
  return METRICS.stat().st_size if METRICS.exists() else 0


def stop(number, before):  # after one more step
  while size() <= before:
    time.sleep(0.005)
  os.kill(os.getpid(), number)


if int(os.environ["STOP"]):
  threading.Thread(target=stop, args=(int(os.environ["STOP"]), size()), daemon=True).start()


def get_config():
  c = beir.get_config()
  c.train.update({"steps": 300, "queries": 8, "evaluate_every": 0})
  c.prompt.length, c.text.passage_length, c.log_every, c.evaluate.baselines = 4, 32, 1, ()
  return c
"""


@pytest.mark.parametrize(
  ("error", "status", "said"),
  [
    (InputError("wrong", path="x", line=3), 2, "error: x:3: wrong\n"),
    (RetryableError("lost the others"), 1, "error: lost the others\n"),
    (Preempted("saved at step 3"), 75, "stopped: saved at step 3; the same command resumes\n"),
    (KeyboardInterrupt(), 75, "interrupted; the same command resumes\n"),
    (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "error: x: Permission denied\n"),
    (OSError(errno.EIO, "Input/output error", "x"), 1, "Traceback"),
    (ValueError("unforeseen"), 1, "Traceback"),
  ],
)
def test_exit_status_by_error(capsys, error, status, said):
  def work():
    raise error

  assert commands.status_of(work) == status
  assert re.match(re.escape(said) + ("$" if said.endswith("\n") else ""), capsys.readouterr().err)
  assert commands.status_of(lambda: None) == 0


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([CONFIG, PLACE, "--wrkdir=x"], "Unknown command line flag 'wrkdir'"),
    ([CONFIG], "Flag --workdir must have a value"),
    ([PLACE], "Flag --config must have a value"),
    ([CONFIG, PLACE, "--processes=two"], "flag --processes=two"),
    ([CONFIG, PLACE, "--config.sed=1"], "config: no such field: 'sed'"),  # so the installed config was loaded
    ([CONFIG, PLACE, "--config.seed=one"], "flag --config.seed=one"),
    ([CONFIG, PLACE, "--config.seed=-1"], "seed must be at least 0: -1"),
    ([CONFIG, PLACE, "extra"], "unexpected argument 'extra'"),
    (["--config=nothing.py", PLACE, "--config.seed=1"], "config: .*No such file or directory: 'nothing.py'"),
    (["--config=broken.py", PLACE], "config: SyntaxError: .*broken.py, line 1"),
    (["--config=wrong.py", PLACE], "config: ValueError: seven is no number"),
    (["--config=astray.py", PLACE], "config: ImportError: .*nowhere"),
  ],
)
def test_wrong_flag_or_config_is_one_line_and_status_2(tmp_path, flags, message):
  (tmp_path / "broken.py").write_text("def get_config(:\n")
  (tmp_path / "wrong.py").write_text("def get_config():\n  raise ValueError('seven is no number')\n")
  (tmp_path / "astray.py").write_text("from configs import nowhere\n")
  status, said = call(tmp_path / "said", "main", *flags, directory=tmp_path)
  assert status == 2 and len(said.splitlines()) == 1 and re.match(f"error: .*{message}", said), said
  assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("command", ["ablate", "compare", "plan", "negatives"])
def test_other_commands_refuse_flags_in_the_same_way(tmp_path, command):
  status, said = call(tmp_path / "said", command, "--no_such_flag=1")
  assert status == 2 and len(said.splitlines()) == 1 and "no_such_flag" in said


def test_run_stopped_by_sigterm_and_by_ctrl_c_resumes(tmp_path):
  """As a user starts it: in a directory with a config of its own and nothing of the repository."""
  data, backbone = tiny.beir(tmp_path / "data"), tiny.backbone(tmp_path / "backbone")
  (tmp_path / "own.py").write_text(OWN)
  command = [sys.executable, "-m", "dptdr_jax.main", "--config=own.py", "--workdir=work", f"--config.data.dir={data}",
             f"--config.backbone.path={backbone}"]  # fmt: skip

  def run(stop: int) -> tuple[int, str]:
    environment = os.environ | {"STOP": str(int(stop)), "XLA_FLAGS": quick.xla_flags()}  # one device
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stderr

  for number in (signal.SIGTERM, signal.SIGINT):
    status, said = run(number)
    assert status == 75 and said.splitlines()[-1].startswith("stopped: ") and "Traceback" not in said, said
    assert (tmp_path / "work/train1").exists() and not (tmp_path / "work/results.json").exists()
  status, said = run(0)
  assert status == 0, said
  steps = [json.loads(line)["step"] for line in (tmp_path / "work/train1/metrics.jsonl").read_text().splitlines()]
  assert steps == list(range(1, 301))
  assert list(json.loads((tmp_path / "work/results.json").read_text())) == ["train1"]
