"""Several processes as one run: joining, waiting for each other, agreeing, leaving."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dptdr_jax.core import preemption
from dptdr_jax.core.errors import DptdrError, InputError, RetryableError
from dptdr_jax.core.team import Team
from dptdr_jax.runtime.meetings import Meetings

_log = logging.getLogger(__name__)

# Set by the platforms that start several processes and that jax.distributed can read by itself.
_CLUSTER_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES")

_FAREWELL_S = 10.0  # longest wait of a process that ends
_NOTICE_S = 30.0  # longer waits are logged
_LOOK_S = 0.5  # longest pause between two looks whether all have come


class LostError(RetryableError):
  """The run's processes lost each other. The input is fine, and a restart of all of them resumes."""


class Processes(Team):
  """The processes of this run. They meet at process 0 (see `runtime.meetings`).

  All processes call the same methods in the same order.

  Attributes:
    patience_s: seconds after which a wait is given up.
  """

  def __init__(self):
    self.patience_s = 86_400.0
    self._numbers = itertools.count()
    self._meetings: Meetings | None = None

  @property
  def count(self) -> int:
    """How many there are."""
    return jax.process_count()

  @property
  def index(self) -> int:
    """Which one this is, from 0."""
    return jax.process_index()

  def barrier(self, name: str) -> None:
    """Waits until every process has come to the point called `name`; different names are an error in all of them.

    Raises:
      LostError: not all processes came in time, or process 0 is gone.
      Preempted: in all processes, if one of them had been told to stop when it came.
    """
    if self.count > 1:
      self._meet(name, {"stops": preemption.asked()})

  def all_say(self, name: str, yes: bool) -> bool:
    """Whether all processes say yes; a `barrier`, with its errors.

    A single process, too, is asked whether it was told to stop.
    """
    if self.count == 1:
      preemption.check(name)
      return yes
    return all(one["yes"] for one in self._meet(name, {"stops": preemption.asked(), "yes": yes}))

  def first_says(self, make: Callable[[], Any]) -> Any:
    """What `make` returns in process 0, in every process: a value that JSON can hold. The others don't call it.

    Raises:
      DptdrError: `make` raised one; in every process with the same text, and RetryableError if it was one.
      LostError, Preempted: as `barrier`.
    """
    if self.count == 1:
      return make()
    words, failure = {}, None
    if self.is_main:
      try:
        words = {"value": make()}
      except DptdrError as error:
        words, failure = {"error": str(error), "retry": isinstance(error, RetryableError)}, error
    said = self._meet("what the first says", words)[0]
    if failure is not None:
      raise failure
    if "error" in said:
      raise (RetryableError if said["retry"] else DptdrError)(said["error"])
    return said["value"]

  def tell_stop(self) -> None:
    """Tells the others, at the next barrier that they come to, that this process stops; waits 10 s for them.

    For a process that was told to stop (see core.preemption) where the others were not asked. If they don't come they
    are busy elsewhere, or wait where this one will not come: `leave` ends that.
    """
    if self.count > 1:
      with contextlib.suppress(LostError, preemption.Preempted):
        self._meet("leave", {"stops": True}, _FAREWELL_S)

  def join(self, host: str | None) -> None:
    """Gets ready to meet; all processes call it at once, after jax.distributed.initialize.

    Args:
      host: as for `Meetings`.
    """
    if self.count > 1:
      try:
        self._meetings = Meetings(host)
      except (OSError, jax.errors.JaxRuntimeError) as error:
        raise LostError(f"process {self.index} could not join the others: {error}") from error

  def _meet(self, name: str, words: dict, timeout_s: float | None = None) -> list[dict]:
    """What every process says at its next meeting, by process. Raises as `barrier`; who 'stops' may be anywhere."""
    number, began, pause, logged = next(self._numbers), time.monotonic(), 0.002, False
    timeout_s = self.patience_s if timeout_s is None else timeout_s
    while True:
      try:
        said = self._meetings.say(number, words | {"name": name})
      except (OSError, EOFError) as error:
        raise LostError(f"process {self.index} lost process 0 at '{name}': {error!r}") from error
      missing = [index for index in range(self.count) if index not in said]
      if not missing:
        break
      waited, who = time.monotonic() - began, f"{', '.join(map(str, missing))} of {self.count}"
      if waited > timeout_s:
        raise LostError(
          f"process {self.index} waited {timeout_s:g} s at '{name}' for processes {who}. Read the logs of these "
          "processes, then start the run again: it resumes"
        )
      if waited > _NOTICE_S and not logged:
        _log.info("process %d waits at '%s' for processes %s", self.index, name, who)
        logged = True
      time.sleep(pause)
      pause = min(2 * pause, _LOOK_S)
    if any(one.get("stops") for one in said.values()):
      raise preemption.Preempted(f"all processes stop at '{name}'", agreed=True)
    if elsewhere := {one["name"] for one in said.values()} - {name}:
      raise LostError(f"process {self.index} is at '{name}', others are at {sorted(elsewhere)}")
    return [said[index] for index in range(self.count)]


