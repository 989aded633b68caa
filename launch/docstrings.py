"""Writes the docstrings of installed Python packages as a BEIR folder: the summary asks, name and body answer.

python launch/docstrings.py --out=DIR [--packages=numpy,… --test_modules=… --dev_modules=…]

A pair is one function, class or method: the query is the first sentence of its docstring, the passage its qualified
name (title; private parts such as `_src` left out) and the rest of the docstring (text). The corpus is all pairs of all
splits. Packages are parsed and never imported; the folder depends on their files alone. Running the script again writes
nothing unless files or options have changed. A folder that holds something else is refused.
"""

from __future__ import annotations

import argparse
import ast
import collections
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import os
import pathlib
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from near_duplicates import DuplicateFinder, body_words, summary_words

from dptdr_jax.core import files, marks, progress
from dptdr_jax.core.errors import DptdrError, InputError

STDLIB = "stdlib"  # not a package: the standard library, whose modules keep their own names
SPLITS = ("train", "dev", "test")
ABOUT = "docstrings.json"  # what a folder was made from; it also says that the folder is ours
FORMAT = 1
MIN_SUMMARY_WORDS = 4  # shorter summaries ask nothing
MIN_BODY_WORDS = 15  # shorter bodies answer nothing

# Directories of tests, of copies of other packages, and of applications.
_SKIPPED_DIRECTORIES = frozenset(
  ("__pycache__", "test", "tests", "testdata", "benchmarks", "examples")
  + ("_vendor", "_vendored", "vendor", "vendored", "third_party", "extern", "externals", "site-packages", "distutils")
  + ("ensurepip", "idlelib", "lib2to3", "turtledemo")
)
_SKIPPED_FILE = re.compile(r"test_.*|.*_tests?|conftest|setup")
_ROLE = re.compile(r":[\w.+:-]+:`[~!]?([^`<]+?)(?:\s*<[^`>]*>)?`_*")  # :func:`~numpy.sum` reads numpy.sum
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]'\"][.!?])\s+(?=[A-Z])")
_UNDERLINE = re.compile(r"^\s*([=\-~*^#.])\1{2,}\s*$", re.MULTILINE)
_SIGNATURE = re.compile(r"[\w.]+\(.*\)(\s*->.*)?", re.DOTALL)


class Pair(NamedTuple):
  """One documented object: `name` dotted and public, `summary` its first sentence, `body` the rest."""

  name: str
  summary: str
  body: str

  @property
  def query_id(self) -> str:
    """Differs from the passage's id: tools drop hits that have the query's own id."""
    return f"q:{self.name}"


@dataclasses.dataclass(frozen=True)
class Options:
  """What is read.

  Attributes:
    packages: importable top-level names, or "stdlib". The default ones are installed with this project.
    test_modules: dotted names; these modules and those below them are the test split.
    dev_modules: the same for dev; if both match, the longer name wins. The rest is train.
  """

  packages: tuple[str, ...] = (STDLIB, "numpy", "scipy", "optax")
  test_modules: tuple[str, ...] = ("numpy",)
  dev_modules: tuple[str, ...] = ("scipy.signal", "optax")

  @property
  def splits(self) -> tuple[str, ...]:
    """Training first; of the others those that have modules."""
    return ("train", *(["dev"] if self.dev_modules else []), *(["test"] if self.test_modules else []))

  def split_of(self, name: str) -> str:
    """The split of an object."""
    held_out = [(m, "test") for m in self.test_modules] + [(m, "dev") for m in self.dev_modules]
    matches = [(len(module), split) for module, split in held_out if _is_in(name, module)]
    return max(matches)[1] if matches else "train"


def write_folder(out: str | pathlib.Path, options: Options) -> bool:
  """Writes the BEIR folder `out`, unless it was written from the same files with the same options.

  Returns:
    Whether it was written.

  Raises:
    InputError: a package is not installed, a module has no docstring, or `out` holds something else.
  """
  out = pathlib.Path(out)
  modules = [module for package in options.packages for module in _python_files(package)]
  about = {"format": FORMAT, "python": platform.python_version(), **_lists(options), "files": _digest(modules)}
  if _about(out).items() >= about.items() and _files(out) == _names(options):
    return False
  marks.check_replaceable(out, _is_ours)
  pairs, counts = read_pairs(modules, options)
  with files.atomic_directory(out) as partial:
    corpus = sorted(pair for kept in pairs.values() for pair in kept)
    _write_lines(partial / "corpus.jsonl", ({"_id": p.name, "title": p.name, "text": p.body} for p in corpus))
    queries = (pair for kept in pairs.values() for pair in kept)
    _write_lines(partial / "queries.jsonl", ({"_id": pair.query_id, "text": pair.summary} for pair in queries))
    (partial / "qrels").mkdir()
    for split, judged in pairs.items():
      lines = ("query-id\tcorpus-id\tscore", *(f"{pair.query_id}\t{pair.name}\t1" for pair in judged))
      (partial / "qrels" / f"{split}.tsv").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    files.write_json(partial / ABOUT, about | {"counts": counts})
  return True


