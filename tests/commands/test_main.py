"""`dptdr_jax.main`, and what all commands share: exit statuses, wrong flags in one line, configs from anywhere."""

from __future__ import annotations

import errno
import re

import pytest
from commands.common import call

from dptdr_jax.core import commands
from dptdr_jax.core.errors import InputError, RetryableError
from dptdr_jax.core.preemption import Preempted

CONFIG, PLACE = "--config=configs/beir.py", "--workdir=nowhere"


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
