"""What a program costs: matrix operations of the traced function, collectives and memory traffic of the compiled one.

The compiler's own totals count the body of a loop once. Here a body counts as often as it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jax.extend import core

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}
_SIZES |= {"s64": 8, "u64": 8, "f64": 8}
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "after-all")
_FREE += ("copy-done", "async-done", "async-update", "partition-id", "replica-id", "iota", "call")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")


def operations(traced: Any) -> int:
  """Floating-point operations of the matrix products in a traced function, over all devices: 2 for a multiply-add.

  Args:
    traced: what `jax.jit(f).trace(…)` returns, or a (closed) jaxpr.

  Loops count with their trips, branches by the most expensive one, a `shard_map` for all of its devices.
  """
  jaxpr = traced.jaxpr if hasattr(traced, "jaxpr") else traced
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
      total += 2 * math.prod(equation.outvars[0].aval.shape) * depth
    elif name == "cond":
      total += max(operations(branch) for branch in params["branches"])
    else:
      inner = sum(operations(value) for value in _jaxprs(params))
      if name == "scan":
        inner *= params["length"]
      elif name == "shard_map":
        axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]  # jax 0.10, 0.11
        inner *= math.prod(params["mesh"].shape[axis] for axis in axes)
      total += inner
  return total


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
  """The jaxprs among an equation's parameters, without the backward passes of custom rules, which are not called."""
  for name, value in params.items():
    if name.startswith(("jvp", "fwd", "bwd")):
      continue
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, core.Jaxpr | core.ClosedJaxpr):
        yield item


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction.

  Attributes:
    kind: as XLA names it, 'all-gather' for op.
    size: bytes of its result on one device.
    times: how often it runs in one execution of the program.
    where: the traced operation that it comes from.
  """

  kind: str
  size: int
  times: int
  where: str


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  code: str
  result: str  # the text of its shape
  operands: tuple[str, ...]
  rest: str  # everything after the operands
  root: bool

  @functools.cached_property
  def size(self) -> int:
    """Bytes of the result in main memory; what lies in a chip's fast memory (S(1) and others) is free."""
    return _bytes(self.result, main_memory=True)


