"""evaluate: index, search, measure every system on every split; run files, intervals, DIR/results.json."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from dptdr_jax.core import files, manifest, preemption
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.prepare import PreparedData, PreparedSplit
from dptdr_jax.data.store import TokenStore
from dptdr_jax.reranker import CrossEncoder
from dptdr_jax.retrieval import answers, measures, runs
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.stages import common, cross, examples, search, systems
from dptdr_jax.stages.layout import Layout

_log = logging.getLogger(__name__)

FOUND = ("found", "index", "scores")  # of its directory, what says itself from what it was made
_ORIGINS = {"backbone": "untuned backbone", "pretrain": "pretrained backbone"}
# Measures that need to know which grades are relevant.
_BINARY = re.compile(r"(RR|R|AP|P|Success|Rprec|Bpref|SetP|SetR|SetF|SetAP)(@\d+)?")


def run(config: ConfigDict, workdir: files.Path) -> None:
  """Writes DIR/evaluate/{runs,parts,per_query}, DIR/results.json, and what the report shows. Parts are not redone."""
  layout = Layout.of(workdir)
  data = PreparedData(layout.prepared)
  names = systems.names(config)
  results: dict[str, dict] = {system: {} for system in names}
  intervals: dict[str, dict] = {system: {} for system in names}
  if common.trains(config) and config.data.train_split in config.evaluate.splits:
    _log.warning("%s is measured, and is what was trained on", config.data.train_split)
  for system in names:
    for split in config.evaluate.splits:
      part = layout.part(system, split)
      shown = system == systems.shown(config) and split == config.evaluate.splits[0]
      if not part.exists() or (shown and not layout.examples.exists()):
        _evaluate(config, layout, data, system, split, shown)
        preemption.check(f"evaluation stands after {system} on {split}")
      means = files.read_json(part)
      results[system][split], intervals[system][split] = means["means"], means["intervals"]
  files.write_json(layout.summary, _summary(config, layout, data) | {"intervals": intervals})
  files.write_json(layout.results, results)


def _evaluate(config: ConfigDict, layout: Layout, data: PreparedData, system: str, split: str, shown: bool) -> None:
  """Searches and measures; `shown`: the report's examples are taken from this run."""
  queries = data.splits[split]
  depth = min(config.evaluate.depth, len(data.ids))
  _log.info("%s on %s: %d queries", system, split, len(queries))
  found = _search(config, layout, data, system, split, depth)
  query_ids = queries.ids.ids(range(len(queries)))
  runs.write_trec(layout.run_file(system, split), found, query_ids, data.ids, system)
  if config.evaluate.msmarco_format:
    runs.write_msmarco(layout.run_file(system, split).with_suffix(".msmarco.tsv"), found, query_ids, data.ids)
  if shown:
    files.write_json(layout.examples, examples.choose(data, split, found, config.evaluate.examples))
  by_query = dict(_measure(config, data, queries, split, found))
  with files.atomic_path(layout.per_query(system, split)) as partial, open(partial, "wb") as stream:
    np.savez(stream, **by_query)
  files.write_json(
    layout.part(system, split),
    {
      "means": {name: float(values.mean()) for name, values in by_query.items()},
      "intervals": {name: measures.bootstrap_interval(values) for name, values in by_query.items()},
    },
  )


def _search(config: ConfigDict, layout: Layout, data: PreparedData, system: str, split: str, depth: int) -> Run:
  """The run of a system; what was found by the same search before is not searched again."""
  if system == systems.RERANKED:
    found = _search(config, layout, data, systems.trained(config)[-1], split, depth)
    return cross.rerank(config, layout, found, split)
  about: dict = {"depth": depth, "stores": [TokenStore(layout.store(part)).key for part in (split, "corpus")]}
  vectors = []
  if system != systems.BM25:
    vectors = [Embeddings(layout.embeddings(system, part)) for part in (split, "corpus")]
    about |= {"vectors": [each.manifest for each in vectors], "index": config.index.to_dict()}
  kept = layout.found(system, split)
  if manifest.read(kept / "about.json") != about:
    if vectors:
      made = search.dense(config, *vectors, depth, layout.index(system))
    else:
      made = common.bm25(layout, data).search([query.text for query in data.splits[split].queries.read()], depth)
    with files.atomic_directory(kept) as partial:
      made.save(partial / "run")
      files.write_json(partial / "about.json", about)
  return Run.open(kept / "run")


