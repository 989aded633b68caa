"""Arrays of many rows as shards on disk: shared out over processes, resumed at what is missing, read memory-mapped.

Shard i has rows [i · size, (i + 1) · size) of each array, in NAME-0000i.npy; the last one is shorter. A shard
is whole or absent. `plan.json` says how the rows are cut; it becomes `manifest.json` when all shards are there.
Vectors, runs and the scores of a cross-encoder are stored so.
"""

from __future__ import annotations

import json
import logging
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dptdr_jax.core import files, preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.team import SOLO, Team

_log = logging.getLogger(__name__)

PLAN, MANIFEST = "plan.json", "manifest.json"

# Of each array its dtype and the shape of a row: {"vectors": ("float16", (384,))}, {"scores": ("float32", (200,))}.
Arrays = Mapping[str, tuple[str, tuple[int, ...]]]


def share_out(
  directory: files.Path, count: int, size: int, arrays: Arrays, make: Callable[[range], Mapping[str, np.ndarray]], *,
  about: Mapping[str, Any] | None = None, team: Team = SOLO, what: str = "encode",
) -> Shards:  # fmt: skip
  """Makes the shards that are missing or damaged; the processes of `team` take turns at them.

  A directory that was begun with other arguments begins anew: its shards are removed, other files stay.

  Args:
    directory: of these shards; made if it is missing.
    count: rows in all.
    size: rows of a shard.
    arrays: see Arrays.
    make: rows → {name: array with as many rows}, for the names of `arrays`; stored in the dtypes of `arrays`.
    about: more entries of manifest.json.
    what: names the work in messages.

  Returns:
    The reader, in every process.

  Raises:
    Preempted: after a shard, when SIGTERM has come.
  """
  writer = ShardWriter(directory, count, size, arrays, about)
  if team.is_main:
    writer.begin()
  missing = team.first_says(writer.missing)[team.index :: team.count]
  for done, shard in enumerate(missing, 1):
    writer.write(shard, make(writer.rows(shard)))
    _log.info("%s: shard %d of %d is in %s", what, shard + 1, writer.num_shards, writer.directory)
    preemption.check(f"{what} stopped after {done} of {len(missing)} shards in {writer.directory}")
  team.barrier(f"{what}: all shards")
  if team.is_main:
    writer.finish()
  team.barrier(f"{what}: done")
  return Shards(directory, count, size, arrays)


