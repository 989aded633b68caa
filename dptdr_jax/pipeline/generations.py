"""Negatives that are mined again while training continues (ANCE, arXiv 2007.00808).

With N = train.refresh_every, generation g is mined with the retriever after g·N steps, by a thread of the first process
while the devices train on. It is used from step (g + 1)·N to step (g + 2)·N; before step N the round's own negatives
are. Training waits where mining is late, all processes together, so that SIGTERM to one of them is saved by all. So
every batch is a function of seed and step: a run that is killed finds the retrievers of its generations, which were
saved before the next step, and mines the same again.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import queue
import threading
import time
from typing import TYPE_CHECKING

from dptdr_jax.core import files, preemption
from dptdr_jax.core.errors import DptdrError, InputError, RetryableError
from dptdr_jax.core.store import Inputs, Making, Ref
from dptdr_jax.core.team import SOLO, Team
from dptdr_jax.data.groups import TrainGroups
from dptdr_jax.data.prepare import Split
from dptdr_jax.pipeline import encode, mine, pools, rerank
from dptdr_jax.pipeline.mine import PoolRules, SourceInput, Thresholds, Window
from dptdr_jax.pipeline.models import RetrieverInput
from dptdr_jax.pipeline.sources import DENSE
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.retriever import Retriever
from dptdr_jax.runtime import hosts
from dptdr_jax.settings import Index as IndexSettings

if TYPE_CHECKING:
  from dptdr_jax.pipeline.train import TrainInputs

_log = logging.getLogger(__name__)

_KEPT = ("retriever", "pool", "mining.json")  # of a generation
_PART = "generation"  # the kind in references to its parts
_LOOK_S = 1.0  # between two looks for SIGTERM while training waits for negatives
_NOTICE_S = 30.0  # a longer wait is logged


class Refresh(Inputs):
  """What mining needs while training continues, beside the retriever as it trains.

  Attributes:
    window: what is taken of the retriever's own run.
    sources: the other sources; `order` names all, in the order of their bits in the pool.
    cross: the cross-encoder that denoises; None: none does.
  """

  corpus: Ref
  split: Ref
  rules: PoolRules
  window: Window
  sources: tuple[SourceInput, ...]
  order: tuple[str, ...]
  encoding: encode.Encoding
  search: encode.Search
  index: IndexSettings
  cross: Ref | None
  cross_depth: int
  thresholds: Thresholds | None


class Generations:
  """The generations of one round of training.

  Attributes:
    every: N.
    group_size: passages a query.
  """

  def __init__(self, inputs: TrainInputs, making: Making, split: Split, first: TrainGroups):
    """Before generation 0 is used, `first` draws."""
    self.every, self.group_size = inputs.train.refresh_every, first.group_size
    self._inputs, self._making, self._split = inputs, making, split
    self._groups, self._num_passages = {-1: first}, first.num_passages
    self._ready = threading.Condition()
    self._everywhere = -1  # the generation that all processes last had
    self._failed: BaseException | None = None
    self._asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    if hosts.TEAM.is_main:
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
    what = f"round {self._inputs.number} waits for negatives of generation {wanted}"
    while not hosts.TEAM.all_say(what, self._has(wanted)):
      if not told and time.monotonic() - began > _NOTICE_S:
        _log.info("%s", what)
        told = True
    self._everywhere = wanted
    with self._ready:  # batches come in order: nobody asks for earlier ones again, and each holds files open
      for old in [which for which in self._groups if which < wanted]:
        del self._groups[old]

  def begins_at(self, step: int, steps: int) -> bool:
    """Whether a generation begins after `step` of `steps` steps: one that training will still draw from."""
    return step % self.every == 0 and step + self.every < steps

  def begin(self, step: int, candidate: Retriever) -> None:
    """Begins generation step / N with the retriever of that step."""
    which = step // self.every
    if hosts.TEAM.is_main:
      candidate.save(self._place(which) / "retriever")
    self._asked.put(which)

  def resume(self, step: int) -> None:
    """Asks for the generations that training after `step` steps may still use, of those whose retriever is saved."""
    for which in range(max(0, step // self.every - 1), step // self.every + 1):
      if (self._place(which) / "retriever" / "retriever.json").exists():
        self._asked.put(which)

  def close(self) -> None:
    """Lets the thread end after what it is doing, and those that wait for it at once."""
    self._asked.put(None)
    self._fail(DptdrError("training has ended"))

  def _place(self, which: int) -> pathlib.Path:
    return self._making.directory / "generations" / str(which)

  def _has(self, wanted: int) -> bool:
    """Whether this process has that generation; if not, after a moment's wait."""
    with self._ready:
      if wanted not in self._groups:
        self._raise_failed()
        if not hosts.TEAM.is_main and (self._place(wanted) / "mining.json").exists():
          self._groups[wanted] = self._draws_from(wanted)
          self._ready.notify_all()
        else:
          self._ready.wait(_LOOK_S)
      return wanted in self._groups

  def _raise_failed(self) -> None:
    if isinstance(self._failed, InputError | RetryableError):
      raise self._failed  # as it is: its path says what is made again, its kind whether a restart helps
    if self._failed is not None:
      raise DptdrError(f"mining during round {self._inputs.number} failed: {self._failed}") from self._failed

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
    pool = Pool.open(self._place(which) / "pool")
    return pools.train_groups(self._inputs, self._split, pool, num_passages=self._num_passages)

  def _mine(self, which: int) -> None:
    """Mines a generation, in this process alone; what is there is not made again."""
    place = self._place(which)
    if not (place / "mining.json").exists():
      _log.info("mining generation %d during training", which)
      _build_pool(self._inputs, _Part(place, self._making), (which + 1) * self.every)
    for path in place.iterdir():  # vectors and runs are as large as the corpus
      if path.name not in _KEPT:
        files.remove(path)


