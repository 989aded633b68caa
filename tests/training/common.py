"""A small encoder, meshes and distances, for all tests of training."""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.convert import init_params
from dptdr_jax.runtime.mesh import make_mesh

# A larger initial scale than usual, so that vectors and gradients are far from 0.
ENCODER = EncoderConfig(
  "bert", vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=40,
  initializer_range=0.2,
)  # fmt: skip


@functools.cache
def mesh_of(devices, fsdp=1):
  return make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])


@functools.cache
def backbone():
  return init_params(jax.random.key(1), ENCODER)


def put(tree, devices=1):
  """Whole on each of the first `devices`: jit counts a call with arrays placed otherwise as another one."""
  return jax.device_put(tree, NamedSharding(mesh_of(devices), PartitionSpec()))


def distance(left, right):
  """Relative L2 over all leaves."""
  left, right = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (left, right))
  return np.linalg.norm(left - right) / np.linalg.norm(right)