class ShardWriter:
  """Writes shards in any order; several processes may write different ones.

  Attributes:
    directory: of the shards.
    count: rows in all.
    num_shards: how many shards there are.
  """

  def __init__(
    self, directory: files.Path, count: int, size: int, arrays: Arrays, about: Mapping[str, Any] | None = None
  ):
    """Touches nothing; see `share_out` for the arguments."""
    if count < 0 or size < 1:
      raise ValueError(f"{count} rows cannot be cut into shards of {size}")
    self.directory = pathlib.Path(directory)
    self.num_shards = -(-count // size)
    self.count, self._size, self._arrays = count, size, arrays
    described = {name: [np.dtype(dtype).name, list(shape)] for name, (dtype, shape) in arrays.items()}
    plan = {**(about or {}), "count": count, "shard_rows": size, "arrays": described}
    self._plan = json.loads(json.dumps(plan))  # as it is read back: tuples become lists

  def begin(self) -> None:
    """Writes plan.json, and removes the shards that were cut in another way. For one process, before all others."""
    if self._plan in (files.fields_in(self.directory / MANIFEST), files.fields_in(self.directory / PLAN)):
      return
    self.directory.mkdir(parents=True, exist_ok=True)
    ours = re.compile(rf"({'|'.join(map(re.escape, self._arrays))})-\d+\.npy")
    for path in self.directory.iterdir():
      if ours.fullmatch(path.name):
        path.unlink()
    (self.directory / MANIFEST).unlink(missing_ok=True)
    files.write_json(self.directory / PLAN, self._plan)

  def rows(self, shard: int) -> range:
    """The rows of a shard."""
    return range(shard * self._size, min((shard + 1) * self._size, self.count))

  def missing(self) -> list[int]:
    """The shards that are absent, cut or of another shape, in any of their arrays."""
    return [shard for shard in range(self.num_shards) if not self._is_whole(shard)]

  def _is_whole(self, shard: int) -> bool:
    try:
      for name, (dtype, shape) in self._arrays.items():
        _open_shard(self.directory, name, shard, dtype, (len(self.rows(shard)), *shape))
    except InputError:
      return False
    return True

  def write(self, shard: int, made: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays of one shard, each atomically."""
    if made.keys() != self._arrays.keys():
      raise ValueError(f"shard {shard} has the arrays {sorted(made)}, not {sorted(self._arrays)}")
    for name, (dtype, shape) in self._arrays.items():
      expected = (len(self.rows(shard)), *shape)
      if made[name].shape != expected:
        raise ValueError(f"shard {shard} of {name} has shape {made[name].shape}, not {expected}")
      with files.atomic_path(path_of(self.directory, name, shard)) as partial, open(partial, "wb") as stream:
        np.save(stream, np.ascontiguousarray(made[name], dtype))

  def finish(self) -> None:
    """Says in manifest.json that all shards are there. For one process, after all others."""
    if missing := self.missing():
      raise ValueError(f"shards {missing[:8]} are missing in {self.directory}")
    if (self.directory / PLAN).exists():
      files.rename(self.directory / PLAN, self.directory / MANIFEST)


class Shards:
  """Finished shards, memory-mapped: `len(shards)` rows, `shards[NAME]` → Column."""

  def __init__(self, directory: files.Path, count: int, size: int, arrays: Arrays):
    """Opens all shards.

    Raises:
      InputError: a shard is missing, cut, or of another shape or dtype.
    """
    directory, self._count, starts = pathlib.Path(directory), count, range(0, count, size)
    self._columns = {}
    for name, (dtype, shape) in arrays.items():
      parts = [
        _open_shard(directory, name, number, dtype, (min(size, count - start), *shape))
        for number, start in enumerate(starts)
      ]
      self._columns[name] = Column(parts, count, size, np.dtype(dtype), shape)

  @classmethod
  def open(cls, directory: files.Path) -> Shards:
    """Opens what `share_out` finished, cut as its manifest says."""
    manifest = read_manifest(directory)
    try:
      arrays = {name: (np.dtype(dtype).name, tuple(shape)) for name, (dtype, shape) in manifest["arrays"].items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
      raise InputError(f"arrays are not described ({error})", path=pathlib.Path(directory, MANIFEST)) from error
    return cls(directory, manifest["count"], manifest["shard_rows"], arrays)

  def __len__(self) -> int:
    """Number of rows."""
    return self._count

  def __getitem__(self, name: str) -> Column:
    """The array of this name."""
    return self._columns[name]


class Column:
  """One array over all its shards: `column[7]`, `column[a:b]` and `column[a:b, :k]` give plain arrays.

  Attributes:
    shape: (rows, …).
    dtype: as stored.
  """

  def __init__(self, parts: list[np.ndarray], count: int, size: int, dtype: np.dtype, row: tuple[int, ...]):
    self.shape, self.ndim, self.dtype = (count, *row), 1 + len(row), dtype
    self._parts, self._size = parts, size

  def __len__(self) -> int:
    """Number of rows."""
    return self.shape[0]

  def __getitem__(self, index: Any) -> np.ndarray:
    first, *others = index if isinstance(index, tuple) else (index,)
    if not isinstance(first, slice):
      shard, row = divmod(range(len(self))[first], self._size)
      return self._parts[shard][(row, *others)]
    start, stop, step = first.indices(len(self))
    if step != 1:
      raise IndexError("shards are read in steps of 1")
    shards = range(start // self._size, -(-stop // self._size)) if start < stop else ()
    parts = [self._parts[i][max(0, start - i * self._size) : stop - i * self._size] for i in shards]
    rows = (
      np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else np.empty((0, *self.shape[1:]), self.dtype)
    )
    return rows[(slice(None), *others)] if others else rows

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    """All rows in memory."""
    return np.asarray(self[:], dtype)

  def take(self, rows: np.ndarray) -> np.ndarray:
    """Some rows, in that order: [n, …]."""
    rows = np.asarray(rows)
    if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
      raise ValueError(f"rows go from {rows.min()} to {rows.max()}, there are {len(self)}")
    taken = np.empty((len(rows), *self.shape[1:]), self.dtype)
    shards, places = np.divmod(rows, self._size)
    for shard in np.unique(shards):
      of_shard = shards == shard
      taken[of_shard] = self._parts[shard][places[of_shard]]
    return taken

  def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, [≤ rows, …]) in order; a block never spans shards."""
    for number, part in enumerate(self._parts):
      for first in range(0, len(part), rows):
        yield number * self._size + first, part[first : first + rows]


def path_of(directory: files.Path, name: str, shard: int) -> pathlib.Path:
  """The file of one array of a shard."""
  return pathlib.Path(directory, f"{name}-{shard:05d}.npy")


def read_manifest(directory: files.Path, *, kind: str | None = None) -> dict[str, Any]:
  """What manifest.json of finished shards says.

  Args:
    directory: of the shards.
    kind: its entry "kind" must be this one.

  Raises:
    InputError: it is missing or broken, or of another kind.
  """
  path = pathlib.Path(directory, MANIFEST)
  if not path.is_file():
    raise InputError("nothing finished is here: manifest.json is missing", path=directory,
                     fix="Let the work that writes it end first")  # fmt: skip
  manifest = files.read_json(path)
  if not isinstance(manifest, dict) or kind not in (None, manifest.get("kind")):
    raise InputError(f"not the manifest of {kind or 'shards'}", path=path)
  count, size = manifest.get("count"), manifest.get("shard_rows")
  if type(count) is not int or type(size) is not int or count < 0 or size < 1:
    raise InputError("count must be a number from 0, shard_rows one from 1", path=path, value=(count, size))
  return manifest


def mapped(path: files.Path) -> np.ndarray:
  """A .npy file, memory-mapped, as a plain array: np.memmap makes every small slice several times as slow.

  Raises:
    InputError: it is missing, cut or no such file.
  """
  if not pathlib.Path(path).is_file():
    raise InputError("no such file", path=path)
  try:
    return np.asarray(np.lib.format.open_memmap(path, mode="r"))
  except Exception as error:  # what numpy raises depends on which byte of the header is damaged
    raise InputError(f"not a whole array ({error})", path=path) from error


def _open_shard(directory: pathlib.Path, name: str, shard: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
  path = path_of(directory, name, shard)
  array = mapped(path)
  if array.shape != shape or array.dtype != np.dtype(dtype) or not array.flags.c_contiguous:
    raise InputError(f"shard is {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}", path=path)
  return array
