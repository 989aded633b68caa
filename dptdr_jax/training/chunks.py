"""Batches that fall into chunks on each device: how many, how they are cut, and what runs on a device's own rows.

Rows of a batch lie on both axes of the mesh. Along 'data' every device works on its own rows and adds up its own
gradient (shard_map), which crosses once a step; left to the compiler it would be an all-reduce for each layer of each
chunk. Along 'fsdp' the compiler gathers a layer's weights where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dptdr_jax.core.errors import InputError

WHOLE, ROWS, _INNER = PartitionSpec(), PartitionSpec("data"), PartitionSpec("fsdp")


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


def on_data(function: Callable, mesh: Mesh, inputs: tuple, outputs: Any) -> Callable:
  """`function` by each place along 'data', of its own rows or of all, as the specs say; 'fsdp' stays the compiler's."""
  # Without the check of what varies: it would want models to say so in every loop that starts from a constant.
  return jax.shard_map(
    function, mesh=mesh, in_specs=inputs, out_specs=outputs, axis_names={"data"}, check_vma=False
  )  # fmt: skip


def on_all(function: Callable, mesh: Mesh, arguments: int) -> Callable:
  """`function` by every device, all of it: for what is small, and should have the same bits everywhere."""
  return jax.shard_map(function, mesh=mesh, in_specs=(WHOLE,) * arguments, out_specs=WHOLE, check_vma=False)


def share_inner(tree: Any) -> Any:
  """Rows shared out along 'fsdp' too, within a place along 'data'."""
  sharding = NamedSharding(jax.sharding.get_abstract_mesh(), _INNER)
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)


def split(tree: Any, chunks: int) -> Any:
  """[rows, …] → [chunks, rows / chunks, …] of every leaf."""
  return jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), tree)
