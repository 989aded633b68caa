"""The doors between the rooms are those that the architecture names (docs/architecture.md)."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "dptdr_jax"
BELOW = {"models", "data", "retrieval", "runtime", "core"}
FACE = {"retriever", "reranker", "backbone"}
COMMAND = {"pipeline", "serving", "reporting", "settings", "core"}
DOORS = {
  "__init__": {"retriever", "reranker"},
  "main": COMMAND | {"runtime"},
  "plan": COMMAND | {"training", "models", "runtime"},
  "serve": {"serving", "core"},
  "ablate": COMMAND, "compare": COMMAND, "negatives": COMMAND,
  "pipeline": {"pipeline", "reporting", "settings", "training"} | FACE | BELOW,
  "serving": {"serving"} | FACE | BELOW,
  "reporting": {"reporting", "retrieval", "core"},
  "settings": {"core"},
  "training": {"training", "settings", "models", "data", "runtime", "core"},
  "retriever": {"backbone", "models", "data", "runtime", "core"},
  "reranker": {"backbone", "models", "data", "runtime", "core"},
  "backbone": {"models", "data", "runtime", "core"},
  "models": {"models", "core"},
  "data": {"data", "core"},
  "retrieval": {"retrieval", "core"},
  "runtime": {"runtime", "core"},
  "core": {"core"},
}  # fmt: skip
NO_JAX = ("core", "data", "retrieval", "reporting", "settings")
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: pathlib.Path) -> set[str]:
  """Dotted names of all modules that a file imports, at its top or inside its functions."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def room(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_room_imports_only_what_its_doors_allow(path):
  inside = {name.split(".")[1] for name in imports(path) if name.startswith("dptdr_jax.")}
  assert inside <= DOORS[room(path)]
  outside = {name.split(".")[0] for name in imports(path)}
  assert "configs" not in outside
  if room(path) in NO_JAX and path != PACKAGE / "retrieval/device.py":
    assert not outside & {"jax", "flax", "optax", "orbax"}
  if "orbax" in outside:
    assert path.relative_to(PACKAGE) == pathlib.Path("runtime/checkpoints.py")


def test_no_private_jax_import():
  private = [(path.name, name) for path in FILES for name in imports(path) if name.startswith("jax._src")]
  assert not private


def test_files_and_functions_can_be_read_in_one_sitting():
  long = []
  for path in FILES:
    text = path.read_text(encoding="utf-8")
    if len(text.splitlines()) > 400:
      long.append(path.name)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long += [f"{path.name}:{node.name}" for node in nodes if node.end_lineno - node.lineno + 1 > 60]
  assert not long
