"""What a pool of negatives is mined from: BM25, dense retrievers and run files, each asked once, in parts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import itertools
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files, preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.retrieval import runs
from dptdr_jax.retrieval.candidates import MAX_DEPTH, MAX_SOURCES
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.merge import Source
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retriever import Retriever
from dptdr_jax.runtime import hosts
from dptdr_jax.stages import common, encode, search
from dptdr_jax.stages.layout import Layout

BM25, DENSE = "bm25", "dense"  # names among the sources: the second is the retriever of the pool's round
KINDS = (BM25, DENSE, "runs")  # as config.mine.sources names them
# What says which of the candidates that were found become negatives.
_CHOOSING = frozenset((
  *(f"config.mine.{source}.{field}" for source in ("bm25", "dense", "outside")
    for field in ("first", "quota", "relative_margin", "absolute_margin")),
  *(f"config.mine.{field}" for field in ("same_text", "near_duplicate", "cross_encoder", "negative_below",
                                         "positive_above", "pseudo_positives", "width", "retrievers", "sources")),
  "config.cross.depth", "stages.cross",
))  # fmt: skip
_RETRIEVER = re.compile(r"backbone|pretrain|train[1-9]\d*")
_BLOCK = 16_384  # judged positives that are scored at a time, and queries


def kept(config: ConfigDict, number: int) -> dict[str, frozenset[str]]:
  """What is dear in the directory of the pool that the retriever of round `number` mines, encoding and searching, hours
  at MS MARCO's size; beside each part all that it does not depend on, see `order.Stage`."""
  depths = {kind: f"config.mine.{kind}.depth" for kind in (BM25, DENSE, "outside")}
  files_of_runs = {"config.mine.runs", "files.runs"}
  beside = _CHOOSING | {*depths.values(), *files_of_runs, "config.index"}
  earlier = {f"stages.{kind}{before}" for before in range(number + 1) for kind in ("mine", "train")}
  models = {f"config.{name}" for name in ("encode", "vector", "text", "backbone", "compute_dtype")}
  found = dict.fromkeys(("vectors", "index", "retrievers"), beside)  # an index says itself what it is of
  for name in names(config, number):
    if name == BM25:
      free = beside | earlier | models | {"stages.pretrain"}
      free -= {depths[BM25]}
    elif name == DENSE or name in config.mine.retrievers:
      free = beside - {depths[DENSE], "config.index"}
    else:
      free = beside - {depths["outside"], *files_of_runs}
    found |= {f"runs/{glob.escape(name)}{part}": free for part in ("", ".[0-9]*-of-[0-9]*")}  # whole, or parts of it
  return found


def check(config: ConfigDict) -> None:
  """Raises InputError for what can be known to fail before any work is done."""
  mine = config.mine
  _check_retrievers(config)
  if unknown := set(mine.sources) - set(KINDS):
    raise InputError("unknown mine.sources", value=sorted(unknown), fix=f"Use some of {', '.join(KINDS)}")
  if mines_with_retriever(config) and not names(config, config.rounds):
    raise InputError("nothing to mine from: each of mine.sources has a depth of 0 or no files", value=mine.sources)
  for name in (BM25, DENSE, "outside"):
    options = mine[name]
    if min(options.depth, options.first, options.quota) < 0 or (options.depth and options.first >= options.depth):
      raise InputError(f"mine.{name}: ranks go from 0 ≤ first < depth, and a quota is not negative",
                       value=(options.first, options.depth, options.quota))  # fmt: skip
    if options.depth > MAX_DEPTH:
      raise InputError(f"mine.{name}.depth is beyond the {MAX_DEPTH:,} ranks that a pool holds", value=options.depth)
  if (number := max(len(names(config, number)) for number in (0, config.rounds))) > MAX_SOURCES:
    raise InputError(f"a pool takes {MAX_SOURCES} sources at most", value=number, fix="Name fewer mine.runs")
  if mine.runs and not (common.mines_first(config) or mines_with_retriever(config)):
    raise InputError("mine.runs, and nothing is mined", value=mine.runs,
                     fix="Set train.negatives to bm25 and train.passages to 2 or more, or rounds to 2")  # fmt: skip
  taken = [BM25, DENSE, *mine.retrievers]
  for path in mine.runs:
    if not pathlib.Path(path).is_file():
      raise InputError("no such run file", path=path)
    if pathlib.Path(path).name in taken or _RETRIEVER.fullmatch(pathlib.Path(path).name):
      raise InputError("two sources of one name", path=path, fix="Give the run file a name of its own")
    taken.append(pathlib.Path(path).name)


