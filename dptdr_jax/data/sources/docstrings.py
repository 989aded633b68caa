"""Docstrings of installed Python packages as retrieval data: the summary line asks, name and body answer.

Sources are parsed with `ast` and never imported. What is read depends on the installed versions alone: packages in
the order given, files sorted, and no clock, hash seed or file date has a say.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import importlib.util
import inspect
import logging
import os
import pathlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dptdr_jax.core import progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.records import Judgement, Negatives, Passage, Query
from dptdr_jax.data.sources.twins import TwinFinder, body_words, summary_words

_log = logging.getLogger(__name__)

STDLIB = "stdlib"  # not a package: the standard library, whose modules keep their own names
SPLITS = ("train", "dev", "test")

# Guaranteed by requirements.txt, directly or through what it requires.
PACKAGES = (STDLIB, "numpy", "scipy", "jax", "flax", "optax", "orbax", "matplotlib", "absl", "ml_collections")
TEST_MODULES = ("numpy", "optax", "flax")
DEV_MODULES = ("scipy.signal", "orbax")

# Directories that hold tests, copies of other packages, or applications and no library.
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


@dataclasses.dataclass(frozen=True)
class DocstringSource:
  """Queries and passages out of docstrings, split by module, without twins across the splits.

  A pair is one function, class or method: the query is its summary, the passage its qualified name (title; private
  parts such as `_src` left out) and the rest of its docstring (text). The corpus is all pairs of all splits. Of what
  is documented twice one is kept, test before dev before train; see `twins` for what is too similar to stand on both
  sides of the split. A summary shared by objects with different bodies tells nothing apart and goes with all of them.

  Attributes:
    packages: importable top-level names, or "stdlib".
    test_modules: dotted names; what lies in or under them is the test split.
    dev_modules: the same for dev; the longer name wins where both match. All else is train.
    min_summary_words: shorter summaries ask nothing.
    min_body_words: shorter bodies answer nothing.

  Raises:
    InputError: on use, where a package is not installed or a module names nothing that was read.
  """

  packages: tuple[str, ...] = PACKAGES
  test_modules: tuple[str, ...] = TEST_MODULES
  dev_modules: tuple[str, ...] = DEV_MODULES
  min_summary_words: int = 4
  min_body_words: int = 15

  def splits(self) -> tuple[str, ...]:
    """The splits, training first; of the others those that have modules."""
    held_out = {"dev": self.dev_modules, "test": self.test_modules}
    return tuple(split for split in SPLITS if held_out.get(split, True))

  def passages(self) -> Iterator[Passage]:
    """Yields the whole corpus: the passages of all splits, sorted by id."""
    pairs = sorted(pair for split in SPLITS for pair in self._kept[0][split])
    for pair in pairs:
      yield Passage(pair.name, pair.name, pair.body)

  def queries(self, split: str) -> Iterator[Query]:
    """Yields a split's queries; ids differ from passage ids, because tools drop hits of the query's own id."""
    for pair in self._pairs(split):
      yield Query(_query_id(pair), pair.summary)

  def judgements(self, split: str) -> Iterator[Judgement]:
    """Yields one judgement of grade 1 a query: its own passage."""
    for pair in self._pairs(split):
      yield Judgement(_query_id(pair), pair.name, 1)

  def negatives(self, split: str) -> Iterator[Negatives]:
    """Yields nothing: docstrings come without hard negatives."""
    self._pairs(split)
    return iter(())

  def files(self, split: str | None = None) -> list[pathlib.Path]:
    """Every source file that is read, in order; all of them decide about every split."""
    return [path for package in self.packages for _, path in _python_files(package)]

  @property
  def counts(self) -> dict[str, int]:
    """What was read, what was dropped and why, and what is left in each split."""
    return dict(self._kept[1])

  def _pairs(self, split: str) -> list[Pair]:
    if split not in SPLITS:
      raise InputError(f"no such split; docstrings have {', '.join(SPLITS)}", value=split)
    return self._kept[0][split]

  @functools.cached_property
  def _kept(self) -> tuple[dict[str, list[Pair]], dict[str, int]]:
    counts: collections.Counter[str] = collections.Counter()
    by_split: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    for pair in self._read(counts):
      by_split[self._split_of(pair.name)].append(pair)
    self._check_modules(by_split)
    kept: dict[str, list[Pair]] = {}
    finder = TwinFinder()
    for split in reversed(SPLITS):  # what is held out is chosen first, training takes what is left
      distinct = _drop_repeated(by_split[split], counts)
      kept[split] = [pair for pair in distinct if not finder.has_twin(pair.name, pair.summary, pair.body)]
      counts[f"dropped from {split}: twin of a pair held out"] = len(distinct) - len(kept[split])
      if split != "train":
        finder.add((pair.name, pair.summary, pair.body) for pair in kept[split])
    counts.update({f"kept in {split}": len(kept[split]) for split in SPLITS})
    for reason, n in counts.items():
      _log.info("docstrings: %s: %d", reason, n)
    return kept, dict(counts)

  def _read(self, counts: collections.Counter[str]) -> Iterator[Pair]:
    seen = set()
    sources = [source for package in self.packages for source in _python_files(package)]
    for module, path in progress.track(sources, "docstrings", unit="file"):
      counts["files read"] += 1
      tree = _parse(path)
      if tree is None:
        counts["files skipped: cannot be parsed"] += 1
        continue
      for name, docstring in _documented(tree.body, module):
        counts["docstrings read"] += 1
        summary, body = split_docstring(docstring)
        if len(summary.split()) < self.min_summary_words:
          counts["dropped: short summary"] += 1
        elif len(body_words(body)) < self.min_body_words:
          counts["dropped: short body"] += 1
        elif name in seen:
          counts["dropped: same name"] += 1
        else:
          seen.add(name)
          yield Pair(name, summary, body)

  def _split_of(self, name: str) -> str:
    held_out = [(m, "test") for m in self.test_modules] + [(m, "dev") for m in self.dev_modules]
    matches = [(len(module), split) for module, split in held_out if _is_in(name, module)]
    return max(matches)[1] if matches else "train"

  def _check_modules(self, by_split: dict[str, list[Pair]]) -> None:
    for split, modules in (("test", self.test_modules), ("dev", self.dev_modules)):
      for module in modules:
        if not any(_is_in(pair.name, module) for pair in by_split[split]):
          raise InputError(f"no docstring for {split} in this module", value=module, fix=f"See {split}_modules")


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
  """Yields (public module name, path) of a package's source files, sorted, tests and copied packages left out."""
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
  """Where a package's sources lie, and the dotted prefix of its modules. Finding a top-level name imports nothing."""
  if package == STDLIB:
    return [(pathlib.Path(sysconfig.get_path("stdlib")), "")]
  try:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
  except ValueError:  # a module that lies about its spec
    spec = None
  if spec is None:
    raise InputError("no such package is installed", value=package, fix="Install it, or take it off the packages")
  if spec.submodule_search_locations is not None:
    return [(pathlib.Path(place), package) for place in sorted(spec.submodule_search_locations)]
  if spec.origin is None or not spec.origin.endswith(".py"):
    raise InputError("this package has no Python source", value=package, fix="Take it off the packages")
  return [(pathlib.Path(spec.origin), package)]


def _parse(path: pathlib.Path) -> ast.Module | None:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # invalid escapes in others' strings are not this run's business
    try:
      return ast.parse(path.read_bytes())  # bytes: the parser minds the encoding that a file declares
    except (SyntaxError, ValueError, RecursionError):
      return None


def _documented(body: Iterable[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
  """Yields (qualified name, docstring) of what a module or class body defines in public."""
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
  """Yields what `add_newdoc(place, name, docstring)` or `add_newdoc(name, docstring)` says: numpy's, scipy's C code."""
  if getattr(call.func, "id", getattr(call.func, "attr", None)) != "add_newdoc":
    return
  values = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
  if len(values) != len(call.args) or len(values) not in (2, 3) or not all(isinstance(v, str) for v in values):
    return
  *place, name, docstring = values
  if not name.startswith("_"):
    yield _public(*(place[0].split(".") if place else [prefix]), name), docstring


def _drop_repeated(pairs: list[Pair], counts: collections.Counter[str]) -> list[Pair]:
  """Keeps the first of pairs with one summary and one body, and of one body; drops a summary of several bodies."""
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


def _query_id(pair: Pair) -> str:
  return f"q:{pair.name}"
