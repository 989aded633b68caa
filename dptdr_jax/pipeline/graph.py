"""Which artefact of a run is made from which: all of them, with their inputs and so their keys, before any is made."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from dptdr_jax.core.store import Ref
from dptdr_jax.pipeline import encode, evaluate, fuse, mine, report, rerank, train
from dptdr_jax.pipeline.foundations import Foundations, Node, search_of
from dptdr_jax.pipeline.outside import Outside
from dptdr_jax.pipeline.sources import DENSE, SourceName, sources_of
from dptdr_jax.pipeline.systems import BM25, FUSED, FUSED_BACKBONE, System, dense_part, shown, systems
from dptdr_jax.settings import Settings

__all__ = ["Graph", "Node", "draws_from_bm25", "mines_first", "pool_titles"]


class Graph(Foundations):
  """All artefacts of a run, in the order in which they are made.

  Attributes:
    nodes: by reference.
    report: the artefact that a run ends with.
  """

  def __init__(self, settings: Settings, outside: Outside):
    """Reads names and hashes of the files from outside, and nothing else.

    Raises:
      InputError: a file or a folder that is not there.
    """
    super().__init__(settings, outside)
    self._prepare()
    if settings.pretrain.enabled:
      self.stage = "pretrain"
      _ = self.pretrained
    if settings.data.format != "text":
      self._rounds()
      self._encode()
      self._evaluate()
    self.stage = "report"
    self.report = self._report()

  def _prepare(self) -> None:
    _ = self.corpus
    if self.settings.data.format != "text":
      for name in ("", *self._splits()):
        self.tokens(name)

  def _splits(self) -> list[str]:
    settings = self.settings
    trains = settings.rounds > 0
    wanted = [settings.data.train_split] if trains else []
    tried = (trains and settings.train.evaluate_every) or (
      settings.pretrain.enabled and settings.pretrain.evaluate_every
    )
    wanted += [settings.data.dev_split] if (tried or settings.cross.enabled) and settings.data.dev_split else []
    return list(dict.fromkeys([*wanted, *settings.evaluate.splits]))

  # Training, mining, the cross-encoder.

  def _rounds(self) -> None:
    settings, self.cross = self.settings, None
    self.pools: dict[int, Ref] = {}
    denoises = settings.mine.cross_encoder and settings.train.refresh_every
    for number in range(1, settings.rounds + 1):
      if number > 1 or mines_first(settings):
        self.stage = f"mine{number - 1}"
        self.pools[number - 1] = self._pool(number - 1)
      if number == 1 and settings.cross.enabled and denoises:  # it denoises what is mined while round 1 trains
        self._cross()
      self.stage = f"train{number}"
      self.trained[number] = self._train(number)
      if number == 1 and settings.cross.enabled and not denoises:
        self._cross()

  def _train(self, number: int) -> Ref:
    settings, name = self.settings, self.settings.data.train_split
    pool = self.pools.get(number - 1) if number > 1 or draws_from_bm25(settings) else None
    mined = number > 1 or settings.train.refresh_every > 0
    inputs = train.TrainInputs(
      number=number, seed=settings.seed, train=settings.train, prompt=settings.prompt, vector=settings.vector,
      text=settings.text, compute=self.compute, dropout=settings.backbone.dropout, backbone=self.pretrained,
      split=self.split(name), split_name=name, queries=self.tokens(name), corpus=self.tokens(), pool=pool,
      pseudo_positives=settings.mine.pseudo_positives and mined,
      dev=self.dev() if settings.train.evaluate_every else None,
      refresh=self._refresh(number) if settings.train.refresh_every else None, log_every=settings.log_every,
    )  # fmt: skip
    return self.add(train.TRAIN, inputs, {f"train{number}": ""})

  def _cross(self) -> None:
    settings, name = self.settings, self.settings.data.train_split
    self.stage = "cross"
    inputs = rerank.CrossInputs(
      seed=settings.seed, cross=settings.cross, prompt=settings.prompt, text=settings.text, compute=self.compute,
      dropout=settings.backbone.dropout, backbone=self.pretrained, split=self.split(name), split_name=name,
      queries=self.tokens(name), corpus=self.tokens(), dev=self.pair_dev(),
      pool=self.pools[0] if settings.cross.negatives == "bm25" else None, log_every=settings.log_every,
    )  # fmt: skip
    self.cross = self.add(rerank.CROSS, inputs, {"cross": ""})

  def _pool(self, number: int) -> Ref:
    """The pool of negatives that is mined with the retriever of round `number`; 0: without one."""
    settings, name = self.settings, self.settings.data.train_split
    inputs = mine.CandidatesInputs(
      corpus=self.corpus, split=self.split(name), rules=self._rules(),
      sources=tuple(self._source(source, number) for source in sources_of(settings, number)),
    )  # fmt: skip
    denoises = settings.mine.cross_encoder and number and self.cross is not None
    place = {f"mine{number}": ""}
    candidates = self.add(mine.CANDIDATES, inputs, {} if denoises else place)
    if not denoises:
      return candidates
    scores = rerank.PairScoresInputs(
      cross=self.cross, backbone=self.pretrained, compute=self.compute, queries=self.tokens(name),
      corpus=self.tokens(), run=None, candidates=candidates, depth=settings.cross.depth,
    )  # fmt: skip
    cleaned = mine.PoolInputs(
      corpus=self.corpus, split=self.split(name), candidates=candidates, scores=self.add(rerank.PAIR_SCORES, scores),
      thresholds=self._thresholds(), rules=self._rules(),
    )  # fmt: skip
    return self.add(mine.POOL, cleaned, place)

  def _rules(self) -> mine.PoolRules:
    settings = self.settings
    return mine.PoolRules(
      split_name=settings.data.train_split, same_text=settings.mine.same_text, separator=settings.text.separator,
      pseudo_positives=settings.mine.pseudo_positives,
    )  # fmt: skip

  def _thresholds(self) -> mine.Thresholds:
    return mine.Thresholds(negative_below=self.settings.mine.negative_below,
                           positive_above=self.settings.mine.positive_above)  # fmt: skip

  def _source(self, source: SourceName, number: int) -> mine.SourceInput:
    """One source of the pool of round `number`; its run is searched at the depth that is taken."""
    name, window = self.settings.data.train_split, source.window
    if source.kind == "bm25":
      return mine.SourceInput(name=source.name, window=window, run=self.bm25_run(name, window.depth))
    if source.kind == "file":
      return mine.SourceInput(name=source.name, window=window, run=self._file_run(source))
    made = self.retriever(System("", "", "trained", number=number))
    queries, passages = self.vectors(made, name), self.vectors(made)
    run = self.dense_run(queries, passages, window.depth)
    return mine.SourceInput(name=source.name, window=window, run=run, queries=queries, passages=passages)

  def _refresh(self, number: int) -> train.Refresh:
    """What mining needs while round `number` trains: all but the retriever's own vectors and run."""
    settings, name = self.settings, self.settings.data.train_split
    listed = sources_of(settings, number)
    own = next(source for source in listed if source.name == DENSE)
    return train.Refresh(
      corpus=self.corpus, split=self.split(name), rules=self._rules(), window=own.window,
      sources=tuple(self._source(source, number) for source in listed if source.name != DENSE),
      order=tuple(source.name for source in listed), encoding=self.encoding(), search=search_of(settings),
      index=settings.index, cross=self.cross if settings.mine.cross_encoder else None,
      cross_depth=settings.cross.depth,
      thresholds=self._thresholds() if settings.mine.cross_encoder else None,
    )  # fmt: skip

  def _file_run(self, source: SourceName) -> Ref:
    name, path = self.settings.data.train_split, pathlib.Path(source.path)
    sha256 = next(iter(self._outside.files(path.parent, [path]).hashes.values()))
    inputs = encode.FileRunInputs(name=source.name, sha256=sha256, split=self.split(name), split_name=name,
                                  corpus=self.corpus, depth=source.window.depth, path=str(path))  # fmt: skip
    return self.add(encode.FILE_RUN, inputs)

  # Evaluation and the report.

  def _encode(self) -> None:
    self.stage = "encode"
    for system in systems(self.settings):
      if system.is_dense:
        for split in (*self._measured_splits(), ""):
          self.vectors(self.retriever(system), split)

  def _measured_splits(self) -> list[str]:
    """The reported splits, and dev, which chooses weights and the recommended system."""
    dev = self.settings.data.dev_split
    return list(dict.fromkeys([*self.settings.evaluate.splits, *([dev] if dev else [])]))

  def _evaluate(self) -> None:
    self.stage = "evaluate"
    self.measured: dict[str, dict[str, Ref]] = {}
    self.recommended: Ref | None = None
    settings, dev = self.settings.evaluate, self.settings.data.dev_split
    for system in systems(self.settings):
      self.measured[system.name] = {split: self._measures(system, split) for split in settings.splits}
      if system.name == FUSED:
        published = fuse.PublishedInputs(trained=self.trained[system.number], fusion=self._fusion(system))
        self.add(fuse.PUBLISHED, published, {"retriever": "retriever"})
    if dev:
      # Reranking dev as well would cost as much as the reported splits: it takes part where dev is one of them.
      tried = [one for one in systems(self.settings) if one.kind != "reranked" or dev in settings.splits]
      baselines = tuple(one.name for one in tried if one.kind in ("bm25", "untuned") or one.name == FUSED_BACKBONE)
      inputs = fuse.RecommendedInputs(dev={one.name: self._measures(one, dev) for one in tried},
                                      measured={one.name: self.measured[one.name] for one in tried},
                                      baselines=baselines)  # fmt: skip
      self.recommended = self.add(fuse.RECOMMENDED, inputs, {"recommended.json": "recommended.json"})

  def _measures(self, system: System, split: str) -> Ref:
    settings = self.settings.evaluate
    inputs = evaluate.MeasuresInputs(
      system=system.name, run=self._run(system, split), split=self.split(split), split_name=split,
      corpus=self.corpus, measures=settings.measures, answers=settings.answers,
      graded=split in settings.graded_splits, msmarco=self.settings.data.format == "msmarco",
    )  # fmt: skip
    place = {f"evaluate/runs/{system.name}.{split}.trec": "run.trec"} if split in settings.splits else {}
    return self.add(evaluate.MEASURES, inputs, place)

  def _run(self, system: System, split: str) -> Ref:
    settings = self.settings
    if system.name == BM25:
      return self.bm25_run(split, settings.evaluate.depth)
    if system.kind == "fused":
      runs = [self._run(one, split) for one in (System(BM25, "", "bm25"), dense_part(settings, system))]
      inputs = fuse.FusedRunInputs(bm25=runs[0], dense=runs[1], fusion=self._fusion(system),
                                   depth=settings.evaluate.depth)  # fmt: skip
      return self.add(fuse.FUSED_RUN, inputs)
    if system.kind == "reranked":
      last = System("", "", "trained", number=system.number)
      run = self._run(last, split)
      scores = rerank.PairScoresInputs(
        cross=self.cross, backbone=self.pretrained, compute=self.compute, queries=self.tokens(split),
        corpus=self.tokens(), run=run, candidates=None, depth=settings.cross.rerank,
      )  # fmt: skip
      return self.add(rerank.RERANKED, rerank.RerankedRunInputs(run=run, scores=self.add(rerank.PAIR_SCORES, scores)))
    made = self.retriever(system)
    return self.dense_run(self.vectors(made, split), self.vectors(made), settings.evaluate.depth)

  def _fusion(self, system: System) -> Ref:
    """How BM25 and a dense system are fused, as dev chooses it."""
    name, dev = self.settings.data.dev_split, None
    if name:
      dev = fuse.DevRuns(bm25=self._run(System(BM25, "", "bm25"), name),
                         dense=self._run(dense_part(self.settings, system), name), split=self.split(name),
                         name=name)  # fmt: skip
    return self.add(fuse.FUSION, fuse.FusionInputs(dev=dev))

  def _report(self) -> Ref:
    settings = self.settings
    links = {"results.json": "results.json", "report.html": "report.html", "summary.json": "summary.json"}
    if settings.data.format == "text":
      links.pop("results.json")
    inputs = report.ReportInputs(
      facts=report.facts(settings, self.compute.dtype), backbone=self.pretrained,
      pretrain=self.pretrained.made if settings.pretrain.enabled else None,
      **self._report_of_queries() if settings.data.format != "text" else {},
    )  # fmt: skip
    return self.add(report.REPORT, inputs, links)

  def _report_of_queries(self) -> dict:
    settings, system = self.settings, shown(self.settings)
    split = settings.evaluate.splits[0]
    return {
      "systems": tuple(report.SystemInput(name=one.name, label=one.label, measures=self.measured[one.name])
                       for one in systems(settings)),
      "trained": tuple(self.trained.values()),
      "cross": self.cross,
      "pools": tuple(report.PoolInput(title=title, pool=self.pools[number]) for number, title in pool_titles(settings)),
      "refreshed": settings.train.refresh_every > 0,
      "recommended": self.recommended,
      "examples": report.ExamplesInput(run=self._run(system, split), split=self.split(split), split_name=split,
                                       corpus=self.corpus),
    }  # fmt: skip


def mines_first(settings: Settings) -> bool:
  """Whether there is a pool before round 1: BM25's negatives, for the retriever or for the cross-encoder."""
  crossed = settings.rounds > 0 and settings.cross.enabled and settings.cross.negatives == "bm25"
  return draws_from_bm25(settings) or crossed


def draws_from_bm25(settings: Settings) -> bool:
  """Whether round 1 takes negatives that BM25 has ranked; with one passage a query it takes none."""
  return settings.rounds > 0 and settings.train.negatives == "bm25" and settings.train.passages > 1


def pool_titles(settings: Settings) -> Sequence[tuple[int, str]]:
  """The pools of a run, by the round whose retriever mined, and who draws from them."""
  titles = []
  for number in range(settings.rounds):
    users = [f"round {number + 1}"] if number or draws_from_bm25(settings) else []
    if not number and settings.cross.enabled and settings.cross.negatives == "bm25":
      users.append("the cross-encoder")
    if users:
      titles.append((number, f"Negatives of {' and '.join(users)}"))
  return titles