def _check_retrievers(config: ConfigDict) -> None:
  found, known = config.mine.retrievers, retrievers(config)
  check_names(found)
  if found and not mines_with_retriever(config):
    raise InputError("mine.retrievers, and no pool is mined after round 1 or while it trains", value=found,
                     fix="Set rounds to 2, or train.refresh_every above 0")  # fmt: skip
  if found and not (config.mine.dense.depth and DENSE in config.mine.sources):
    raise InputError("mine.retrievers are asked as the dense source is, and it is not", value=found,
                     fix="Set mine.dense.depth above 0, and name dense in mine.sources")  # fmt: skip
  if unknown := [name for name in found if known and name not in known]:
    raise InputError("mine.retrievers names what no pool of this run finds there", value=unknown,
                     fix=f"There are {', '.join(known)}; that of a pool's own round is in it by itself")  # fmt: skip
  if len(set(found)) < len(found):
    raise InputError("mine.retrievers names one twice", value=found)


def check_names(found: Sequence[str]) -> None:
  """Raises InputError for a name in mine.retrievers that no run has."""
  if wrong := [name for name in found if not _RETRIEVER.fullmatch(name)]:
    fix = "There are backbone, pretrain, train1, train2, …"
    raise InputError("mine.retrievers names what is no retriever", value=wrong, fix=fix)


def retrievers(config: ConfigDict) -> list[str]:
  """What mine.retrievers may name: what some pool has beside the retriever of its round."""
  if not (mines_with_retriever(config) and config.mine.dense.depth and DENSE in config.mine.sources):
    return []
  last = config.rounds if config.train.refresh_every else config.rounds - 1
  return ["backbone", *(["pretrain"] if config.pretrain.enabled else []), *(f"train{n}" for n in range(1, last))]


def mines_with_retriever(config: ConfigDict) -> bool:
  """Whether there are pools besides that of mine0."""
  return config.rounds > 1 or (config.rounds > 0 and config.train.refresh_every > 0)


def names(config: ConfigDict, number: int) -> list[str]:
  """The sources of a pool that the retriever of round `number` mines; 0: there is none yet, and mine.sources is not
  asked."""
  mine = config.mine
  found = [BM25] if mine.bm25.depth and (not number or BM25 in mine.sources) else []
  if number and mine.dense.depth and DENSE in mine.sources:
    found += [DENSE, *(name for name in mine.retrievers if _is_before(name, number))]
  outside = mine.outside.depth and (not number or "runs" in mine.sources)
  return found + [pathlib.Path(path).name for path in (mine.runs if outside else ())]


def _is_before(name: str, number: int) -> bool:
  """Whether a retriever is there, and is another one, when that of round `number` mines."""
  return not name.startswith("train") or int(name.removeprefix("train")) < number


def options(config: ConfigDict, name: str) -> ConfigDict:
  """What is taken of a source: of dense retrievers alike, and of run files."""
  mine = config.mine
  return {BM25: mine.bm25, DENSE: mine.dense, **dict.fromkeys(mine.retrievers, mine.dense)}.get(name, mine.outside)


def scored(config: ConfigDict) -> list[str]:
  """All sources whose scores a pool may have."""
  return [BM25, DENSE, *config.mine.retrievers, *(pathlib.Path(path).name for path in config.mine.runs)]


