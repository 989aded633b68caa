"""evaluate: run files, measures of every query, means and intervals, of each system on each split."""

from __future__ import annotations

import pathlib
import re
import zipfile
from collections.abc import Iterator

import numpy as np

from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.store import Inputs, Kind, Making, Ref
from dptdr_jax.data.prepare import Corpus, Split
from dptdr_jax.pipeline import pools
from dptdr_jax.pipeline.encode import run_of
from dptdr_jax.retrieval import answers, measures, runs
from dptdr_jax.retrieval.runs import Run

# Measures that need to know which grades are relevant.
_BINARY = re.compile(r"(RR|R|AP|P|Success|Rprec|Bpref|SetP|SetR|SetF|SetAP)(@\d+)?")


class MeasuresInputs(Inputs):
  """Measures of one system on one split."""

  system: str
  run: Ref
  split: Ref
  split_name: str
  corpus: Ref
  measures: tuple[str, ...]
  answers: bool
  graded: bool
  msmarco: bool


def build_measures(inputs: MeasuresInputs, making: Making) -> None:
  """Writes run.trec, per_query.npz, query_ids.json and measures.json."""
  corpus, split = Corpus(making.path(inputs.corpus)), Split(making.path(inputs.split), inputs.split_name)
  run, query_ids = run_of(inputs.run, making), split.ids.ids(range(len(split)))
  runs.write_trec(making.directory / "run.trec", run, query_ids, corpus.ids, inputs.system)
  if inputs.msmarco:
    runs.write_msmarco(making.directory / "run.msmarco.tsv", run, query_ids, corpus.ids)
  files.write_json(making.directory / "query_ids.json", query_ids)
  by_query = dict(_measure(inputs, corpus, split, run))
  with files.atomic_path(making.directory / "per_query.npz") as partial, open(partial, "wb") as stream:
    np.savez(stream, **by_query)
  about = {
    "means": {name: float(values.mean()) for name, values in by_query.items()},
    "intervals": {name: measures.bootstrap_interval(values) for name, values in by_query.items()},
    "passages": len(corpus),
    "queries": len(pools.qrels(split).judged()) or len(split),
  }
  files.write_json(making.directory / "measures.json", about)


MEASURES = Kind("measures", 1, build_measures, together=False)


def _measure(inputs: MeasuresInputs, corpus: Corpus, split: Split, run: Run) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (measure, its value for every query that counts)."""
  by_answers = answered(inputs.measures, inputs.answers)
  if by_answers:
    cutoffs = {name: int(name.partition("@")[2]) for name in by_answers}
    lists = [query.answers for query in split.queries.read()]
    texts = lambda rows: [passage.text for passage in corpus.passages.take(rows)]  # noqa: E731
    hits = answers.match_run(run, lists, texts, depth=max(cutoffs.values()))
    for name, k in cutoffs.items():  # the R@k of open-domain QA papers
      yield name, hits[:, :k].any(1).astype(np.float64)
  judged = [name_on(name, inputs.graded) for name in inputs.measures if name not in by_answers]
  if judged:
    yield from measures.evaluate(run, pools.qrels(split), judged).values.items()


def measured(directory: pathlib.Path) -> tuple[list[str], dict[str, np.ndarray]]:
  """The ids of a split's queries, and of each measure its values, float [J], from the artefact of a system.

  Raises:
    InputError: its files are not whole.
  """
  path = directory / "per_query.npz"
  try:
    with np.load(path) as values:
      return files.read_json(directory / "query_ids.json"), dict(values)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise InputError(f"not whole ({error})", path=path) from error


def answered(names: tuple[str, ...], by_answers: bool) -> list[str]:
  """The measures that are taken by answers, not by judgements."""
  return [name for name in names if by_answers and name.startswith("Success@")]


def name_on(measure: str, graded: bool) -> str:
  """A measure's name in the results of a split: of a graded one, grades count from 2 on."""
  return _BINARY.sub(r"\1(rel=2)\2", measure) if graded and _BINARY.fullmatch(measure) else measure
