"""The doors between the rooms are those that the architecture names (docs/architecture.md)."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "dptdr_jax"
DOORS = {
  "__init__": {"retriever", "reranker"},
  "main": {"pipeline", "runtime", "core"},
  "plan": {"stages", "runtime", "core"},
  "ablate": {"pipeline", "stages", "core"},
  "compare": {"stages", "data", "core"},
  "negatives": {"stages", "core"},
  "pipeline": {"stages", "runtime", "core"},
  "stages": {
    "stages", "retriever", "reranker", "backbone", "training", "models", "data", "retrieval", "runtime", "core",
  },
  "retriever": {"backbone", "models", "data", "runtime", "core"},
  "reranker": {"backbone", "models", "data", "runtime", "core"},
  "backbone": {"models", "data", "runtime", "core"},
  "training": {"training", "models", "core"},
  "models": {"models", "core"},
  "data": {"data", "core"},
  "retrieval": {"retrieval", "core"},
  "runtime": {"runtime", "core"},
  "core": {"core"},
}  # fmt: skip
NO_JAX = ("core", "data", "retrieval")
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: pathlib.Path) -> set[str]:
  """Dotted names of all modules that a file imports, at its top or inside its functions."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def room(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_doors(path):
  inside = {name.split(".")[1] for name in imports(path) if name.startswith("dptdr_jax.")}
  assert inside <= DOORS[room(path)]
  outside = {name.split(".")[0] for name in imports(path)}
  assert "configs" not in outside
  if room(path) in NO_JAX and path != PACKAGE / "retrieval/device.py":
    assert not outside & {"jax", "flax", "optax", "orbax"}
  if any(name.startswith("orbax") for name in imports(path)):
    assert path.relative_to(PACKAGE) == pathlib.Path("runtime/checkpoints.py")
