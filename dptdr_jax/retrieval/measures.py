"""Evaluation by ir-measures, named its way, and the statistics that say what a difference is worth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import ir_measures
import numpy as np

from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import Run

DEFAULT = ("RR@10", "R@20", "R@50", "R@100", "R@1000", "nDCG@10")


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Measures of one run, query by query.

  Attributes:
    queries: int64 [J], rows of the queries that count.
    values: measure name → float64 [J].
  """

  queries: np.ndarray
  values: dict[str, np.ndarray]

  def means(self) -> dict[str, float]:
    """The mean over all J queries of each measure: what tables show."""
    return {name: float(values.mean()) for name, values in self.values.items()}


def evaluate(run: Run, qrels: Qrels, names: Sequence[str] = DEFAULT) -> Evaluation:
  """Evaluates a run over every judged query; one that found nothing counts 0 (MS MARCO's rule for MRR@10).

  ir-measures' providers break equal scores by the passage's id as a string. Here the rank alone is handed to them,
  so ties stand as the run has them. That makes the passages' dictionary the same for all queries of a length: an
  unjudged passage is known by its rank only, and no dictionary of Q × K ids is ever built.

  Args:
    run: Q queries.
    qrels: judgements of the same Q queries. Measures with a `rel` level, "RR(rel=2)@10" say, count grades from there
      on as relevant (TREC Deep Learning: 2); nDCG takes the grades as gains.
    names: measures as ir-measures spells them: RR@10, R@100, nDCG@10, AP, Success@5, …

  Raises:
    InputError: no query is judged, or a name is not ir-measures'.
  """
  if len(run) != len(qrels):
    raise ValueError(f"run of {len(run)} queries, judgements of {len(qrels)}")
  judged = qrels.judged()
  if not len(judged):
    raise InputError("no judged query to evaluate", fix="Check that qrels and queries belong together.")
  measures = {name: _parse(name) for name in names}
  ranks = [str(rank) for rank in range(run.depth)]
  by_length: dict[int, dict[str, float]] = {}
  found: dict[str, dict[str, float]] = {}
  wanted: dict[str, dict[str, int]] = {}
  counts = run.counts()
  for query in judged:
    rows, grades = qrels.of(query)
    name, count = str(query), int(counts[query])
    wanted[name] = {f"not found {i}": int(grade) for i, grade in enumerate(grades)}
    for rank, judgement in np.argwhere(run.rows[query, :count, None] == rows):
      del wanted[name][f"not found {judgement}"]
      wanted[name][ranks[rank]] = int(grades[judgement])
    if count:
      if count not in by_length:
        by_length[count] = {ranks[rank]: float(run.depth - rank) for rank in range(count)}
      found[name] = by_length[count]
  return Evaluation(judged, _calculate(measures, wanted, found, judged))


def evaluate_hits(hits: np.ndarray, cutoffs: Sequence[int] = (5, 20, 100)) -> Evaluation:
  """Success@k from answer matches: the share of queries with a hit in the top k, the R@k of open-domain QA papers.

  Args:
    hits: bool [Q, K] of `answers.match_run`; every query counts.
    cutoffs: the k; one beyond K sees all K.
  """
  values = {f"Success@{k}": hits[:, :k].any(1).astype(np.float64) for k in cutoffs}
  return Evaluation(np.arange(len(hits)), values)


def bootstrap_interval(
  values: np.ndarray, *, level: float = 0.95, samples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
  """Percentile bootstrap interval of a mean over queries (Efron 1979; Sakai, SIGIR 2006, for retrieval measures).

  Args:
    values: float [J], a measure of each query.
    level: the interval's coverage.
    samples: resamples of J queries with replacement.
  """
  generator = np.random.default_rng(seed)
  means = np.empty(samples)
  for chunk in _chunks(samples, len(values)):
    means[chunk] = values[generator.integers(0, len(values), (chunk.stop - chunk.start, len(values)))].mean(1)
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def randomisation_test(a: np.ndarray, b: np.ndarray, *, samples: int = 10_000, seed: int = 0) -> float:
  """Two-sided p-value of a paired randomisation test for equal means (Smucker, Allan and Carterette, CIKM 2007).

  Under the hypothesis the two systems' values of a query are exchangeable: the sign of each difference is drawn anew
  and the share of draws with a mean at least as far from 0 as the observed one is p. Counting the observed draw keeps p
  above 0: (1 + hits) / (1 + samples).

  Args:
    a: float [J], a measure of each query under one system.
    b: float [J], the same queries under the other.
  """
  if a.shape != b.shape:
    raise ValueError(f"values of {a.shape} and {b.shape} queries are not pairs")
  difference = np.asarray(a, np.float64) - b
  observed = abs(difference.sum())
  generator, hits = np.random.default_rng(seed), 0
  for chunk in _chunks(samples, len(difference)):
    signs = generator.integers(0, 2, (chunk.stop - chunk.start, len(difference)), np.int8) * 2 - 1
    # A rounding error must not turn an equal draw into a smaller one.
    hits += int((np.abs(signs @ difference) >= observed * (1 - 1e-12)).sum())
  return (1 + hits) / (1 + samples)


def _chunks(samples: int, width: int) -> list[slice]:
  """Cuts `samples` draws of `width` queries so that no matrix of draws passes 4 million entries."""
  size = max(1, 4_000_000 // max(1, width))
  return [slice(start, min(samples, start + size)) for start in range(0, samples, size)]


def check(names: Sequence[str]) -> None:
  """Raises InputError for a name that ir-measures doesn't know."""
  for name in names:
    _parse(name)


def cutoff(name: str) -> int:
  """How many passages of a query's a measure looks at; 0 where all."""
  return _parse(name).params.get("cutoff", 0)


def _parse(name: str) -> ir_measures.Measure:
  try:
    measure = ir_measures.parse_measure(name)
    measure.validate_params()
    return measure
  except (ValueError, NameError, TypeError, AttributeError, KeyError, AssertionError) as error:
    raise InputError(
      f"not a measure of ir-measures ({error})", value=name, fix="Write RR@10, R@100, nDCG@10 …"
    ) from error


def _calculate(
  measures: dict[str, ir_measures.Measure],
  wanted: dict[str, dict[str, int]],
  found: dict[str, dict[str, float]],
  judged: np.ndarray,
) -> dict[str, np.ndarray]:
  place = {str(query): i for i, query in enumerate(judged)}
  by_measure = {measure: np.full(len(judged), math.nan) for measure in measures.values()}
  for metric in ir_measures.iter_calc(list(by_measure), wanted, found):
    by_measure[metric.measure][place[metric.query_id]] = metric.value
  values = {name: by_measure[measure] for name, measure in measures.items()}
  short = [name for name, of in values.items() if np.isnan(of).any()]
  if short:
    raise InputError("ir-measures gave no value for every query", value=short, fix="Leave these measures out.")
  return values
