"""Negatives that are mined again while training continues (ANCE, arXiv 2007.00808).

With N = train.refresh_every, generation g is mined with the retriever after g·N steps, by a thread of the first process
while the devices train on. It is used from step (g + 1)·N to step (g + 2)·N; before step N the round's own negatives
are. Training waits where mining is late, all processes together, so that SIGTERM to one of them is saved by all. So
every batch is a function of seed and step: a run that is killed finds the retrievers of its generations, which were
saved before the next step, and mines the same again.
"""

from __future__ import annotations

import logging
import pathlib
import queue
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files, preemption
from dptdr_jax.core.errors import DptdrError, InputError, RetryableError
from dptdr_jax.core.store import Inputs, Making, Ref
from dptdr_jax.core.team import SOLO
from dptdr_jax.data.groups import TrainGroups
from dptdr_jax.data.prepare import Corpus, Split
from dptdr_jax.pipeline import encode, mine, pools, rerank
from dptdr_jax.pipeline.mine import PoolRules, SourceInput, Thresholds, Window
from dptdr_jax.pipeline.trials import tokens_of
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.retrieval.denoise import CrossEncoderRule, denoise
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.index import Index
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retriever import Retriever
from dptdr_jax.runtime import hosts
from dptdr_jax.settings import Index as IndexSettings

if TYPE_CHECKING:
  from dptdr_jax.pipeline.train import TrainInputs

_log = logging.getLogger(__name__)

_DENSE = "dense"
_NEEDED_BY_MINING = ("vectors", "index", "run", "candidates", "scores")  # of a corpus' size
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

  def __init__(self, inputs: TrainInputs, making: Making, backbone: Backbone, split: Split, first: TrainGroups):
    """On the backbone that all share; where its weights are tuned each generation has its own."""
    self.every, self.group_size = inputs.train.refresh_every, first.group_size
    self._inputs, self._making, self._split = inputs, making, split
    self._backbone = backbone
    self._groups, self._passages = {-1: first}, first.num_passages
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
    negatives = pools.pool_negatives(Pool.open(self._place(which) / "pool"), self._inputs.train.simans_source)
    return pools.train_groups(
      self._inputs.train, self._split, negatives, num_passages=self._passages, seed=self._inputs.seed,
      number=self._inputs.number, pseudo=self._inputs.pseudo_positives,
    )  # fmt: skip

  def _mine(self, which: int) -> None:
    directory = self._place(which)
    if not (directory / "mining.json").exists():
      _log.info("mining generation %d during training", which)
      tuned = self._inputs.prompt.kind == "none"
      retriever = Retriever.load(directory / "retriever", None if tuned else self._backbone,
                                 compute_dtype=self._inputs.compute.dtype, fsdp=self._inputs.compute.fsdp)  # fmt: skip
      refresh, making = self._inputs.refresh, self._making
      mining = _Mining(self._inputs, refresh, making, directory, self._split, Corpus(making.path(refresh.corpus)))
      mining.mine(retriever, self._backbone, from_step=(which + 1) * self.every)
    for name in _NEEDED_BY_MINING:
      files.remove(directory / name)


class _Mining:
  """Mines one generation, in one process; what is there is not made again."""

  def __init__(
    self, inputs: TrainInputs, refresh: Refresh, making: Making, directory: pathlib.Path, split: Split, corpus: Corpus
  ):
    self._inputs, self._refresh, self._making, self._directory = inputs, refresh, making, directory
    self._split, self._corpus = split, corpus

  def mine(self, retriever: Retriever, backbone: Backbone, from_step: int) -> None:
    """Encodes, searches, merges and denoises."""
    refresh, directory = self._refresh, self._directory
    positives = pools.barred(self._split)
    place = directory if refresh.cross is None else directory / "candidates"
    if not (place / "pool" / "manifest.json").exists():
      margins = {source.name: source.window.margin for source in refresh.sources} | {_DENSE: refresh.window.margin}
      margins = {name: margins[name] for name in refresh.order}
      mine.clean(place, self._sources(retriever, positives), margins, positives, refresh.rules, self._corpus)
    if refresh.cross is not None:
      self._denoise(place, backbone)
    mine.describe(directory, refresh.rules, self._split, self._corpus, from_step=from_step)

  def _denoise(self, place: pathlib.Path, backbone: Backbone) -> None:
    """Takes out what the cross-encoder is not sure of."""
    from dptdr_jax.reranker import CrossEncoder

    refresh, making, pool = self._refresh, self._making, Pool.open(place / "pool")
    encoder = CrossEncoder.load(making.path(refresh.cross) / "model", backbone)
    stores = tokens_of(self._inputs.queries, making), tokens_of(self._inputs.corpus, making)
    kept = rerank.FirstKept(pool, refresh.cross_depth)
    rerank.score_rows(encoder, *stores, kept, self._directory / "scores", SOLO)
    scores = rerank.Probabilities(rerank.logits_of(self._directory / "scores"))
    rule = CrossEncoderRule(scores, refresh.thresholds.negative_below, refresh.thresholds.positive_above)
    denoise(self._directory / "pool", place / "pool", [rule])

  def _sources(self, retriever: Retriever, positives: Qrels) -> dict[str, mine.Source]:
    """What is taken of each source; the retriever's own run is made here."""
    refresh, making, count = self._refresh, self._making, len(self._corpus)
    queries, passages = self._encoded(retriever)
    known = mine.positive_scores(queries, passages, positives)
    sources = {_DENSE: mine.taken(self._searched(queries, passages), refresh.window, count, known)}
    for source in refresh.sources:
      sources[source.name] = mine.taken(encode.run_of(source.run, making), source.window, count, None)
    return {name: sources[name] for name in refresh.order}

  def _encoded(self, retriever: Retriever) -> tuple[Embeddings, Embeddings]:
    """Vectors of the training queries and of the corpus."""
    inputs, encoding = self._inputs, self._refresh.encoding
    parts = []
    for kind, ref, ids in (("query", inputs.queries, self._split.ids), ("passage", inputs.corpus, self._corpus.ids)):
      store = tokens_of(ref, self._making)

      def make(rows: range, kind: str = kind, store=store) -> np.ndarray:
        return retriever.encode_store(store, kind, np.asarray(rows), batch_tokens=encoding.batch_tokens)

      parts.append(encode.write(self._directory / "vectors" / kind, retriever, kind, ids, encoding, make, SOLO))
    return parts[0], parts[1]

  def _searched(self, queries: Embeddings, passages: Embeddings) -> Run:
    refresh, index = self._refresh, None
    if refresh.index.backend == "faiss" and refresh.index.factory != "Flat":
      index = self._directory / "index"
      if not (index / "manifest.json").exists():
        Index.build(passages, refresh.index.factory, sample=refresh.index.sample).save(index)
    encode.search_dense(self._directory, queries, passages, index, refresh.search, refresh.window.depth, SOLO)
    return Run.open(self._directory / "run")
