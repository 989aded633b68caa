"""The one training loop: from the newest checkpoint to the last step, the best on dev kept."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from dptdr_jax.core import preemption, progress
from dptdr_jax.core.errors import DptdrError
from dptdr_jax.runtime import hosts
from dptdr_jax.runtime.checkpoints import Checkpoints
from dptdr_jax.runtime.hosts import TEAM
from dptdr_jax.runtime.metrics import MetricWriter
from dptdr_jax.training.state import TrainState

_log = logging.getLogger(__name__)

_CHOSEN_BY = "RR@10"  # the measure of a trial by which the best state is kept
_LOADER_WORKERS = 2  # threads that build batches ahead


class Batches(Protocol):
  """Batches by step, built ahead by threads."""

  def load(self, start_step: int, stop_step: int, workers: int) -> Iterator[Mapping[str, Any]]: ...


class Generations(Protocol):
  """Negatives that are mined again while training continues. All processes call all methods.

  `begins_at`: whether a generation begins with the state after `step` of `steps` steps. `begin`: begins it, before that
  state is saved; after a kill, again. `resume`: begins again what a training that resumes after `step` steps needs.
  `wait_for`: waits for what the batch after `step` steps is drawn from; raises Preempted in all processes or in none.
  """

  def begins_at(self, step: int, steps: int) -> bool: ...
  def begin(self, step: int, candidate: Any) -> None: ...
  def resume(self, step: int) -> None: ...
  def wait_for(self, step: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class Task:
  """What is trained in the loop.

  Attributes:
    name: the section of its settings: 'train', 'pretrain' or 'cross'. Errors name fields of it.
    step: (state, batch of numpy arrays) → (state, metrics). Metrics are scalars still on the devices: loss,
      gradient_norm, accuracy and others. 'tokens' is summed up, and written as tokens_per_second.
    candidate: state → what is tried and kept, such as a `Retriever`. All processes call it.
    keep: saves a candidate, in process 0: the best on dev by RR@10, or the last one without trials. None: keeps none.
    attempt: candidate → measures on dev, in process 0. None: no trials.
    tries_first: there is a trial before the first step, too.
    generations: of negatives, if they are mined again while training continues.
  """

  name: str
  step: Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Mapping[str, Any]]]
  candidate: Callable[[TrainState], Any]
  keep: Callable[[Any], None] | None = None
  attempt: Callable[[Any], Mapping[str, float]] | None = None
  tries_first: bool = False
  generations: Generations | None = None


@dataclasses.dataclass
class Progress:
  """What a checkpoint holds beside the state.

  Attributes:
    tokens: trained on so far; 0 if the step's metrics have no 'tokens'.
    best: RR@10 of the best trial so far.
    untried: SIGTERM came before the trial of this state had ended.
  """

  tokens: int = 0
  best: float = -math.inf
  untried: bool = False


@dataclasses.dataclass
class Loop:
  """One training; `run` takes it from the newest checkpoint, or from the given state, to its last step.

  Attributes:
    task: what is trained.
    state: of the first step, placed on the mesh; after `run` that of the last.
    batches: of all steps.
    directory: metrics.jsonl and checkpoints/ are written there.
    steps: how many there are.
    log_every, checkpoint_every: steps.
    evaluate_every: steps between two trials; there is one after the last step, too.
    on_checkpoint: called in process 0 with the step of each checkpoint that is complete on disk. Training waits for it.
      The checkpoint stays until two newer ones are complete.
    progress: after `run` that of the last step.
  """

  task: Task
  state: TrainState
  batches: Batches
  directory: pathlib.Path
  steps: int
  log_every: int
  checkpoint_every: int
  evaluate_every: int
  on_checkpoint: Callable[[int], None] = lambda step: None
  progress: Progress = dataclasses.field(default_factory=Progress)

  def run(self) -> None:
    """Trains the steps that are left; all processes call it.

    After a kill at any moment another run ends with the same state, candidate and metrics.

    Raises:
      Preempted: SIGTERM came to one of the processes; in all of them, and everything is saved.
      DptdrError: a loss or a gradient is not finite; no such state is saved.
    """
    self._checkpoints = Checkpoints(self.directory / "checkpoints", self.on_checkpoint)
    with contextlib.closing(self._checkpoints):
      self._resume()
      # Closed in any case: the traceback of an error would keep the loader's threads alive.
      loading = contextlib.closing(self.batches.load(self._done, self.steps, _LOADER_WORKERS))
      bar = progress.bar(self.task.name, self.steps, "step", initial=self._done)
      stop = hosts.Agreement()
      with contextlib.closing(self._writer), loading as loaded, bar as self._shown:
        while self._done < self.steps:
          self._wait_for_negatives()
          self.state, metrics = self.task.step(self.state, next(loaded))
          self._done += 1
          self._fetched.append((self._done, metrics))
          self._record(leave=1)
          self._shown.advance()
          self._after_step(stop.ask(preemption.asked()))
          self._checkpoints.poll()
    if self.task.keep is not None and self.task.attempt is None:
      last = self.task.candidate(self.state)
      TEAM.first_says(lambda: self.task.keep(last))

  def _resume(self) -> None:
    """Restores the newest checkpoint, and does what comes before the next step."""
    self._done, generations = 0, self.task.generations
    self.progress.untried = self.task.attempt is not None and self.task.tries_first
    if (newest := self._checkpoints.restore(self.state)) is not None:
      self._done, self.state, metadata = newest
      self.progress = Progress(**metadata)
      _log.info("%s resumes after step %d", self.task.name, self._done)
    self._saved = self._done
    self._restart_clock()
    self._fetched: collections.deque = collections.deque()  # metrics wait a step, so that the devices never do
    self._writer = MetricWriter(self.directory, self._done, again="dev/" if self.progress.untried else "")
    if self.progress.untried:
      self._try()
    if generations is not None and self._done:
      generations.resume(self._done)
    elif generations is not None and generations.begins_at(0, self.steps):
      generations.begin(0, self.task.candidate(self.state))

  def _wait_for_negatives(self) -> None:
    if self.task.generations is not None:
      try:
        self.task.generations.wait_for(self._done)
      except preemption.Preempted:
        self._record()
        self._save()
        raise

  def _after_step(self, stopped: bool) -> None:
    """Begins a generation, tries and saves the state, where one of these is due."""
    generations, done, last = self.task.generations, self._done, self._done == self.steps
    begins = generations is not None and generations.begins_at(done, self.steps)
    tries = self.task.attempt is not None and (last or done % self.evaluate_every == 0)
    saves = last or stopped or done % self.checkpoint_every == 0
    if begins or tries or saves:
      self._record()
    if begins:
      generations.begin(done, self.task.candidate(self.state))
    if tries:
      self._try()
    if saves:
      self._save()
    if stopped:
      raise self._preempted()

  def _try(self) -> None:
    """Tries the state on dev, writes the measures and keeps the best.

    Raises:
      Preempted: SIGTERM came to process 0 meanwhile; in all processes, and the state is saved as untried.
    """
    candidate = self.task.candidate(self.state)

    def attempt() -> dict[str, float] | None:
      try:
        measures = dict(self.task.attempt(candidate))
      except preemption.Preempted:
        return None
      if self.task.keep is not None and measures[_CHOSEN_BY] > self.progress.best:
        self.task.keep(candidate)
      return measures

    measures = TEAM.first_says(attempt)
    self.progress.untried = measures is None
    if measures is None:
      self._save()
      raise self._preempted()
    self.progress.best = max(self.progress.best, measures[_CHOSEN_BY])
    self._writer.write(self._done, {f"dev/{name}": value for name, value in measures.items()})
    self._restart_clock()

  def _restart_clock(self) -> None:
    self._counted, self._since = 0, None  # tokens since then; None: until a step, which may compile, is over

  def _save(self) -> None:
    if self._done > self._saved:
      self._checkpoints.save(self._done, self.state, dataclasses.asdict(self.progress))
      self._saved = self._done

  def _preempted(self) -> preemption.Preempted:
    return preemption.Preempted(f"{self.task.name} is at step {self._done} of {self.steps}", agreed=True)

  def _record(self, leave: int = 0) -> None:
    """Fetches the metrics of all steps but the last `leave`, and writes those that are due.

    Raises:
      DptdrError: a loss or a gradient is not finite.
    """
    while len(self._fetched) > leave:
      step, metrics = self._fetched.popleft()
      values = {name: float(value) for name, value in metrics.items()}
      if not math.isfinite(values["loss"]) or not math.isfinite(values["gradient_norm"]):
        raise DptdrError(
          f"step {step}: loss {values['loss']:g}, gradient norm {values['gradient_norm']:g}. The last checkpoint is "
          f"fine. Set a lower {self.task.name}.learning_rate, a longer {self.task.name}.warmup, or compute_dtype to "
          "float32"
        )
      tokens, now = int(values.pop("tokens", 0)), time.monotonic()
      self.progress.tokens += tokens
      self._counted += tokens if self._since is not None else 0
      self._since = now if self._since is None else self._since
      if step % self.log_every == 0 or step == self.steps:
        if self._counted:
          values["tokens_per_second"] = self._counted / max(now - self._since, 1e-9)
          self._counted, self._since = 0, now
        self._writer.write(step, values)
        self._shown.note(loss=f"{values['loss']:.3f}", accuracy=f"{values['accuracy']:.3f}")
