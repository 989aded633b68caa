"""Several processes as one run: who is first, who waits, and for how long."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dptdr_jax.core import preemption
from dptdr_jax.core.errors import InputError, PassingError

_log = logging.getLogger(__name__)

# Set by the platforms that start several processes and that jax.distributed can read by itself.
_CLUSTER_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES")

_FAREWELL_S = 10.0
_NOTICE_S = 30.0  # a wait that is longer is told
_LOOK_S = 0.5  # between two looks whether all have come
_MEETINGS = "dptdr_jax/meetings"
_meetings = itertools.count()

_patience_s = 86_400.0


class LostError(PassingError):
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


def share() -> dict[str, int]:
  """What `data.batches` wants to know of this process: which of how many it is, and the devices of all."""
  return {"host": process_index(), "num_hosts": process_count(), "devices": jax.device_count()}


def be_patient(seconds: float) -> None:
  """Sets how long `barrier` waits where it is not told."""
  global _patience_s
  _patience_s = seconds


def barrier(name: str, timeout_s: float | None = None, whom: str = "the others") -> None:
  """Waits until every process has come to the point called `name`.

  The processes meet at the run's coordinator and not on the devices, whose collectives give up after some minutes.

  Args:
    name: the same in every process; different names at one barrier are an error in all of them.
    timeout_s: seconds after which waiting is given up; None: those of `be_patient`.
    whom: is waited for, as messages say it.

  Raises:
    LostError: not all processes came within `timeout_s`.
    Preempted: in all processes, where one of them had been told to stop when it came.
  """
  if process_count() == 1:
    return
  _meet(name, {"stops": preemption.asked()}, _patience_s if timeout_s is None else timeout_s, whom)


def all_say(name: str, yes: bool) -> bool:
  """Whether all processes say yes; they meet for it as at `barrier`, and raise the same.

  One process alone is asked whether it was told to stop, too.
  """
  if process_count() == 1:
    preemption.check(name)
    return yes
  said = _meet(name, {"stops": preemption.asked(), "yes": yes}, _patience_s, "the others")
  return all(one["yes"] for one in said)


def tell_stop(timeout_s: float = 10.0) -> None:
  """Tells the others, at the barrier that they come to next, that this process stops; waits `timeout_s` for them.

  For a process that was told to stop (see core.preemption) where the others were not asked. If they don't come they are
  at work on something of their own, or wait for this one where it will not come: `leave` ends that.
  """
  if process_count() > 1:
    with contextlib.suppress(LostError, preemption.Preempted):
      _meet("leave", {"stops": True}, timeout_s, "the others")


def first_says(make: Callable[[], Any]) -> Any:
  """What `make` gives in process 0, in every process; something that JSON can hold. The others don't call it.

  Raises:
    LostError, Preempted: as `barrier`.
  """
  if process_count() == 1:
    return make()
  said = {"value": make()} if is_main() else {}
  return _meet("what the first says", said, _patience_s, "process 0")[0]["value"]


def _meet(name: str, said: dict, timeout_s: float, whom: str) -> list[dict]:
  """What every process says at its next meeting, by process. All come to the same meetings in the same order.

  Raises as `barrier`; who says that it 'stops' may be anywhere.
  """
  client, number = _coordinator(), next(_meetings)
  place, began, pause, told = f"{_MEETINGS}/{number}/", time.monotonic(), 0.002, False
  try:
    client.key_value_set(f"{place}{process_index()}", json.dumps(said | {"name": name}))
    while True:
      found = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client.key_value_dir_get(place)}
      missing = [index for index in range(process_count()) if index not in found]
      if not missing:
        break
      waited, who = time.monotonic() - began, f"{whom} ({', '.join(map(str, missing))} of {process_count()})"
      if waited > timeout_s:
        raise LostError(
          f"process {process_index()} waited {timeout_s:g} s at '{name}' for {who}. Look into the logs of the other "
          "processes, then start the run again: it resumes"
        )
      if waited > _NOTICE_S and not told:
        _log.info("process %d waits at '%s' for %s", process_index(), name, who)
        told = True
      time.sleep(pause)
      pause = min(2 * pause, _LOOK_S)
    if is_main() and number:  # all were at this meeting, so nobody reads of the last one any more
      client.key_value_delete(f"{_MEETINGS}/{number - 1}")
  except jax.errors.JaxRuntimeError as error:
    raise LostError(f"process {process_index()} lost the coordinator at '{name}': {error}") from error
  if any(one.get("stops") for one in found.values()):
    raise preemption.Preempted(f"all processes stop at '{name}'", agreed=True)
  if elsewhere := {one["name"] for one in found.values()} - {name}:
    raise LostError(f"process {process_index()} is at '{name}', others are at {sorted(elsewhere)}")
  return [found[index] for index in range(process_count())]


def _coordinator() -> Any:
  """The client of jax.distributed's key-value store; orbax and flax take it from the same place."""
  from jax._src import distributed

  return distributed.global_state.client


@contextlib.contextmanager
def first_goes_first(name: str) -> Iterator[None]:
  """Process 0 goes through the block, then the others."""
  if not is_main():
    barrier(f"{name}: the first", whom="process 0")
  yield
  if is_main():
    barrier(f"{name}: the first")


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
