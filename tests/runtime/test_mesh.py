"""Rows lie on devices in order; what cannot be shared evenly is an error."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from dptdr_jax.core.errors import InputError
from dptdr_jax.runtime.mesh import by_process, make_mesh, put_batch


def test_mesh_takes_what_fsdp_leaves():
  mesh = make_mesh(fsdp=2)
  assert dict(mesh.shape) == {"data": 4, "fsdp": 2} and set(mesh.axis_types) == {AxisType.Auto}
  assert make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (-1, 0), (0, 8)])
def test_mesh_that_does_not_fit(data, fsdp):
  with pytest.raises(InputError, match="8 devices"):
    make_mesh(data, fsdp)


def test_rows_of_a_process_lie_side_by_side():
  # As a slice of 4 × 4 chips names them: a process has a square of four.
  named = [types.SimpleNamespace(id=4 * y + x, process_index=2 * (y // 2) + x // 2) for y in range(4) for x in range(4)]
  assert [device.process_index for device in by_process(named)] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
  assert [device.id for device in by_process(named)][:8] == [0, 1, 4, 5, 2, 3, 6, 7]


def test_batch_rows_are_device_major():
  batch = {"query_tokens": np.arange(32).reshape(16, 2), "blocked": np.eye(3, dtype=bool)}
  placed = put_batch(batch, make_mesh(fsdp=2))
  for number, shard in enumerate(placed["query_tokens"].addressable_shards):
    np.testing.assert_array_equal(shard.data, batch["query_tokens"][2 * number : 2 * number + 2])
  assert placed["blocked"].is_fully_replicated
  np.testing.assert_array_equal(placed["blocked"], batch["blocked"])


def test_rows_that_do_not_divide():
  with pytest.raises(InputError, match="query_tokens has 12 rows, which 8 devices"):
    put_batch({"query_tokens": np.zeros((12, 2), np.int32)}, make_mesh())
