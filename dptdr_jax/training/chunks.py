"""How a batch is cut into chunks on each device, and what runs on a device's own rows.

Rows of a batch are sharded over both axes of the mesh. Along 'data' every device works on its own rows and sums its own
gradient (shard_map); the gradient crosses devices once a step. Left to the compiler it would be an all-reduce for each
layer of each chunk. Along 'fsdp' the compiler gathers a layer's weights where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dptdr_jax.core.errors import InputError

WHOLE, ROWS, _INNER = PartitionSpec(), PartitionSpec("data"), PartitionSpec("fsdp")


def chunk_count(rows: int, devices: int, chunk: int, side: str) -> int:
  """Number of chunks on each device for a batch of `rows`; `chunk` 0 is all at once.

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
  """`function` on each place along 'data', with its own rows or all of them, as the specs say; 'fsdp' stays the
  compiler's."""

  def change(arguments: tuple, index: Any) -> tuple:
    """Adds or takes off a leading axis of the whole arguments: with it their gradient is not summed over 'data'."""
    if not is_one_place(mesh):
      return arguments
    pairs = zip(arguments, inputs, strict=True)
    return tuple(jax.tree.map(lambda x: x[index], tree) if spec == WHOLE else tree for tree, spec in pairs)

  # Without the check of what varies: it would want models to say so in every loop that starts from a constant.
  run = jax.shard_map(
    lambda *arguments: function(*change(arguments, 0)), mesh=mesh, out_specs=outputs, axis_names={"data"},
    in_specs=(ROWS,) * len(inputs) if is_one_place(mesh) else inputs, check_vma=False,
  )  # fmt: skip
  return lambda *arguments: run(*change(arguments, None))


def on_all(function: Callable, mesh: Mesh, arguments: int) -> Callable:
  """The whole `function` on every device: for what is small and must have the same bits everywhere."""
  return jax.shard_map(function, mesh=mesh, in_specs=(WHOLE,) * arguments, out_specs=WHOLE, check_vma=False)


def is_one_place(mesh: Mesh) -> bool:
  """Whether all devices are along 'fsdp'. XLA fails on sums of sharded arrays over a manual axis of one (jax 0.10)."""
  return mesh.shape["data"] == 1 and mesh.size > 1


def share_inner(tree: Any) -> Any:
  """Shards rows along 'fsdp' too, within a place along 'data'; call it inside `on_data`."""
  sharding = NamedSharding(jax.sharding.get_abstract_mesh(), _INNER)
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)


def split(tree: Any, chunks: int) -> Any:
  """[rows, …] → [chunks, rows / chunks, …] of every leaf."""
  return jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), tree)


def sum_chunks(
  function: Callable[[Any], tuple[Any, Any]], zero: Any, rows: Any, chunks: int, mesh: Mesh
) -> tuple[Any, Any]:
  """Runs `function` chunk by chunk; call it inside `on_data`.

  Args:
    function: a chunk → (tree to sum, tree of arrays by row to keep; may be None).
    zero: a tree like the first, of zeros.

  Returns:
    The sum over the chunks of all devices; what was kept, by row.
  """

  def add(total, chunk):
    summed, kept = function(share_inner(chunk))
    return jax.tree.map(jnp.add, total, summed), kept

  total, kept = jax.lax.scan(add, zero, split(rows, chunks))
  kept = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), kept)
  return (total if is_one_place(mesh) else jax.lax.psum(total, "data")), kept
