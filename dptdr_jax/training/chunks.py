"""Batches that fall into chunks on each device: how many, how they are cut, and what runs on a device's own rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from dptdr_jax.core.errors import InputError

WHOLE = PartitionSpec()


def chunk_count(rows: int, devices: int, chunk: int, side: str) -> int:
  """How many chunks a side's batch of `rows` falls into on each device; `chunk` 0 is all at once.

  Raises:
    InputError: names the chunk sizes that work.
  """
  if rows % devices:
    raise InputError(f"a batch of {rows} {side} rows does not divide over {devices} devices")
  share = rows // devices
  if chunk and chunk < share and share % chunk:
    works = [size for size in range(1, share + 1) if share % size == 0]
    raise InputError(
      f"a {side} chunk of {chunk} does not divide the {share} rows that each of {devices} devices holds",
      fix=f"These do: {', '.join(map(str, works))}",
    )
  return max(share // chunk, 1) if chunk else 1


def on_devices(function: Callable, mesh: Mesh, inputs: tuple, outputs: PartitionSpec) -> Callable:
  """`function` of a device's own rows, or of all where a spec says so."""
  # Without the check of what varies: it would want models to say so in every loop that starts from a constant.
  return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def split(tree: Any, chunks: int) -> Any:
  """[rows, …] → [chunks, rows / chunks, …] of every leaf."""
  return jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), tree)
