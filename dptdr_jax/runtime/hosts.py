"""Several processes as one run: who is first, who waits, and for how long."""

from __future__ import annotations

import os
import threading

import jax
from jax.experimental import multihost_utils

from dptdr_jax.core.errors import DptdrError, InputError

# Set by the platforms that start several processes and that jax.distributed can read by itself.
_CLUSTER_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES")


def initialize(coordinator: str | None = None, processes: int | None = None, index: int | None = None) -> None:
  """Joins the run's processes: by the three values if given, else by what the platform's environment says.

  Must come before anything touches a device. One process alone (no values, no cluster around) joins nothing.

  Args:
    coordinator: host:port of process 0.
    processes: how many there are.
    index: which this one is, from 0.

  Raises:
    InputError: only some of the three are given, or they contradict each other.
  """
  given = [value is not None for value in (coordinator, processes, index)]
  if any(given):
    if not all(given) or not 0 <= index < processes:
      raise InputError(
        "coordinator, number of processes and index belong together, with 0 ≤ index < number",
        value={"coordinator": coordinator, "processes": processes, "index": index},
      )
    jax.distributed.initialize(coordinator, processes, index)
  elif _environment_has_cluster(os.environ):
    jax.distributed.initialize()


def _environment_has_cluster(environment) -> bool:
  if environment.get("SLURM_NTASKS", "1") == "1" and "SLURM_STEP_NODELIST" in environment:
    return False  # a SLURM job of one task: nobody to meet
  if "," not in environment.get("TPU_WORKER_HOSTNAMES", ","):
    return False  # a TPU slice of one worker
  return any(name in environment for name in _CLUSTER_VARIABLES)


def process_count() -> int:
  """How many processes the run has."""
  return jax.process_count()


def is_main() -> bool:
  """Whether this process is the one that writes shared files."""
  return jax.process_index() == 0


def barrier(name: str, timeout_s: float = 3600.0) -> None:
  """Waits until every process has come to the point called `name`.

  Args:
    name: the same in every process; different names at one barrier are an error in all of them.
    timeout_s: seconds after which waiting is given up.

  Raises:
    DptdrError: not all processes came within `timeout_s`.
  """
  if process_count() == 1:
    return
  failure: list[BaseException] = []

  def meet() -> None:
    try:
      multihost_utils.sync_global_devices(name)
    except Exception as error:  # carried to the waiting thread, where it is raised
      failure.append(error)

  # The collective itself knows no time limit, so it waits in a thread that does not outlive the process.
  meeting = threading.Thread(target=meet, name=f"barrier {name}", daemon=True)
  meeting.start()
  meeting.join(timeout_s)
  if meeting.is_alive():
    raise DptdrError(
      f"process {jax.process_index()} of {process_count()} waited {timeout_s:g} s at '{name}' for the others. "
      "Look into the logs of the other processes, then start the run again: it resumes"
    )
  if failure:
    raise DptdrError(f"the processes did not meet at '{name}': {failure[0]}") from failure[0]
