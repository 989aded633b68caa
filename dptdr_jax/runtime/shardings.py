"""How the parameters of a backbone are sharded over the mesh: one table of rules over their names."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dptdr_jax.core.errors import InputError

# The axes that the last dimensions of a parameter are split over. Dimensions before them (the stacked layers) and
# parameters without axes stay whole. Tables are split by width: the rows of a vocabulary rarely divide.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"/(word|position|token_type|relative_positions)$", (None, "fsdp")),  # [rows, H]
  (r"/kernel$", ("fsdp", None)),  # [in, out]
  (r"/(bias|scale)$", ()),
)


def by_rules(tree: Any, mesh: Mesh, rules: tuple[tuple[str, tuple[str | None, ...]], ...] = RULES) -> Any:
  """Shardings of a backbone, or of a state that trains one: each leaf by the one rule that its name matches, scalars
  whole.

  The optimiser's moments have their parameters' names, so the same rules apply to them.

  Args:
    tree: of arrays or of jax.ShapeDtypeStruct.

  Raises:
    InputError: a rule that matches nothing, a leaf that no rule covers, a dimension that does not divide.
  """
  used = set()

  def place(path: tuple, leaf: Any) -> NamedSharding:
    name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
    if leaf.ndim == 0:
      return NamedSharding(mesh, PartitionSpec())
    matching = [number for number, (pattern, _) in enumerate(rules) if re.search(pattern, name)]
    if len(matching) != 1:
      raise InputError(f"{len(matching)} sharding rules cover a parameter, one must", value=name)
    used.update(matching)
    axes = rules[matching[0]][1]
    spec = PartitionSpec(*[None] * (leaf.ndim - len(axes)), *axes) if axes else PartitionSpec()
    for size, axis in zip(leaf.shape, spec, strict=False):
      if axis is not None and size % mesh.shape[axis]:
        raise InputError(
          f"{name} {leaf.shape} does not divide over {mesh.shape[axis]} devices along '{axis}'",
          fix="Choose an fsdp that divides the backbone's width",
        )
    return NamedSharding(mesh, spec)

  placed = jax.tree_util.tree_map_with_path(place, tree)
  idle = [pattern for number, (pattern, _) in enumerate(rules) if number not in used]
  if idle:
    raise InputError("a sharding rule matches no parameter", value=idle)
  return placed


def of_state(state: Any, mesh: Mesh) -> Any:
  """Shardings of a TrainState: by the rules if all weights are trained; prompts are small and whole everywhere."""
  if "backbone" in state.trainable:
    return by_rules(state, mesh)
  return jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec()), state)
