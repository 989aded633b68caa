"""Several processes as one run: who is first, who waits, and for how long."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dptdr_jax.core.errors import DptdrError, InputError

# Set by the platforms that start several processes and that jax.distributed can read by itself.
_CLUSTER_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES")


_FAREWELL_S = 10.0

_patience_s = 3600.0


class LostError(DptdrError):
  """The run's processes lost each other: nothing is wrong with the input, and a rerun of all of them goes on."""


def initialize(coordinator: str | None = None, processes: int | None = None, index: int | None = None) -> None:
  """Joins the run's processes: by the three values if given, else by what the platform's environment says.

  Must come before anything touches a device. One process alone (no values, no cluster around) joins nothing.

  Args:
    coordinator: host:port of process 0; 'auto': jax finds all three (a Cloud TPU VM, whose environment says nothing).
    processes: how many there are.
    index: which this one is, from 0.

  Raises:
    InputError: only some of the three are given, or they contradict each other.
  """
  if coordinator == "auto" and processes is None and index is None:
    jax.distributed.initialize()
    return
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


def leave(status: int) -> None:
  """Ends a process of several that cannot go on; does nothing where there is only one.

  On an ordinary exit jax.distributed would wait five minutes for the others, who may never come to that point.
  """
  if not jax.distributed.is_initialized():
    return
  goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  goodbye.start()
  goodbye.join(_FAREWELL_S)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


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


def process_index() -> int:
  """Which one this is, from 0."""
  return jax.process_index()


def be_patient(seconds: float) -> None:
  """Sets how long `barrier` waits where it is not told."""
  global _patience_s
  _patience_s = seconds


def barrier(name: str, timeout_s: float | None = None) -> None:
  """Waits until every process has come to the point called `name`.

  Args:
    name: the same in every process; different names at one barrier are an error in all of them.
    timeout_s: seconds after which waiting is given up; None: those of `be_patient`.

  Raises:
    LostError: not all processes came within `timeout_s`.
  """
  if process_count() == 1:
    return
  timeout_s = _patience_s if timeout_s is None else timeout_s
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
    raise LostError(
      f"process {jax.process_index()} of {process_count()} waited {timeout_s:g} s at '{name}' for the others. "
      "Look into the logs of the other processes, then start the run again: it resumes"
    )
  if failure:
    raise LostError(f"the processes did not meet at '{name}': {failure[0]}") from failure[0]


@contextlib.contextmanager
def first_goes_first(name: str) -> Iterator[None]:
  """Process 0 goes through the block, then the others."""
  if not is_main():
    barrier(f"{name}: the first")
  yield
  if is_main():
    barrier(f"{name}: the first")


def first_says(make: Callable[[], Any]) -> Any:
  """What `make` gives in process 0, in every process; something that JSON can hold. The others don't call it."""
  if process_count() == 1:
    return make()
  said = np.frombuffer(json.dumps(make()).encode() if is_main() else b"", np.uint8)
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
  sent = np.zeros(length, np.uint8)
  sent[: len(said)] = said
  return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).astype(np.uint8).tobytes().decode())


def fetch(tree: Any) -> Any:
  """A tree of global arrays as numpy arrays, whole in every process; all processes must call it."""

  def whole(leaf):
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
      return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)

  return jax.tree.map(whole, tree)


class Agreement:
  """Whether any process wants something (to stop, say), answered for all of them at the same step.

  The question goes to the devices behind the step that was dispatched before it, and the answer is that of the question
  before: nobody waits for it.
  """

  def __init__(self):
    if process_count() == 1:
      return
    mesh = Mesh(np.array(jax.devices()), ("all",))
    self._rows, self._local = NamedSharding(mesh, PartitionSpec("all")), len(mesh.local_devices)
    self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    self._answer: jax.Array | None = None

  def ask(self, wanted: bool) -> bool:
    """Every process asks at the same steps; whether one of them wanted, at this step or (several) at the one before."""
    if process_count() == 1:
      return wanted
    before, mine = self._answer, np.full((self._local,), wanted, np.int32)
    self._answer = self._any(jax.make_array_from_process_local_data(self._rows, mine))
    return before is not None and bool(before > 0)
