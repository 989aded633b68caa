"""The loop that every kind of training runs in: from the newest checkpoint to the last step."""

from __future__ import annotations

import abc
import collections
import contextlib
import logging
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from ml_collections import ConfigDict

from dptdr_jax.core import preemption, progress
from dptdr_jax.core.errors import DptdrError
from dptdr_jax.runtime import hosts
from dptdr_jax.runtime.checkpoints import Checkpoints
from dptdr_jax.runtime.metrics import MetricWriter
from dptdr_jax.training.state import TrainState

_log = logging.getLogger(__name__)

_UNTRIED = "untried"  # in a checkpoint's metadata: SIGTERM came before the state's trial on dev had ended


class Batches(Protocol):
  """Batches by step, made ahead."""

  def load(self, start_step: int, stop_step: int, workers: int) -> Iterator[Mapping[str, Any]]: ...


class Loop(abc.ABC):
  """One run of training; a subclass says what a step and a trial are.

  Attributes:
    name: of the config's section: 'train', 'pretrain' or 'cross'; errors name its fields.
    settings: that section.
    steps: how many there are.
    state: after the steps done so far.
    tries: whether there is a trial on dev every settings.evaluate_every steps and after the last.
    tries_first: also before the first step.
    temperature: the field that its loss divides scores by, '' where there is none; errors name it.
  """

  tries_first = False
  temperature = ""

  def __init__(self, name: str, settings: ConfigDict, steps: int, state: TrainState, tries: bool):
    self.name, self.settings, self.steps, self.state, self.tries = name, settings, steps, state, tries

  @abc.abstractmethod
  def step(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replaces the state by the one after `batch`; returns the step's metrics, still on the devices."""

  @abc.abstractmethod
  def candidate(self) -> Any:
    """The state as what is tried and kept; every process makes it."""

  @abc.abstractmethod
  def attempt(self, step: int, candidate: Any) -> Mapping[str, float]:
    """Tries a candidate on dev, in the first process; returns measures. After a kill it may be asked again."""

  def metadata(self, step: int) -> dict:
    """What a checkpoint keeps beside the state."""
    return {}

  def restored(self, metadata: Mapping[str, Any]) -> None:  # noqa: B027 — most kinds of training keep nothing
    """Takes up what `metadata` gave."""

  def begin(self, step: int) -> None:  # noqa: B027 — most kinds of training have nothing to do there
    """Called once, with the state that training begins or resumes with."""

  def wait_for(self, step: int) -> None:  # noqa: B027 — as `begin`
    """Waits for what the batch after `step` steps is drawn from; all processes call it.

    Raises:
      Preempted: one of them was told to stop; in all of them.
    """

  def is_marked(self, step: int) -> bool:
    """Whether `mark` wants the state after `step` steps."""
    return False

  def mark(self, step: int) -> None:  # noqa: B027 — as `begin`
    """Does what is to be done with a state before that state is saved; after a kill, again."""

  def figures(self, metrics: Mapping[str, float], written: bool) -> dict[str, float]:
    """A step's metrics as they are written; called for every step, `written` or not."""
    return dict(metrics)

  def run(self, batches: Batches, checkpoints: Checkpoints, directory: pathlib.Path) -> None:
    """Runs what is left; writes metrics and checkpoints. SIGTERM saves and raises Preempted.

    Raises:
      DptdrError: a loss or a gradient that is not finite; nothing of it is kept.
    """
    first = 0
    untried = self.tries and self.tries_first
    if (found := checkpoints.restore(self.state)) is not None:
      first, self.state, metadata = found
      untried = metadata.pop(_UNTRIED, False) and self.tries
      self.restored(metadata)
      _log.info("%s goes on after step %d", self.name, first)
    writer = MetricWriter(directory, first, again="dev/" if untried else "")
    if untried:
      self._try(writer, first)
    self.begin(first)
    stop = hosts.Agreement()
    waiting: collections.deque = collections.deque()  # metrics are fetched one step behind, so the devices never wait
    done = kept = first
    # Closed whatever happens: an error's traceback would keep the loader's threads.
    loading = contextlib.closing(batches.load(first, self.steps, self.settings.loader_workers))
    with loading as loaded, progress.bar(self.name, self.steps, "step", initial=first) as shown:
      while done < self.steps:
        try:
          self.wait_for(done)
        except preemption.Preempted:  # in all processes
          if done > kept:
            self._record_all(writer, shown, waiting)
            checkpoints.save(done, self.state, self.metadata(done))
            checkpoints.wait()
          raise
        done = step = done + 1
        waiting.append((step, self.step(next(loaded))))
        if len(waiting) > 1:
          self._record(writer, shown, *waiting.popleft())
        shown.advance()
        last = step == self.steps
        stopped = stop.ask(preemption.asked())
        tried = self.tries and (last or step % self.settings.evaluate_every == 0)
        saved = last or step % self.settings.checkpoint_every == 0 or stopped
        marked = not last and self.is_marked(step)
        if tried or saved or marked:
          self._record_all(writer, shown, waiting)
        if marked:
          self.mark(step)
        if tried:
          try:
            self._try(writer, step)
          except preemption.Preempted:  # in all processes; the trial comes again when training goes on
            checkpoints.save(step, self.state, self.metadata(step) | {_UNTRIED: True})
            checkpoints.wait()
            raise
        if saved:
          checkpoints.save(step, self.state, self.metadata(step))
          kept = step
        if stopped:
          checkpoints.wait()
          raise preemption.Preempted(f"{self.name} stands at step {step} of {self.steps}", agreed=True)
    checkpoints.wait()
    writer.close()

  def _try(self, writer: MetricWriter, step: int) -> None:
    """Tries the state on dev and writes the measures.

    Raises:
      Preempted: SIGTERM came to the first process meanwhile; in all processes.
    """
    candidate = self.candidate()

    def figures() -> dict[str, float] | None:
      try:
        return dict(self.attempt(step, candidate))
      except preemption.Preempted:
        return None

    if (found := hosts.first_says(figures)) is None:
      raise preemption.Preempted(f"{self.name} stands at step {step} of {self.steps}", agreed=True)
    writer.write(step, {f"dev/{name}": value for name, value in found.items()})

  def _record_all(self, writer: MetricWriter, shown: progress.Bar, waiting: collections.deque) -> None:
    """Records what waits: nothing that is not finite is ever kept."""
    while waiting:
      self._record(writer, shown, *waiting.popleft())

  def _record(self, writer: MetricWriter, shown: progress.Bar, step: int, metrics: Mapping) -> None:
    found = {name: float(value) for name, value in metrics.items()}
    if not math.isfinite(found["loss"]) or not math.isfinite(found["gradient_norm"]):
      cooler = f"a higher {self.temperature} " if self.temperature else ""
      raise DptdrError(
        f"step {step}: loss {found['loss']:g}, gradient norm {found['gradient_norm']:g}. The last checkpoint is whole. "
        f"Try a lower {self.name}.learning_rate, a longer {self.name}.warmup, {cooler}or float32"
      )
    written = step % self.settings.log_every == 0 or step == self.steps
    found = self.figures(found, written)
    if written:
      writer.write(step, found)
      shown.note(loss=f"{found['loss']:.3f}", accuracy=f"{found['accuracy']:.3f}")