def _measure(
  config: ConfigDict, data: PreparedData, queries: PreparedSplit, split: str, found: Run
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (measure, its value for every query that counts); Success@k is by answer match where the config says so."""
  wanted = list(config.evaluate.measures)
  by_answers = common.measured_by_answers(config)
  if by_answers:
    cutoffs = [int(name.partition("@")[2]) for name in by_answers]
    lists = [query.answers for query in queries.queries.read()]
    hits = answers.match_run(found, lists, _texts(data), depth=max(cutoffs))
    yield from measures.evaluate_hits(hits, cutoffs).values.items()
  by_judgement = [name_on(config, split, name) for name in wanted if name not in by_answers]
  if by_judgement:
    yield from measures.evaluate(found, common.qrels(queries), by_judgement).values.items()


def _texts(data: PreparedData) -> Callable[[np.ndarray], list[str]]:
  """What reads the texts of passage rows."""
  return lambda rows: [passage.text for passage in data.passages.take(rows)]


def name_on(config: ConfigDict, split: str, measure: str) -> str:
  """A measure's name in the results of a split: grades count from 2 on where the config says so.

  Raises:
    InputError: the config does not have it.
  """
  if measure not in config.evaluate.measures:
    raise InputError("evaluate.measures does not have it", value=measure, fix=f"{list(config.evaluate.measures)} are")
  graded = split in config.evaluate.graded_splits and _BINARY.fullmatch(measure)
  return _BINARY.sub(r"\1(rel=2)\2", measure) if graded else measure


def _labels(config: ConfigDict) -> dict[str, str]:
  """What people read for the systems' names."""
  poolings = bool(config.evaluate.other_poolings)
  untuned = {
    system: _ORIGINS[origin] + (f", {pooling} pooling" if poolings else "")
    for system, (origin, pooling) in systems.untuned(config).items()
  }
  rounds = range(1, config.rounds + 1)
  trained = {f"train{number}": f"trained retriever, round {number}" for number in rounds}
  trained = trained if config.rounds > 1 else {"train1": "trained retriever"}
  return {systems.BM25: "BM25", **untuned, **trained, systems.RERANKED: "reranked by the cross-encoder"}


def _summary(config: ConfigDict, layout: Layout, data: PreparedData) -> Mapping:
  tuned = config.rounds and config.prompt.kind == "none" and not config.cross.enabled
  backbone = None if tuned else common.load_backbone(config, layout)
  trained, facts = {}, []
  if config.rounds:
    retriever = common.trained(config, layout, config.rounds, backbone)
    backbone = backbone or retriever.backbone
    prompts = {id(tree): tree for tree in retriever.prompts.values()}.values()  # tied prompts count once
    count = sum(leaf.size for leaf in jax.tree.leaves(list(prompts)))
    trained["trained_parameters"] = backbone.num_parameters if retriever.spec.kind == "none" else count
    facts.append(f"prompt {retriever.spec.kind}, length {retriever.spec.length}, "
                 f"{'tied' if config.prompt.tied else 'untied'}")  # fmt: skip
  if config.cross.enabled:
    trained["cross_parameters"] = CrossEncoder.load(cross.model_of(layout), backbone).num_parameters
  return {
    "rounds": config.rounds,
    "passages": len(data.ids),
    "queries": {name: len(common.qrels(data.splits[name]).judged()) or len(data.splits[name])
                for name in config.evaluate.splits},
    "labels": _labels(config),
    **trained,
    "backbone_parameters": backbone.num_parameters,
    "facts": [
      f"{common.origin(config, layout)}, {backbone.compute_dtype} on {jax.default_backend()}",
      *facts,
      f"pooling {config.vector.pooling}",
      *(f"{name}: {directory}" for name, directory in systems.saved(config).items()),
      f"data {config.data.source} {config.data.dir}".strip(),
      f"index {config.index.factory} (inner product)",
    ],
  }  # fmt: skip
