"""Checkpoints of a training state, by orbax: written in the background, whole or absent, checked when read."""

from __future__ import annotations

import collections
import contextlib
import gc
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError
from dptdr_jax.runtime import hosts

_log = logging.getLogger(__name__)

_STARTS = 2  # of several processes that meet a damaged checkpoint before it is set aside: no two die at the same place

State = TypeVar("State")


class Checkpoints:
  """The checkpoints of one run in one directory, a subdirectory a step.

  What a killed save left behind is removed on opening. Every process of the run opens the same directory and calls the
  same methods in the same order.
  """

  def __init__(self, directory: str | os.PathLike, keep: int = 2):
    """Opens the directory, making it if needed; `keep` is how many of the newest steps stay."""
    self.directory = pathlib.Path(directory).absolute()
    self.directory.mkdir(parents=True, exist_ok=True)
    logging.getLogger("absl").addFilter(_is_news)
    self._keep = keep
    self._orbax = self._open()

  def steps(self) -> list[int]:
    """The steps that have a finished checkpoint, ascending."""
    return [checkpoint.step for checkpoint in self._orbax.checkpoints]

  def latest(self) -> int | None:
    """The newest of `steps()`, or None."""
    return max(self.steps(), default=None)

  def save(self, step: int, state: Any, metadata: Mapping[str, Any] | None = None) -> None:
    """Copies `state` off the devices and writes it in the background; waits first for a save that is still going on.

    Args:
      step: names the checkpoint; one that is there already is replaced.
      state: a tree of jax arrays; may be donated as soon as this returns.
      metadata: what JSON can hold; comes back from `restore`.
    """
    self.wait()
    with self._saving():
      self._orbax.save_async(
        step,
        {"state": state, "checksums": _checksums(state)},
        force=True,
        overwrite=step in self.steps(),
        custom_metadata={"metadata": dict(metadata or {}), "layout": _layout(state)},
      )

  def restore(self, like: State) -> tuple[int, State, dict[str, Any]] | None:
    """Step, state and metadata of the newest checkpoint that is whole; None where there is none at all.

    A newer one that is damaged, by the checksums in it, is moved to the directory beside, `NAME.damaged`, and told of:
    every batch is a function of the step, so that the older one leads to the same end.

    Args:
      like: a tree of arrays or jax.ShapeDtypeStruct with shardings: shapes, dtypes and placement of the result, which
        may be other devices than those that saved.

    Raises:
      InputError: a state of another layout, or damage, and no older checkpoint that is whole.
      LostError: one process of several could not read it, which may be another's death. Nothing is moved before so many
        starts as _STARTS have met it.
    """
    self.wait()
    if hosts.process_count() > 1 and (suspect := hosts.first_says(self._suspect)) is not None:
      told = f"no start could read the checkpoint of step {suspect}"
      _log.warning("%s; it is now %s", told, self._set_aside(suspect))
    while (newest := self.latest()) is not None:
      try:
        found = newest, *self._read(newest, like)
        if hosts.is_main():
          files.remove(self._seen(newest))
        return found
      except _DamagedError as damage:
        path, told = self.directory / str(newest), f"the checkpoint of step {newest} is damaged ({damage})"
        if hosts.process_count() > 1:  # or another process died while all read: nothing is moved on such a ground
          self._seen(newest).parent.mkdir(exist_ok=True)
          with open(self._seen(newest), "a", encoding="utf-8") as stream:
            stream.write(f"{hosts.process_index()}\n")
          alone = len(self.steps()) < 2
          then = "or remove this directory" if alone else f"start {_STARTS + 1} goes on from the one before"
          raise hosts.LostError(f"{path}: {told}. Start again: {then}") from damage
        if not any(self._is_whole(step, like) for step in reversed(self.steps()) if step < newest):
          fix = f"Remove {self.directory} to start anew"
          raise InputError(f"{told}, and none before it is whole", path=path, fix=fix) from damage
        _log.warning("%s; it is now %s", told, self._set_aside(newest))
    return None

  def _seen(self, step: int) -> pathlib.Path:
    """Where each process that could not read a checkpoint leaves its number, a line a start."""
    return self._aside(step).with_suffix(".seen")

  def _suspect(self) -> int | None:
    """The newest checkpoint, where enough starts could not read it and there is one before."""
    newest = self.latest()
    if newest is None or len(self.steps()) < 2 or not self._seen(newest).exists():
      return None
    lines = collections.Counter(self._seen(newest).read_text().split())
    return newest if max(lines.values(), default=0) >= _STARTS else None

  def _aside(self, step: int) -> pathlib.Path:
    return self.directory.with_name(f"{self.directory.name}.damaged") / str(step)

  def _set_aside(self, step: int) -> pathlib.Path:
    """Moves a checkpoint away, in all processes; the first one does it."""
    aside = self._aside(step)
    if hosts.is_main():
      aside.parent.mkdir(exist_ok=True)
      files.remove(aside)
      files.rename(self.directory / str(step), aside)
      files.remove(self._seen(step))
    hosts.barrier(f"checkpoint {step} is set aside")
    self._orbax.close()  # it remembers the steps that it saw
    self._orbax = self._open()
    return aside

  def _open(self) -> ocp.training.Checkpointer:
    return ocp.training.Checkpointer(
      self.directory,
      preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
      cleanup_tmp_directories=True,
    )

  def wait(self) -> None:
    """Returns when the save that is going on, if any, is finished; raises what went wrong in it."""
    with self._saving():
      self._orbax.wait()

  def close(self) -> None:
    """Waits, then lets go of the directory."""
    with self._saving():
      self._orbax.close()

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # the storage library has its own kind of error for a full disk
      files.raise_if_full(error, self.directory)
      raise

  def _is_whole(self, step: int, like: Any) -> bool:
    try:
      self._read(step, like)
    except (_DamagedError, InputError):
      return False
    return True

  def _read(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
    with _damage_as_one_error():
      notes = self._orbax.metadata(step).custom_metadata
    if not notes or "layout" not in notes:
      raise _DamagedError("its metadata is missing or cut short")
    wanted = _layout(like)
    if notes["layout"] != wanted:
      names = [name for name in {**notes["layout"], **wanted} if notes["layout"].get(name) != wanted.get(name)]
      raise InputError(
        f"the checkpoint holds other parameters: {names[0]} is {notes['layout'].get(names[0])} there, "
        f"{wanted.get(names[0])} here",
        path=self.directory / str(step),
        fix="Use the configuration that it was saved with, or another workdir",
      )
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    sums = jax.ShapeDtypeStruct((len(wanted),), np.uint32, sharding=_any_replicated(abstract))
    with _damage_as_one_error():
      read = self._orbax.load(step, {"state": abstract, "checksums": sums})
    differs = np.asarray(_checksums(read["state"])) != np.asarray(read["checksums"])
    if differs.any():
      raise _DamagedError(f"the bytes of {[name for name, bad in zip(wanted, differs, strict=True) if bad]} changed")
    return read["state"], notes["metadata"]


def _is_news(record: logging.LogRecord) -> bool:
  """False for the stacks that orbax logs in each of its threads when a save fails: `wait` raises the error."""
  return not (record.exc_info and "orbax" in record.pathname)


class _DamagedError(Exception):
  """A checkpoint that is there but cannot be read back as it was written."""


@contextlib.contextmanager
def _damage_as_one_error() -> Iterator[None]:
  """Turns whatever the reading library raises on damaged files into one error, and keeps its log quiet."""
  loggers = [logging.getLogger(name) for name in ("asyncio", "absl")]
  try:
    for logger in loggers:
      logger.disabled = True
    yield
  except Exception as error:  # decoding damaged files fails in every way there is; the cause stays attached
    root: BaseException = error
    while root.__cause__ is not None:
      root = root.__cause__
    gc.collect()  # abandoned tasks report themselves when collected: now, while their log is off
    raise _DamagedError(str(root).splitlines()[0][:200] if str(root) else type(root).__name__) from error
  finally:
    for logger in loggers:
      logger.disabled = False


def _layout(tree: Any) -> dict[str, list[Any]]:
  """Shape and dtype of every leaf by its path, as JSON holds them."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


def _any_replicated(abstract: Any) -> jax.sharding.Sharding:
  """A sharding that puts the whole value on the devices that the tree uses."""
  sharding = jax.tree.leaves(abstract)[0].sharding
  if isinstance(sharding, jax.sharding.NamedSharding):
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return sharding


@jax.jit
def _checksums(tree: Any) -> jax.Array:
  """One uint32 a leaf, the same however the leaves are sharded: the storage format itself lets flipped bits pass.

  Σ word · (2·index + 1) mod 2³²: as the factors are odd, no change of a single word goes unseen.
  """

  def checksum(leaf: jax.Array) -> jax.Array:
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(words.ndim)):  # by axis and not by ravel, which would move sharded leaves about
      index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
      stride *= words.shape[axis]
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)

  return jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)])