@dataclasses.dataclass(frozen=True)
class _Part:
  """What the build function of a part of a generation works with, see `Making`; the other parts lie beside it."""

  generation: pathlib.Path
  making: Making
  name: str = ""
  team: Team = SOLO

  @property
  def directory(self) -> pathlib.Path:
    return self.generation / self.name

  def path(self, ref: Ref) -> pathlib.Path:
    return self.generation / ref.key if ref.kind == _PART else self.making.path(ref)

  def at(self, part: Ref) -> _Part:
    return dataclasses.replace(self, name=part.key)


def _build_pool(inputs: TrainInputs, place: _Part, from_step: int) -> None:
  """Encodes, searches, merges and denoises with the functions that make the pools between two rounds."""
  refresh, backbone = inputs.refresh, inputs.backbone
  queries, passages, run, index, candidates, scores = (
    Ref(_PART, name) for name in ("queries", "passages", "run", "index", "candidates", "scores")
  )
  tuned = inputs.prompt.kind == "none"
  retriever = RetrieverInput(kind="trained", trained=Ref(_PART, ""), backbone=None if tuned else backbone)
  for part, text, split, tokens in (
    (queries, refresh.split, inputs.split_name, inputs.queries), (passages, refresh.corpus, "", inputs.corpus)
  ):  # fmt: skip
    vectors = encode.VectorsInputs(retriever=retriever, text=text, split=split, tokens=tokens, limit=0,
                                   encoding=refresh.encoding, compute=inputs.compute)  # fmt: skip
    encode.build_vectors(vectors, place.at(part))
  exact = refresh.index.backend == "devices" or refresh.index.factory == "Flat"
  if not exact and not (place.path(index) / "index/manifest.json").exists():
    built = encode.IndexInputs(passages=passages, factory=refresh.index.factory, sample=refresh.index.sample)
    encode.build_index(built, place.at(index))
  searched = encode.DenseRunInputs(queries=queries, passages=passages, index=None if exact else index,
                                   search=refresh.search, depth=refresh.window.depth)  # fmt: skip
  encode.build_dense_run(searched, place.at(run))
  own = SourceInput(name=DENSE, window=refresh.window, run=run, queries=queries, passages=passages)
  sources = {source.name: source for source in (*refresh.sources, own)}
  merged = mine.CandidatesInputs(corpus=refresh.corpus, split=refresh.split, rules=refresh.rules,
                                 sources=tuple(sources[name] for name in refresh.order))  # fmt: skip
  if refresh.cross is None:
    return mine.build_candidates(merged, place, from_step)
  mine.build_candidates(merged, place.at(candidates))
  pairs = rerank.PairScoresInputs(
    cross=refresh.cross, backbone=backbone, compute=inputs.compute, queries=inputs.queries, corpus=inputs.corpus,
    run=None, candidates=candidates, depth=refresh.cross_depth,
  )  # fmt: skip
  rerank.build_scores(pairs, place.at(scores))
  cleaned = mine.PoolInputs(corpus=refresh.corpus, split=refresh.split, candidates=candidates, scores=scores,
                            thresholds=refresh.thresholds, rules=refresh.rules)  # fmt: skip
  return mine.build_pool(cleaned, place, from_step)
