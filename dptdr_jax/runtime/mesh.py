"""The mesh of devices, and how a batch lies on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dptdr_jax.core.errors import InputError

AXES = ("data", "fsdp")

# The arrays of a training batch that describe its pairs: every process has them in full.
WHOLE = ("targets", "blocked", "repeated")


def make_mesh(data: int = -1, fsdp: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Lays the devices out as `data` × `fsdp`.

  Args:
    data: devices along 'data'; -1 takes what `fsdp` leaves.
    fsdp: devices along 'fsdp', over which large parameters may be split.
    devices: all devices of all processes unless given.

  Raises:
    InputError: the two numbers do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  rows = len(devices) // fsdp if data == -1 and fsdp > 0 else data
  if rows < 1 or fsdp < 1 or rows * fsdp != len(devices):
    raise InputError(
      f"a mesh of data={data} × fsdp={fsdp} does not fit {len(devices)} devices",
      fix="Let data be -1 and fsdp a divisor of the number of devices",
    )
  # Auto: the compiler places the collectives. Not jax.make_mesh: on a TPU slice it orders the devices by their wiring,
  # so that rows of several processes would alternate, while a batch has them in the order of the processes.
  return Mesh(by_process(devices).reshape(rows, fsdp), AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def by_process(devices: Sequence[jax.Device]) -> np.ndarray:
  """Devices in the order of their processes, object [n]."""
  ordered = np.empty(len(devices), object)
  ordered[:] = sorted(devices, key=lambda device: (device.process_index, device.id))
  return ordered


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch divided over all devices of both axes."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole value on every device."""
  return NamedSharding(mesh, PartitionSpec())


def place(tree: Any, shardings: Any) -> Any:
  """A tree on a mesh, leaf by leaf as `shardings` say (a tree like it, or one for all).

  Every process has the same values and gives its own devices their parts; a part that is already there is not copied.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda leaf: shardings, tree)
  return jax.tree.map(_place_parts, tree, shardings)


def _place_parts(leaf: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
  here = {shard.device: shard for shard in leaf.addressable_shards} if isinstance(leaf, jax.Array) else {}
  parts = []
  for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
    if device in here and here[device].index == index:
      parts.append(here[device].data)
    else:
      parts.append(jax.device_put(np.asarray(leaf[index]), device))
  return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, whole: Sequence[str] = WHOLE) -> dict[str, Any]:
  """Places a batch of numpy arrays on the mesh.

  Args:
    batch: of every array but those in `whole`, this process's rows, in the order of the processes; with one process
      that is all rows.
    mesh: from `make_mesh`.
    whole: names of the small arrays that every process gives in full and every device holds in full: they describe
      all pairs of the global batch.

  Returns:
    Global arrays, rows sharded over the mesh, those in `whole` replicated.

  Raises:
    InputError: the rows do not divide evenly over the devices.
  """
  rows, everywhere = batch_sharding(mesh), replicated(mesh)
  devices = len(mesh.local_devices)
  placed = {}
  for name, value in batch.items():
    if name not in whole and value.shape[0] % devices:
      raise InputError(
        f"{name} has {value.shape[0]} rows, which {devices} devices cannot share evenly",
        fix="Choose a batch that is a multiple of the number of devices",
      )
    sharding, shape = (everywhere, value.shape) if name in whole else (rows, None)
    placed[name] = jax.make_array_from_process_local_data(sharding, value, shape)
  return placed