TEAM = Processes()


def initialize(coordinator: str | None = None, processes: int | None = None, index: int | None = None) -> None:
  """Joins the run's processes: by the three values if given, else by the platform's environment.

  Must come before anything uses a device. A single process (no values, no cluster) joins nothing.

  Args:
    coordinator: host:port of process 0; 'auto': jax finds all three (a Cloud TPU VM, whose environment says nothing).
    processes: how many there are.
    index: which one this is, from 0.

  Raises:
    InputError: only some of the three are given, or they contradict each other.
    LostError: process 0 cannot be reached.
  """
  given = [value is not None for value in (coordinator, processes, index)]
  host = None
  if coordinator == "auto" and not any(given[1:]):
    jax.distributed.initialize()
  elif any(given):
    if not all(given) or not 0 <= index < processes:
      raise InputError(
        "coordinator, number of processes and index belong together, with 0 ≤ index < number",
        value={"coordinator": coordinator, "processes": processes, "index": index},
      )
    jax.distributed.initialize(coordinator, processes, index)
    host = coordinator.rpartition(":")[0]
  elif _environment_has_cluster(os.environ):
    jax.distributed.initialize()
  else:
    return
  TEAM.join(host)


def leave(status: int) -> None:
  """Ends a process of several, which is done (status 0) or cannot go on; does nothing if there is only one.

  Who is done stays until all others are: they meet and coordinate at process 0. After a failure nobody is waited for,
  as on an ordinary exit jax.distributed would for five minutes.
  """
  if not jax.distributed.is_initialized():
    return
  if status == 0:
    with contextlib.suppress(LostError, preemption.Preempted):
      TEAM.barrier("the end")
  goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  goodbye.start()
  goodbye.join(_FAREWELL_S)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _environment_has_cluster(environment) -> bool:
  if environment.get("SLURM_NTASKS", "1") == "1" and "SLURM_STEP_NODELIST" in environment:
    return False  # a SLURM job of one task
  if "," not in environment.get("TPU_WORKER_HOSTNAMES", ","):
    return False  # a TPU slice of one worker
  return any(name in environment for name in _CLUSTER_VARIABLES)


def fetch(tree: Any) -> Any:
  """A tree of global arrays as numpy arrays, whole in every process; all processes must call it."""

  def whole(leaf):
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
      return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)

  return jax.tree.map(whole, tree)


class Agreement:
  """Whether any process wants something (to stop, say), answered for all of them at the same step.

  The question goes to the devices behind the step that was dispatched before it, and the answer is that to the question
  before: nobody waits.
  """

  def __init__(self):
    if TEAM.count == 1:
      return
    mesh = Mesh(np.array(jax.devices()), ("all",))
    self._rows, self._local = NamedSharding(mesh, PartitionSpec("all")), len(mesh.local_devices)
    self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    self._answer: jax.Array | None = None

  def ask(self, wanted: bool) -> bool:
    """Every process asks at the same steps; whether one of them wanted, at this step or (several) at the one before."""
    if TEAM.count == 1:
      return wanted
    before, mine = self._answer, np.full((self._local,), wanted, np.int32)
    self._answer = self._any(jax.make_array_from_process_local_data(self._rows, mine))
    return before is not None and bool(before > 0)