def read_pairs(
  modules: Sequence[tuple[str, pathlib.Path]], options: Options
) -> tuple[dict[str, list[Pair]], dict[str, int]]:
  """Returns the pairs of each split that has any modules, and how many were read and dropped, and why.

  Of an object that is documented twice one stays, and near-duplicates are in one split only: test before dev before
  train. A summary that objects with different bodies share says nothing about either, and all of them are dropped.
  """
  counts: collections.Counter[str] = collections.Counter()
  by_split: dict[str, list[Pair]] = {split: [] for split in SPLITS}
  for pair in _documented_pairs(modules, counts):
    by_split[options.split_of(pair.name)].append(pair)
  for split, held_out in (("test", options.test_modules), ("dev", options.dev_modules)):
    for module in held_out:
      if not any(_is_in(pair.name, module) for pair in by_split[split]):
        raise InputError(f"no docstring for {split} in this module", value=module, fix=f"See --{split}_modules")
  kept: dict[str, list[Pair]] = {split: [] for split in SPLITS}
  finder = DuplicateFinder()
  for split in reversed(SPLITS):
    distinct = _drop_repeated(by_split[split], counts)
    kept[split] = [pair for pair in distinct if not finder.has_duplicate(*pair)]
    counts[f"dropped from {split}: near-duplicate of a pair held out"] = len(distinct) - len(kept[split])
    if split != "train":
      finder.add(kept[split])
  counts.update({f"kept in {split}": len(kept[split]) for split in SPLITS})
  return {split: kept[split] for split in options.splits}, counts


def _documented_pairs(modules: Sequence[tuple[str, pathlib.Path]], counts: collections.Counter[str]) -> Iterator[Pair]:
  seen = set()
  for module, path in progress.track(modules, "docstrings", unit="file"):
    counts["files read"] += 1
    tree = _parse(path)
    if tree is None:
      counts["files skipped: cannot be parsed"] += 1
      continue
    for name, docstring in _documented(tree.body, module):
      counts["docstrings read"] += 1
      summary, body = split_docstring(docstring)
      if len(summary.split()) < MIN_SUMMARY_WORDS:
        counts["dropped: short summary"] += 1
      elif len(body_words(body)) < MIN_BODY_WORDS:
        counts["dropped: short body"] += 1
      elif name in seen:
        counts["dropped: same name"] += 1
      else:
        seen.add(name)
        yield Pair(name, summary, body)


def split_docstring(docstring: str) -> tuple[str, str]:
  """Splits a docstring into its first sentence, free of markup, and the rest, dedented.

  A signature in front, as C extensions have it, and the underline of a heading are left out.
  """
  text = _UNDERLINE.sub("", inspect.cleandoc(docstring)).strip()
  first, _, rest = text.partition("\n\n")
  if _SIGNATURE.fullmatch(first.strip()):
    first, _, rest = rest.strip().partition("\n\n")
  sentence, *others = _SENTENCE_END.split(first, maxsplit=1)
  summary = " ".join(_ROLE.sub(r"\1", sentence).replace("`", "").split())
  body = "\n\n".join(part.strip("\n") for part in (*others, rest) if part.strip())
  return summary, body


def _python_files(package: str) -> Iterator[tuple[str, pathlib.Path]]:
  """Yields (public module name, path) of a package's files, sorted, without tests and copied packages."""
  for root, prefix in _roots(package):
    if root.is_file():
      yield prefix, root
      continue
    for directory, children, names in os.walk(root):
      children[:] = sorted(child for child in children if child not in _SKIPPED_DIRECTORIES)
      for name in sorted(names):
        stem, suffix = os.path.splitext(name)
        if suffix != ".py" or _SKIPPED_FILE.fullmatch(stem):
          continue
        path = pathlib.Path(directory, name)
        module = _public(prefix, *path.relative_to(root).with_suffix("").parts)
        if module:  # the standard library has top modules that are private as a whole
          yield module, path


def _roots(package: str) -> list[tuple[pathlib.Path, str]]:
  """Directories (or the one file) of a package, and the dotted prefix of its modules. Nothing is imported."""
  if package == STDLIB:
    return [(pathlib.Path(sysconfig.get_path("stdlib")), "")]
  try:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
  except ValueError:  # a module that lies about its spec
    spec = None
  if spec is None:
    raise InputError("no such package is installed", value=package, fix="Install it or remove it from --packages")
  if spec.submodule_search_locations is not None:
    return [(pathlib.Path(place), package) for place in sorted(spec.submodule_search_locations)]
  if spec.origin is None or not spec.origin.endswith(".py"):
    raise InputError("this package has no Python source", value=package, fix="Remove it from --packages")
  return [(pathlib.Path(spec.origin), package)]


