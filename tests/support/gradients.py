"""Loss and gradient of a training or of a pretraining step, by one process or several:
`python -m support.gradients OUT PORT PROCESSES INDEX STEPS...`. Models, states and batches are those of
tests/training."""

from __future__ import annotations

import pathlib
import sys

import jax
import numpy as np
from jax.sharding import Mesh
from training import test_contrastive, test_pretrain

from dptdr_jax.runtime import hosts
from dptdr_jax.runtime.mesh import WHOLE, make_mesh, place, put_batch
from dptdr_jax.runtime.shardings import by_rules, of_state


def of_training(mesh: Mesh) -> tuple:
  given = test_contrastive
  (model, tied), backbone = given.MODELS["tied"], given.backbone()
  config = given.ContrastiveConfig(5, 0.5, False, 0, 0)
  state = given.init_state(model.init_trainable(jax.random.key(2), backbone, tied=tied), given.OPTIMIZER)
  placed = place(state, of_state(state, mesh)), place(backbone, by_rules(backbone, mesh))
  batch = put_batch(_share(given.make_batch(), WHOLE), mesh)
  return jax.jit(lambda *values: given.loss_and_gradient(model, config, mesh, *values))(*placed, batch)


def of_pretraining(mesh: Mesh) -> tuple:
  given = test_pretrain
  model, backbone = given.MODELS["both"], given.init_params(jax.random.key(1), given.ENCODER)
  state = given.init_state(model.init_trainable(jax.random.key(2), backbone, None), given.OPTIMIZER)
  placed = place(state, by_rules(state, mesh))
  batch = put_batch(_share(given.make_batch(), ("groups",)), mesh, ("groups",))
  return jax.jit(lambda *values: given.loss_and_gradient(model, *values, seed=3, chunk=0, mesh=mesh))(placed, batch)


def _share(batch: dict[str, np.ndarray], whole: tuple[str, ...]) -> dict[str, np.ndarray]:
  """This process's rows of a batch, but of what every process has in full."""
  count, index = hosts.process_count(), hosts.process_index()
  rows = {name: slice(len(value) * index // count, len(value) * (index + 1) // count) for name, value in batch.items()}
  return {name: value if name in whole else value[rows[name]] for name, value in batch.items()}


STEPS = {"train": of_training, "pretrain": of_pretraining}


def main(out: pathlib.Path, port: str, processes: int, index: int, names: list[str]) -> None:
  """Writes OUT/NAME.npz for some of STEPS: loss [], gradient [n], from the first process."""
  if processes > 1:
    hosts.initialize(f"localhost:{port}", processes, index)
  mesh = make_mesh()
  for name in names:
    loss, _, gradient = STEPS[name](mesh)
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(hosts.fetch(gradient))]
    if hosts.is_main():
      np.savez(out / f"{name}.npz", loss=np.asarray(loss), gradient=np.concatenate(leaves))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5]), sys.argv[5:])