@dataclasses.dataclass(frozen=True)
class Sources:
  """The sources of one pool, and what is found there: DIR/runs/NAME, DIR/vectors, DIR/index, and of further retrievers
  DIR/retrievers/NAME/{vectors,index}. What is there is not made again.

  Attributes:
    config, layout, data: of the run.
    directory: DIR, the pool's own.
    number: the round whose retriever mines; 0: there is none yet.
    retriever: this retriever; None: the one that the round has chosen.
    backbone: the one that prompts are trained on, where it is in memory.
    shared: where that is which is the same for many pools, all but the retriever's own; None: in `directory`.
    together: all processes of the run work at it; else this one does all, and waits for none.
  """

  config: ConfigDict
  layout: Layout
  data: PreparedData
  directory: pathlib.Path
  number: int
  retriever: Retriever | None = None
  backbone: Backbone | None = None
  shared: pathlib.Path | None = None
  together: bool = True

  @property
  def names(self) -> list[str]:
    """Of all that are asked, in the order of their bits in the pool."""
    return names(self.config, self.number)

  def find(self) -> None:
    """Reads run files, encodes and searches."""
    if hosts.is_main() or not self.together:  # before anything dear: what is wrong with them shows at once
      self._read_runs()
      self._link_earlier()
    if self.together:
      hosts.barrier("what earlier pools have found")
    for name in self._dense:
      self._encode(name)
    self._search()

  def taken(self, positives: Qrels) -> dict[str, Source]:
    """What was found, and what is taken of it."""
    found = {}
    for name in self.names:
      of, run = options(self.config, name), Run.open(self._place(name))
      scores = positive_scores(*self._vectors(name), positives) if name in self._dense else None
      found[name] = Source(run, min(of.depth, len(self.data.ids)), of.first, of.quota or None, scores)
    return found

  @functools.cached_property
  def _dense(self) -> list[str]:
    return [name for name in self.names if name == DENSE or name in self.config.mine.retrievers]

  @property
  def _split(self) -> str:
    return self.config.data.train_split

  def _base(self, name: str) -> pathlib.Path:
    """Only the pool's own retriever finds something else for every pool."""
    return self.directory if name == DENSE or self.shared is None else self.shared

  def _place(self, name: str) -> pathlib.Path:
    """Where the run of a source is."""
    return self._base(name) / "runs" / name

  def _home(self, name: str) -> pathlib.Path:
    """Where vectors and index of a dense retriever are."""
    return self._base(name) if name == DENSE else self._base(name) / "retrievers" / name

  def _vectors(self, name: str) -> tuple[Embeddings, Embeddings]:
    """Those of the training queries and of the corpus."""
    return tuple(Embeddings(self._home(name) / "vectors" / part) for part in (self._split, "corpus"))

  def _read_runs(self) -> None:
    """Reads the run files that the pool takes from elsewhere."""
    split, depth = self.data.splits[self._split], min(self.config.mine.outside.depth, len(self.data.ids))
    for path in self.config.mine.runs:
      name = pathlib.Path(path).name
      if name in self.names and not self._place(name).exists():
        runs.read_trec(path, split.ids.rows, self.data.ids.rows, len(split), depth).save(self._place(name))
        preemption.check(f"mining stands after reading {name}, in {self.directory}")

  def _link_earlier(self) -> None:
    """Takes what was found for an earlier pool: BM25 finds the same for all, and so do further retrievers."""
    # No pool but one whose stage is an input: what lies elsewhere may be of another config.
    earlier = self.layout.train(1) if self.number == 1 else self.layout.mine(1)
    if BM25 in self.names and self.number:
      first = self.layout.mine(0) if common.mines_first(self.config) else earlier
      _link(first / "runs" / BM25, self._place(BM25))
    for name in self._dense:
      if name == DENSE:
        continue
      if name.startswith("train"):  # in its own round's pool it is the retriever
        pool = self.layout.mine(int(name.removeprefix("train")))
        home, run = pool, DENSE
      else:
        pool, home, run = earlier, earlier / "retrievers" / name, name
      for part in ("vectors", "index"):
        _link(home / part, self._home(name) / part)
      _link(pool / "runs" / run, self._place(name))

  def _encode(self, name: str) -> None:
    """Makes vectors of the training queries and of the corpus by a retriever, where they are not whole."""
    ids = {self._split: self.data.splits[self._split].ids, "corpus": self.data.ids}
    places = {part: self._home(name) / "vectors" / part for part in ids}

    def whole() -> bool:
      return all((place / "manifest.json").exists() for place in places.values())

    if hosts.first_says(whole) if self.together else whole():
      return
    retriever = self._retriever(name)
    for part, place in places.items():
      made = encode.stored(self.config, self.layout, part, retriever)
      encode.encode(self.config, self.layout, place, retriever, ids[part], made, self.together)

  def _retriever(self, name: str) -> Retriever:
    if name == DENSE and self.retriever is not None:
      return self.retriever
    config, layout = self.config, self.layout
    if name == DENSE or name.startswith("train"):
      number = self.number if name == DENSE else int(name.removeprefix("train"))
      return common.trained(config, layout, number, None if config.prompt.kind == "none" else self.frozen)
    raw = name == "backbone" and config.pretrain.enabled
    untuned = common.base_backbone(config, layout) if raw else self.frozen
    return Retriever.untuned(untuned, **config.vector, **config.text)

  @functools.cached_property
  def frozen(self) -> Backbone:
    """The backbone that prompts are trained on."""
    return self.backbone or common.load_backbone(self.config, self.layout)

  def _search(self) -> None:
    """Searches by the retrievers that are asked here, in parts of the training queries.

    Of processes that work together all take turns at the parts, and the first one builds indexes.
    """
    asked = [name for name in self.names if name == BM25 or name in self._dense]
    with hosts.first_goes_first("indexes") if self.together else contextlib.nullcontext():
      if not self.together or hosts.is_main():
        self._build([name for name in asked if not self._place(name).exists()])
    count = len(self.data.splits[self._split])
    for name in asked:
      part = search.part_queries(self.config, dense=name != BM25)
      search.shared(self._place(name), count, self._finder(name), part, self.together)

  def _build(self, wanted: list[str]) -> None:
    """Builds the indexes of what is still to be searched."""
    for name in wanted:
      if name == BM25:
        common.bm25(self.layout, self.data)
      else:
        search.build(self.config, self._vectors(name)[1], self._home(name) / "index")

  def _finder(self, name: str) -> Callable[[slice], Run]:
    """What searches for some rows of the training queries."""
    split, depth = self.data.splits[self._split], min(options(self.config, name).depth, len(self.data.ids))

    def by_bm25(rows: slice) -> Run:
      texts = [query.text for query in itertools.islice(split.queries.read(rows.start), rows.stop - rows.start)]
      return common.bm25(self.layout, self.data).search(texts, depth)

    def by_retriever(rows: slice) -> Run:
      return search.dense(self.config, *self._vectors(name), depth, self._home(name) / "index", rows)

    return by_bm25 if name == BM25 else by_retriever


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
  """Links what is there in another pool and not yet in this one."""
  if source != target and source.exists() and not target.exists():
    files.link_tree(source, target)


def positive_scores(queries: Embeddings, passages: Embeddings, positives: Qrels) -> np.ndarray:
  """The best score of each query's judged positives, float32 [Q]; NaN where it has none."""
  best = np.full(len(queries), np.nan, np.float32)
  stop = 0
  while (start := stop) < len(queries):
    most = np.searchsorted(positives.offsets, positives.offsets[start] + _BLOCK, side="right") - 1
    stop = int(np.clip(most, start + 1, min(start + _BLOCK, len(queries))))
    span = slice(positives.offsets[start], positives.offsets[stop])
    owners = np.repeat(np.arange(stop - start), np.diff(positives.offsets[start : stop + 1]))
    relevant = positives.grades[span] > 0
    owners, rows = owners[relevant], positives.rows[span][relevant]
    vectors = queries.take(np.arange(start, stop))
    scores = np.einsum("nh,nh->n", vectors[owners], passages.take(rows))
    np.fmax.at(best[start:stop], owners, scores)
  return best
