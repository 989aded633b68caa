"""Two real processes meet at a barrier; one that waits in vain says where; half an address is an error."""

import os
import socket
import subprocess
import sys

import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.runtime import hosts

PROGRAM = """
import os, sys, time
from dptdr_jax.runtime import hosts
index = int(sys.argv[2])
hosts.initialize("localhost:" + sys.argv[1], 2, index)
assert hosts.process_count() == 2 and hosts.is_main() == (index == 0)
hosts.barrier("both")
if index == 1:
  time.sleep(3)
try:
  hosts.barrier("alone", timeout_s=60 if index else 0.5)
except Exception as error:
  print(type(error).__name__, error, flush=True)
if index == 0:
  time.sleep(8)  # the other one needs its coordinator until it has been at "alone" too
# The wait that was given up still stands in the runtime's threads, which an orderly exit would pull down under it.
os._exit(0)
"""


def test_one_process_waits_for_nobody():
  hosts.initialize()
  hosts.barrier("anywhere", timeout_s=0.0)
  assert hosts.is_main() and hosts.process_count() == 1


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
def test_environment_says_whether_there_are_others(environment, joins):
  assert hosts._environment_has_cluster(environment) == joins


def test_two_processes_meet_and_a_lonely_one_gives_up():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = str(probe.getsockname()[1])
  environment = {**os.environ, "XLA_FLAGS": ""}
  running = [
    subprocess.Popen(
      [sys.executable, "-c", PROGRAM, port, str(index)],
      env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) for index in range(2)
  ]  # fmt: skip
  (out, err), (_, other) = (process.communicate(timeout=120) for process in running)
  assert [process.returncode for process in running] == [0, 0], err + other
  assert "LostError process 0 of 2 waited 0.5 s at 'alone'" in out