class Program:
  """A compiled program, parsed from `compiled.as_text()`."""

  def __init__(self, text: str):
    self._computations: dict[str, dict[str, _Instruction]] = {}
    self._entry = ""
    current: dict[str, _Instruction] | None = None
    for line in text.splitlines():
      if header := _COMPUTATION.match(line):
        current = self._computations.setdefault(header[2], {})
        self._entry = header[2] if header[1] else self._entry
      elif current is not None and " = " in line and (op := _instruction(line)) is not None:
        current[op.name] = op

  @functools.cached_property
  def times(self) -> dict[str, int]:
    """How often each computation runs that is not inside of another instruction: the entry and loops' bodies."""
    counts: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
      counts[name] = counts.get(name, 0) + times
      for op in self._computations[name].values():
        if op.code == "while":
          visit(_called(op, "body"), times * self._trips(op))
        elif op.code == "call":
          visit(_called(op, "to_apply"), times)
        elif op.code == "conditional":
          for branch in re.findall(r"%([\w.\-]+)", op.rest.partition("branch_computations={")[2].partition("}")[0]):
            visit(branch, times)

    visit(self._entry, 1)
    return counts

  def collectives(self) -> list[Collective]:
    """Every collective, in the order of the text."""
    known: dict[tuple[str, str], Collective] = {}
    for name, times in self.times.items():
      for op in self._within(name):
        # Asynchronous ones appear as a start and a done; a start's result repeats its operand.
        kind = op.code.removesuffix("-start")
        if kind not in _COLLECTIVES:
          continue
        shapes = [_bytes(part[0]) for part in _ARRAY.finditer(op.result)]
        size = max(shapes) if op.code.endswith("-start") else sum(shapes)
        where = re.search(r'op_name="([^"]*)"', op.rest)
        channel = re.search(r"channel_id=(\d+)", op.rest)
        # One that is spread over the fusions beside it appears in each of them, under one channel.
        key = kind, channel[1] if channel else op.name
        known.setdefault(key, Collective(kind, size, times, where[1] if where else ""))
    return list(known.values())

  def _within(self, name: str) -> Iterator[_Instruction]:
    """A computation's instructions, and those of the fusions and asynchronous calls in it."""
    for op in self._computations[name].values():
      yield op
      if "calls=" in op.rest:
        yield from self._within(_called(op, "calls"))

  def traffic(self) -> int:
    """Bytes that pass between main memory and the chip in one execution: what instructions read and write.

    A fusion that reads a slice of an operand counts the slice. An estimate from above: what the compiler keeps in fast
    memory between instructions without saying so is counted.
    """
    return sum(times * sum(self._moved(name)) for name, times in self.times.items())

  def _moved(self, name: str) -> Iterator[int]:
    instructions = self._computations[name]
    for op in instructions.values():
      if op.code in _FREE:
        continue
      operands = [instructions[operand] for operand in op.operands if operand in instructions]
      if op.code == "fusion":
        yield from self._fusion(_called(op, "calls"), operands, op)
      elif op.code in ("dynamic-slice", "gather"):
        yield 2 * op.size
      elif op.code == "dynamic-update-slice":
        yield 2 * operands[1].size
      else:
        yield op.size + sum(operand.size for operand in operands)

  def _fusion(self, name: str, operands: list[_Instruction], op: _Instruction) -> Iterator[int]:
    inside = self._computations[name]
    parameters = {}
    for inner in inside.values():
      if inner.code == "parameter":
        parameters[inner.name] = int(inner.rest.partition(")")[0] or 0)
    written = op.size
    for parameter, number in parameters.items():
      if number >= len(operands):
        continue
      users = [inner for inner in inside.values() if parameter in inner.operands]
      if users and all(user.code in ("dynamic-slice", "gather") and user.operands[0] == parameter for user in users):
        yield sum(min(user.size, operands[number].size) for user in users)
      elif users and all(user.code == "dynamic-update-slice" and user.operands[0] == parameter for user in users):
        update = sum(inside[user.operands[1]].size for user in users)
        written = min(written, update)  # in place
      else:
        yield operands[number].size
    yield written

  def _trips(self, loop: _Instruction) -> int:
    """How often a loop runs: as the compiler says, or from the constant that its condition compares with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
      return int(known[1])
    condition = self._computations[_called(loop, "condition")]
    root = next(op for op in condition.values() if op.root)
    numbers = [condition[name] for name in root.operands if condition.get(name, root).code == "constant"]
    if root.code == "fusion" and not numbers:
      numbers = [op for op in self._computations[_called(root, "calls")].values() if op.code == "constant"]
    values = [int(op.rest.partition(")")[0]) for op in numbers if op.rest.partition(")")[0].isdigit()]
    if len(values) != 1:
      raise ValueError(f"the trip count of {loop.name} cannot be read: {root.code} of {root.operands}")
    return values[0]


def _instruction(line: str) -> _Instruction | None:
  """`  %name = shape code(%operand, …), attributes` → its parts."""
  left, _, right = line.strip().partition(" = ")
  root, name = left.startswith("ROOT "), left.removeprefix("ROOT ").removeprefix("%")
  end = _closing(right) if right.startswith("(") else right.find(" ")  # of the shape, which may be a tuple
  code, opened, rest = right[end:].strip().partition("(")
  if not opened or not re.fullmatch(r"[\w\-]+", code):
    return None
  stop = _closing(f"({rest}") - 2
  operands = tuple(_OPERAND.findall(rest[:stop]))
  attributes = rest if code in ("constant", "parameter") else rest[stop:]
  return _Instruction(name, code, right[:end], operands, attributes, root)


def _closing(text: str) -> int:
  """The place behind the bracket that closes the one that a text begins with."""
  depth = 0
  for place, letter in enumerate(text, 1):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return place
  return len(text)


def _called(op: _Instruction, role: str) -> str:
  match = re.search(rf"\b{role}=%?([\w.\-]+)", op.rest)
  if match is None:
    raise ValueError(f"{op.name} ({op.code}) names no {role}")
  return match[1]


def _bytes(shape: str, main_memory: bool = False) -> int:
  total = 0
  for kind, dimensions, layout in _ARRAY.findall(shape):
    if kind in _SIZES and not (main_memory and re.search(r"S\([1-9]\d*\)", layout)):
      total += _SIZES[kind] * math.prod(int(number) for number in dimensions.split(",") if number)
  return total
