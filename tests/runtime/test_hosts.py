"""Two real processes meet; one that waits in vain says where; half an address is an error."""

import os
import socket
import subprocess
import sys

import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.runtime import hosts

PROGRAM = """
import sys, time
from dptdr_jax.runtime import hosts
from dptdr_jax.runtime.hosts import TEAM
index = int(sys.argv[2])
hosts.initialize("localhost:" + sys.argv[1], 2, index)
assert TEAM.count == 2 and TEAM.index == index and TEAM.is_main == (index == 0)
TEAM.barrier("both")
assert TEAM.first_says(lambda: {"index": index}) == {"index": 0}
assert TEAM.all_say("all", True) and not TEAM.all_say("one of two", index == 0)
if index == 1:
  time.sleep(3)
TEAM.patience_s = 60 if index else 0.5
try:
  TEAM.barrier("alone")
except Exception as error:
  print(type(error).__name__, error, flush=True)
if index == 0:
  time.sleep(8)  # the other one needs its coordinator until it has been at "alone" too
"""


STOPPED = """
import os, signal, sys
from dptdr_jax.core import preemption
from dptdr_jax.runtime import hosts
from dptdr_jax.runtime.hosts import TEAM
index, way = int(sys.argv[2]), sys.argv[3]
hosts.initialize("localhost:" + sys.argv[1], 2, index)
preemption.install()
TEAM.patience_s = 60
TEAM.barrier("both")
if index == 1:
  os.kill(os.getpid(), signal.SIGTERM)
try:
  if index == 1 and way == "inside a stage":
    preemption.check("after shard 3")
  if way == "at a trial":
    TEAM.first_says(lambda: 1) if index == 0 else preemption.check("after shard 3")
  if way == "at a question":
    TEAM.all_say("is it there", False)
  TEAM.barrier("after the stage")
except preemption.Preempted as stop:
  if not stop.agreed:
    TEAM.tell_stop()
  print(stop, flush=True)
"""


def test_one_process_waits_for_nobody():
  hosts.initialize()
  hosts.TEAM.barrier("anywhere")
  assert hosts.TEAM.is_main and hosts.TEAM.count == 1 and hosts.TEAM.first_says(lambda: 7) == 7


def test_auto_leaves_all_to_jax(monkeypatch):
  called = []
  monkeypatch.setattr("jax.distributed.initialize", lambda *values: called.append(values))
  hosts.initialize("auto")
  assert called == [()]


@pytest.mark.parametrize("values", [("localhost:1", 2, None), ("localhost:1", 2, 2), (None, 2, 0)])
def test_half_an_address(values):
  with pytest.raises(InputError, match="belong together"):
    hosts.initialize(*values)


@pytest.mark.parametrize(
  ("environment", "joins"),
  [
    ({}, False),
    ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "1"}, False),
    ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "8"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"JAX_COORDINATOR_ADDRESS": "a:1234"}, True),
  ],
)
def test_the_environment_says_whether_there_is_a_cluster(environment, joins):
  assert hosts._environment_has_cluster(environment) == joins


def run_two(program, *arguments):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = str(probe.getsockname()[1])
  environment = {**os.environ, "XLA_FLAGS": ""}
  running = [
    subprocess.Popen(
      [sys.executable, "-c", program, port, str(index), *arguments],
      env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) for index in range(2)
  ]  # fmt: skip
  (out, err), (other, error) = (process.communicate(timeout=120) for process in running)
  assert [process.returncode for process in running] == [0, 0], err + error
  return out, other


def test_two_processes_meet_and_one_that_waits_in_vain_gives_up():
  assert "LostError process 0 waited 0.5 s at 'alone' for processes 1 of 2" in run_two(PROGRAM)[0]


@pytest.mark.parametrize(
  ("way", "where"),
  [
    ("at a barrier", "after the stage"),
    ("inside a stage", "after the stage"),
    ("at a trial", "what the first says"),
    ("at a question", "is it there"),
  ],
)
def test_a_process_that_was_told_to_stop_tells_the_other(way, where):
  waiting, told = (printed.splitlines()[-1] for printed in run_two(STOPPED, way))  # gloo prints too
  assert waiting == f"all processes stop at '{where}'"
  assert told == (waiting if way in ("at a barrier", "at a question") else "after shard 3")
