"""launch/restart.sh: what is restarted, how often, and what a signal does."""

import signal
import time

import pytest

JOB = ("python", "-m", "dptdr_jax.main", "--workdir=x y")


def test_crash_and_preemption_are_restarted(fakes):
  fakes.python(["exit 1", "kill -KILL $$", "exit 75", "exit 0"])
  status, printed = fakes.run("restart.sh", *JOB)
  assert status == 0, printed
  assert fakes.jobs() == ["python -m dptdr_jax.main --workdir=x y"] * 4
  assert "status 137; restart 2 of 10 in 0 s" in printed


def test_input_error_is_final(fakes):
  fakes.python(["exit 2"])
  assert fakes.run("restart.sh", *JOB)[0] == 2
  assert len(fakes.jobs()) == 1


def test_restarts_in_a_row_are_limited(fakes):
  fakes.python(["exit 3"] * 9)
  status, printed = fakes.run("restart.sh", *JOB, RESTARTS="2")
  assert status == 3 and len(fakes.jobs()) == 3
  assert "giving up" in printed


def test_long_attempt_resets_the_count(fakes):
  # The shell counts whole seconds, and on a busy machine even `exit` takes some: between the two is room for three.
  fakes.python(["exit 3", "sleep 5.1; exit 3", "exit 3", "exit 0"])
  status, printed = fakes.run("restart.sh", *JOB, RESTARTS="1", FREE_AFTER="4")
  assert status == 3 and len(fakes.jobs()) == 3, printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_is_passed_on_and_ends_the_restarts(fakes, number):
  fakes.python(["exit 1", "hang"])
  status, _ = fakes.stop(fakes.start("restart.sh", *JOB), number)
  assert status == 75 and len(fakes.jobs()) == 2


def test_signal_in_a_pause_ends_at_once(fakes):
  fakes.python(["touch $fakes/hangs-0; exit 1"])
  running = fakes.start("restart.sh", *JOB, PAUSE="50")
  while "restart 1 of" not in running.stdout.readline():
    pass
  assert fakes.stop(running)[0] == 75 and len(fakes.jobs()) == 1


def test_second_signal_kills(fakes):
  fakes.python(["trap 'echo heard' TERM; touch $fakes/hangs-0; wait_for_term"])
  running = fakes.start("restart.sh", *JOB)
  while "process 0 does" not in running.stdout.readline():
    pass
  while not (fakes.directory / "hangs-0").exists():
    time.sleep(0.05)
  running.send_signal(signal.SIGTERM)
  while "heard" not in running.stdout.readline():
    pass
  running.send_signal(signal.SIGTERM)
  assert fakes.end(running)[0] == 137
