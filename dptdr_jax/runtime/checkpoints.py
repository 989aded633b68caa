"""Checkpoints of a training state, by orbax: written in the background, whole or absent, checked when read."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError
from dptdr_jax.runtime.hosts import TEAM, LostError

_log = logging.getLogger(__name__)

_KEPT = 2  # newest checkpoints that stay: one to fall back to if the newest is damaged
_FILES = "files.json"  # in a checkpoint: size and SHA-256 of its other files, because orbax does not see flipped bits

State = TypeVar("State")


class Checkpoints:
  """The two newest checkpoints of one training in one directory, a subdirectory per step.

  What a killed save left behind is removed. Every process of the run opens the same directory and calls the same
  methods in the same order.
  """

  def __init__(self, directory: str | os.PathLike, on_complete: Callable[[int], None] = lambda step: None):
    """Opens the directory, making it if needed.

    Args:
      on_complete: called in process 0 with the step of each checkpoint that is complete on disk, by `poll` and `wait`.
    """
    self.directory = pathlib.Path(directory).absolute()
    self.directory.mkdir(parents=True, exist_ok=True)
    if TEAM.is_main:  # not left to orbax: a second opening, as in `restore`, would race the first one's thread
      for left in ("*.orbax-checkpoint-tmp-*", "*.removed"):
        for path in self.directory.glob(left):
          shutil.rmtree(path)
    logging.getLogger("absl").addFilter(_is_news)
    self._on_complete, self._writing = on_complete, None
    self._orbax = ocp.training.Checkpointer(self.directory)

  def steps(self) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

  def save(self, step: int, state: Any, metadata: Mapping[str, Any] | None = None) -> None:
    """Copies `state` off the devices and writes it in the background; first waits for the save before.

    Args:
      step: names the checkpoint; an existing one is replaced.
      state: a tree of jax arrays; may be donated as soon as this returns.
      metadata: what JSON can hold; `restore` returns it.
    """
    self.wait()
    known = any(checkpoint.step == step for checkpoint in self._orbax.checkpoints)  # the same in every process
    with self._saving():
      self._orbax.save_async(step, state, force=True, overwrite=known, custom_metadata=dict(metadata or {}))
    self._writing = step

  def restore(self, like: State) -> tuple[int, State, dict[str, Any]] | None:
    """Step, state and metadata of the newest whole checkpoint; None if there is none at all.

    Newer ones that are damaged are moved to the directory `NAME.damaged` beside, with a warning. Every batch is a
    function of the step, so training from an older one ends the same.

    Args:
      like: a tree of arrays or jax.ShapeDtypeStruct with shardings: shapes, dtypes and placement of the result, which
        may be other devices than those that saved.

    Raises:
      InputError: all are damaged.
      LostError: one process of several could not read it.
    """
    self.wait()
    step = TEAM.first_says(self._newest_whole)
    self._orbax.close()  # it remembers the steps that it saw
    self._orbax = ocp.training.Checkpointer(self.directory)
    if step is None:
      return None
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    try:
      return step, self._orbax.load(step, abstract), self._orbax.metadata(step).custom_metadata
    except Exception as error:
      if TEAM.count == 1:
        raise
      raise LostError(f"process {TEAM.index} could not read {self.directory / str(step)}: {error}") from error

  def poll(self) -> None:
    """Announces a checkpoint that has become complete; raises what went wrong in its save. Does not wait."""
    if self._writing is not None and not self._orbax.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Returns when the save that is going on, if any, is complete; raises what went wrong in it."""
    step, self._writing = self._writing, None
    with self._saving():
      self._orbax.wait()
      if step is not None and TEAM.is_main:
        complete = self.directory / str(step)
        files.write_json(complete / _FILES, files.listing(complete))
        for old in self.steps()[:-_KEPT]:  # not left to orbax, whose next save may delete the same one again
          files.remove(self.directory / str(old))
    if step is not None and TEAM.is_main:
      self._on_complete(step)

  def close(self) -> None:
    """Waits, then lets go of the directory."""
    self.wait()
    with self._saving():
      self._orbax.close()

  def _newest_whole(self) -> int | None:
    """The newest whole checkpoint; unfinished ones before it are removed, damaged ones moved away."""
    damaged: dict[pathlib.Path, str] = {}
    whole = None
    for step in reversed(self.steps()):
      path = self.directory / str(step)
      if not (path / _FILES).exists():
        files.remove(path)  # killed before it was complete
      elif problem := _damage(path):
        damaged[path] = f"the checkpoint of step {step} is damaged ({problem})"
      else:
        whole = step
        break
    if damaged and whole is None:
      path, what = next(iter(damaged.items()))
      raise InputError(f"{what}, and none before it is whole", path=path, fix=f"Remove {self.directory} to start anew")
    for path, what in damaged.items():
      aside = self.directory.with_name(f"{self.directory.name}.damaged") / path.name
      aside.parent.mkdir(exist_ok=True)
      files.remove(aside)
      files.rename(path, aside)
      _log.warning("%s; it is now %s", what, aside)
    return whole

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # the storage library has its own kind of error for a full disk
      files.raise_if_full(error, self.directory)
      raise


def _damage(directory: pathlib.Path) -> str:
  """What is wrong with a checkpoint's files, '' where nothing is."""
  try:
    return files.difference(directory, files.read_json(directory / _FILES))
  except (InputError, OSError, AttributeError, TypeError, ValueError) as error:
    return str(error)


def _is_news(record: logging.LogRecord) -> bool:
  """False for the stack traces that orbax logs in its threads when a save fails: `wait` raises the error."""
  return not (record.exc_info and "orbax" in record.pathname)