def _parse(path: pathlib.Path) -> ast.Module | None:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about invalid escapes in strings of other projects
    try:
      return ast.parse(path.read_bytes())  # bytes: the parser reads the declared encoding
    except (SyntaxError, ValueError, RecursionError):
      return None


def _documented(body: Iterable[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
  """Yields (qualified name, docstring) of the public objects of a module or class body."""
  for node in body:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      if node.name.startswith("_"):
        continue
      name = f"{prefix}.{node.name}"
      docstring = ast.get_docstring(node, clean=False)
      if docstring:
        yield name, docstring
      if isinstance(node, ast.ClassDef):
        yield from _documented(node.body, name)
    elif isinstance(node, ast.If | ast.Try):
      yield from _documented([*node.body, *node.orelse, *getattr(node, "finalbody", ())], prefix)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
      yield from _added(node.value, prefix)


def _added(call: ast.Call, prefix: str) -> Iterator[tuple[str, str]]:
  """Yields from `add_newdoc([place, ]name, docstring)`, by which numpy and scipy document C code."""
  if getattr(call.func, "id", getattr(call.func, "attr", None)) != "add_newdoc":
    return
  values = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
  if len(values) != len(call.args) or len(values) not in (2, 3) or not all(isinstance(v, str) for v in values):
    return
  *place, name, docstring = values
  if not name.startswith("_"):
    yield _public(*(place[0].split(".") if place else [prefix]), name), docstring


def _drop_repeated(pairs: list[Pair], counts: collections.Counter[str]) -> list[Pair]:
  """Keeps the first of the pairs that share a body; drops all pairs that share a summary and not the body."""
  bodies: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
  kept = []
  seen_bodies = set()
  for pair in pairs:
    bodies.setdefault(summary_words(pair.summary), []).append(body_words(pair.body))
  for pair in pairs:
    body = body_words(pair.body)
    if len(set(bodies[summary_words(pair.summary)])) > 1:
      counts["dropped: summary of several objects"] += 1
    elif body in seen_bodies:
      counts["dropped: repeated body"] += 1
    else:
      seen_bodies.add(body)
      kept.append(pair)
  return kept


def _public(*parts: str) -> str:
  return ".".join(part for part in parts if part and not part.startswith("_"))


def _is_in(name: str, module: str) -> bool:
  return name == module or name.startswith(f"{module}.")


def _lists(options: Options) -> dict[str, list[str]]:
  return {name: list(value) for name, value in dataclasses.asdict(options).items()}


def _digest(modules: Iterable[tuple[str, pathlib.Path]]) -> str:
  """SHA-256 over names and contents of all modules."""
  digest = hashlib.sha256()
  for module, path in modules:
    digest.update(f"{module} ".encode() + hashlib.sha256(path.read_bytes()).digest())
  return digest.hexdigest()


def _about(folder: pathlib.Path) -> dict[str, Any]:
  """What docstrings.json says; nothing if there is none that can be read."""
  try:
    about = files.read_json(folder / ABOUT)
  except InputError:
    return {}
  return about if isinstance(about, dict) else {}


def _names(options: Options) -> set[str]:
  return {ABOUT, "corpus.jsonl", "queries.jsonl", *(f"qrels/{split}.tsv" for split in options.splits)}


def _files(folder: pathlib.Path) -> set[str]:
  return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _is_ours(folder: pathlib.Path) -> bool:
  return "format" in _about(folder) and _files(folder) <= _names(Options())


def _write_lines(path: pathlib.Path, rows: Iterable[dict[str, str]]) -> None:
  with open(path, "w", encoding="utf-8") as stream:
    stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
  """Parses the flags and writes the folder; returns the exit status, 2 for an error of input."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", required=True, help="the folder")
  for field in dataclasses.fields(Options):
    parser.add_argument(f"--{field.name}", default=",".join(field.default), help="default: %(default)s")
  given = vars(parser.parse_args(arguments))
  out = given.pop("out")
  try:
    written = write_folder(out, Options(**{name: tuple(filter(None, v.split(","))) for name, v in given.items()}))
  except (DptdrError, OSError) as error:
    sys.stderr.write(f"error: {error}\n")
    return 2
  except KeyboardInterrupt:
    return 130
  counts = _about(pathlib.Path(out))["counts"]
  sizes = ", ".join(f"{counts[f'kept in {split}']} {split}" for split in SPLITS)
  progress.say(f"{out}: {'written' if written else 'unchanged'}; docstrings: {sizes}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
