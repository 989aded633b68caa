"""Negatives that are mined anew while training goes on (ANCE, arXiv 2007.00808), each exactly where it belongs.

With N = train.refresh_every, generation g is mined with the state after g·N steps, by a thread of the host while the
devices train on, and holds from step (g + 1)·N to step (g + 2)·N; before step N the round's own negatives hold. Of
several processes the first one mines, the others wait for its files.
Training waits where mining is late, all processes in step, so that a SIGTERM to one of them is saved by all. Every
batch thus stays a function of seed and step: what is killed finds the retrievers of the generations it was at, saved
before the step after, and mines the same again.
"""

from __future__ import annotations

import logging
import queue
import threading
import time

from ml_collections import ConfigDict

from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files, preemption
from dptdr_jax.core.errors import DptdrError, InputError, PassingError
from dptdr_jax.data.groups import TrainGroups
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.retriever import Retriever
from dptdr_jax.runtime import hosts
from dptdr_jax.stages import common, mine
from dptdr_jax.stages.layout import Layout
from dptdr_jax.stages.sources import Sources

_log = logging.getLogger(__name__)

_NEEDED_BY_MINING = ("vectors", "index", "runs", "merged", "cleaned", "scores")  # of a corpus' size
_LOOK_S = 1.0  # seconds between two looks for a SIGTERM while training waits for negatives
_NOTICE_S = 30.0  # a wait that is longer is told


class Generations:
  """The generations of one round of training.

  Attributes:
    every: N.
  """

  def __init__(self, config: ConfigDict, layout: Layout, data: PreparedData, number: int, backbone: Backbone):
    """Of round `number`, on the backbone that all share; where its weights are tuned each generation has its own."""
    self.every = config.train.refresh_every
    self._config, self._layout, self._data, self._number = config, layout, data, number
    self._shared = None if config.prompt.kind == "none" else backbone
    first = common.train_groups(config, layout, data, number)
    self._groups, self.group_size = {-1: first}, first.group_size
    self._ready = threading.Condition()
    self._everywhere = -1  # the generation that all processes last had
    self._failed: BaseException | None = None
    self._asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    if hosts.is_main():
      threading.Thread(target=self._mine_what_is_asked, name="mining", daemon=True).start()

  def at(self, step: int) -> TrainGroups:
    """What draws the groups of the batch after `step` steps; waits for its generation.

    Raises:
      DptdrError: mining it failed, or training has ended.
    """
    wanted = step // self.every - 1
    with self._ready:
      while wanted not in self._groups:
        self._raise_failed()
        self._ready.wait()
      return self._groups[wanted]

  def wait_for(self, step: int) -> None:
    """Waits until all processes have what the batch after `step` steps is drawn from; all call it, step by step.

    Raises:
      Preempted: one of them was told to stop; in all of them.
      DptdrError: mining failed.
      LostError: another process is gone.
    """
    wanted, began, told = step // self.every - 1, time.monotonic(), False
    if wanted == self._everywhere:
      return
    what = f"round {self._number} waits for negatives of generation {wanted}"
    while not hosts.all_say(what, self._has(wanted)):
      if not told and time.monotonic() - began > _NOTICE_S:
        _log.info("%s", what)
        told = True
    self._everywhere = wanted
    with self._ready:  # batches come in order: nobody asks for those before it again, and each holds files open
      for old in [which for which in self._groups if which < wanted]:
        del self._groups[old]

  def _has(self, wanted: int) -> bool:
    """Whether this process has that generation; if not, after a moment's wait."""
    with self._ready:
      if wanted not in self._groups:
        self._raise_failed()
        if not hosts.is_main() and (self._layout.generation(self._number, wanted) / "mining.json").exists():
          self._groups[wanted] = self._draws_from(wanted)
          self._ready.notify_all()
        else:
          self._ready.wait(_LOOK_S)
      return wanted in self._groups

  def _raise_failed(self) -> None:
    if isinstance(self._failed, InputError | PassingError):
      raise self._failed  # as it is: its path says what is made again, its kind whether a restart helps
    if self._failed is not None:
      raise DptdrError(f"mining while round {self._number} trains failed: {self._failed}") from self._failed

  def resume(self, step: int) -> None:
    """Asks for the generations that training after `step` steps may still want, of those whose retriever is saved."""
    for which in range(max(0, step // self.every - 1), step // self.every + 1):
      if (self._layout.generation(self._number, which) / "retriever" / "retriever.json").exists():
        self._asked.put(which)

  def begin(self, step: int, retriever: Retriever) -> None:
    """Begins generation step / N with the retriever of that step."""
    which = step // self.every
    if hosts.is_main():
      retriever.save(self._layout.generation(self._number, which) / "retriever")
    self._asked.put(which)

  def is_begun_at(self, step: int, steps: int) -> bool:
    """Whether a generation begins after `step` of `steps` steps: one that training will yet draw from."""
    return step % self.every == 0 and step + self.every < steps

  def close(self) -> None:
    """Lets the thread end after what it is at, and those that wait for it at once."""
    self._asked.put(None)
    self._fail(DptdrError("training has ended"))

  def _fail(self, error: BaseException) -> None:
    """Raises the error wherever a generation is waited for, or will be."""
    with self._ready:
      self._failed = self._failed or error
      self._ready.notify_all()

  def _mine_what_is_asked(self) -> None:
    while (which := self._asked.get()) is not None:
      try:
        self._mine(which)
        groups = self._draws_from(which)
      except preemption.Preempted:
        return  # training looks for itself
      except BaseException as error:  # for those that wait
        self._fail(error)
        return
      with self._ready:
        self._groups[which] = groups
        self._ready.notify_all()

  def _draws_from(self, which: int) -> TrainGroups:
    pool = Pool.open(self._layout.generation(self._number, which) / "pool")
    negatives = common.pool_negatives(self._config, pool)
    return common.train_groups(self._config, self._layout, self._data, self._number, negatives)

  def _mine(self, which: int) -> None:
    directory = self._layout.generation(self._number, which)
    if not (directory / "mining.json").exists():
      _log.info("mining generation %d while training goes on", which)
      retriever = common.load_retriever(self._config, directory / "retriever", self._shared)
      others = self._layout.train(self._number)  # all but this retriever find the same for every generation
      asked = Sources(
        self._config, self._layout, self._data, directory, self._number, retriever, self._shared, others,
        together=False,
      )  # fmt: skip
      mine.mine(asked)
    for name in _NEEDED_BY_MINING:
      files.remove(directory / name)
