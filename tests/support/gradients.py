"""Loss and gradient of a training or a pretraining step, by one process or several:
`python -m support.gradients OUT PORT PROCESSES INDEX STEPS...`. Models, states and batches are those of tests/training.
"""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from training import test_contrastive, test_pretrain
from training.common import backbone

from dptdr_jax.runtime import hosts
from dptdr_jax.runtime.hosts import TEAM
from dptdr_jax.runtime.mesh import WHOLE, make_mesh, place, put_batch
from dptdr_jax.runtime.shardings import by_rules, of_state
from dptdr_jax.training.pretrain import loss_and_gradient
from dptdr_jax.training.state import init_state


def of_training(mesh: Mesh) -> tuple:
  (model, tied), frozen = test_contrastive.MODELS["tied"], backbone()
  state = init_state(model.init_trainable(jax.random.key(2), frozen, tied=tied), test_contrastive.OPTIMIZER)
  placed = place(state, of_state(state, mesh)), place(frozen, by_rules(frozen, mesh))
  return jax.jit(test_contrastive.run_of("tied", mesh))(*placed, _put(test_contrastive.make_batch(), WHOLE, mesh))


def of_pretraining(mesh: Mesh) -> tuple:
  model = test_pretrain.MODELS["both"]
  state = init_state(model.init_trainable(jax.random.key(2), backbone(), None), test_pretrain.OPTIMIZER)
  run = jax.jit(functools.partial(loss_and_gradient, model, seed=3, chunk=0, mesh=mesh))
  return run(place(state, by_rules(state, mesh)), _put(test_pretrain.make_batch(), ("groups",), mesh))


def _put(batch: dict[str, np.ndarray], whole: Sequence[str], mesh: Mesh) -> dict[str, jax.Array]:
  """Places this process's rows of a batch, and all of what every process has in full."""
  rows = {name: slice(len(value) * TEAM.index // TEAM.count, len(value) * (TEAM.index + 1) // TEAM.count)
          for name, value in batch.items()}  # fmt: skip
  return put_batch({name: value if name in whole else value[rows[name]] for name, value in batch.items()}, mesh, whole)


STEPS = {"train": of_training, "pretrain": of_pretraining}


def main(out: pathlib.Path, port: str, processes: int, index: int, names: list[str]) -> None:
  """Writes OUT/NAME.npz for some of STEPS: loss [], gradient [n], from process 0."""
  if processes > 1:
    hosts.initialize(f"localhost:{port}", processes, index)
  mesh = make_mesh()
  for name in names:
    loss, _, gradient = STEPS[name](mesh)
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(hosts.fetch(gradient))]
    if TEAM.is_main:
      np.savez(out / f"{name}.npz", loss=np.asarray(loss), gradient=np.concatenate(leaves))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5]), sys.argv[5:])
