"""Mined negatives as files for other trainers, and mining for embeddings that others have made."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np

from dptdr_jax.core import files, remote
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.data.sources import lines
from dptdr_jax.retrieval import exports
from dptdr_jax.retrieval.candidates import MAX_DEPTH, Pool
from dptdr_jax.retrieval.denoise import MarginRule, denoise
from dptdr_jax.retrieval.merge import Source, pool_from_runs
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.search import search_exact
from dptdr_jax.stages.layout import Layout
from dptdr_jax.stages.mine import texts
from dptdr_jax.stages.sources import positive_scores

_SOURCE = "dense"


def export(
  workdir: files.Path, number: int, out: files.Path, form: str, count: int, *,
  generation: int | None = None, separator: str | None = None,
) -> dict[str, int]:  # fmt: skip
  """Writes the negatives of mining round `number`, or of a generation that was mined while round `number` trained, with
  their texts: 'original', or 'ntuples' of `count` negatives.

  Where the run trains on pseudo-positives they are positives there, too. The separator stands between title and text;
  None: the run's own for 'original', a space for n-tuples.

  Raises:
    InputError: no such round of mining, or no such generation.
  """
  layout = Layout.of(workdir)
  mined = layout.mine(number) if generation is None else layout.generation(number, generation)
  if not (mined / "mining.json").exists():
    what = f"round {number} of mining" if generation is None else f"generation {generation} of round {number}"
    found = (*layout.root.glob("mine*/mining.json"), *layout.root.glob("train*/generations/*/mining.json"))
    there = ", ".join(sorted(str(one.parent.relative_to(layout.root)) for one in found))
    fix = f"There are {there}: --round and --generation take the numbers" if there else "Nothing is mined here yet"
    raise InputError(f"{what} is not done here", path=mined, fix=fix)
  data, pool = PreparedData(layout.prepared), Pool.open(mined / "pool")
  about = files.read_json(mined / "mining.json")
  split, original = data.splits[about["split"]], form == "original"
  if separator is None:
    separator = about.get("separator", " ") if original else " "

  def positives(row: int) -> np.ndarray:
    judged = split.relevant(row) if len(split.positives(row)) else []  # without one the run does not train on it
    pseudo = pool.pseudo_positives(row) if about.get("pseudo_positives") and len(judged) else []
    return np.concatenate([judged, pseudo]).astype(np.int64)

  queries = (query.text for query in split.queries.read())
  examples = exports.training_examples(pool, queries, positives, texts(data))
  with remote.written(out) as local:
    if original:
      return exports.write_original(local, examples, separator=separator)
    return exports.write_ntuples(local, examples, count, separator=separator)


@dataclasses.dataclass(frozen=True)
class Vectors:
  """A matrix of vectors [n, H] in a .npy file, memory-mapped, and the ids of its rows.

  Attributes:
    path: the file, local or a URL, as is the next.
    ids_path: text file with an id a line; '': the ids are the row numbers.
  """

  path: str
  ids_path: str = ""

  @functools.cached_property
  def matrix(self) -> np.ndarray:
    """Raises InputError where the file holds no matrix of floats."""
    try:
      found = np.load(remote.staged(self.path), mmap_mode="r")
    except (OSError, ValueError) as error:
      raise InputError(f"not a .npy file ({error})", path=self.path) from error
    if found.ndim != 2 or found.dtype.kind != "f":
      raise InputError(f"a matrix of floats is wanted, not {found.dtype} {found.shape}", path=self.path)
    return found

  @functools.cached_property
  def ids(self) -> list[str]:
    """Raises InputError where their number is not that of the rows, or one is there twice."""
    if not self.ids_path:
      return [str(row) for row in range(len(self))]
    found = [text.strip() for _, text in lines.read_lines(remote.staged(self.ids_path))]
    if len(found) != len(self) or len(set(found)) != len(found):
      raise InputError(f"{len(set(found))} ids for {len(self)} vectors", path=self.ids_path)
    return found

  def __len__(self) -> int:
    return len(self.matrix)

  def take(self, rows: np.ndarray) -> np.ndarray:
    """float32 [n, H]."""
    return np.asarray(self.matrix[np.asarray(rows)], np.float32)


def mine(
  passages: Vectors, queries: Vectors, qrels: files.Path, out: files.Path, *, depth: int, first: int = 0,
  relative: float | None = None, absolute: float | None = None,
) -> dict[str, int]:  # fmt: skip
  """Writes OUT/pool and OUT/negatives.jsonl: {"query", "negatives", "scores"} by id, best first; returns counts.

  A query without a positive is left out: what is found for it may well be one.
  """
  depth = min(depth, len(passages))
  if not 0 <= first < depth <= MAX_DEPTH:
    raise InputError(f"ranks go from 0 ≤ first < depth ≤ {MAX_DEPTH}", value=(first, depth))
  rules = [MarginRule(_SOURCE, relative, absolute)] if relative or absolute else []
  positives = _read_qrels(qrels, queries, passages)
  with remote.written(out, last="negatives.jsonl") as out:
    run = search_exact(queries.take(np.arange(len(queries))), passages.matrix, depth)
    known = positive_scores(queries, passages, positives)
    source = Source(run, depth, first, positive_scores=known)
    pool = pool_from_runs(out / "merged", {_SOURCE: source}, positives)
    pool = denoise(out / "pool", out / "merged", rules)
    files.remove(out / "merged")
    with files.atomic_path(out / "negatives.jsonl") as partial, open(partial, "w", encoding="utf-8") as stream:
      judged = np.array([(positives.of(row)[1] > 0).any() for row in range(len(queries))])
      for row in np.flatnonzero(judged):
        scores, _ = pool.candidate_scores(row, _SOURCE)
        found = [passages.ids[passage] for passage in pool.candidates(row)]
        line = {"query": queries.ids[row], "negatives": found, "scores": [round(float(score), 6) for score in scores]}
        stream.write(json.dumps(line, ensure_ascii=False) + "\n")
  counts = {"queries": int(judged.sum()), "without a positive": int((~judged).sum())}
  return {**counts, **pool.manifest["counts"], "left": pool.manifest["kept"]}


def _read_qrels(path: files.Path, queries: Vectors, passages: Vectors) -> Qrels:
  """BEIR's three columns (with or without a header) or TREC's four."""
  places = ({name: row for row, name in enumerate(vectors.ids)} for vectors in (queries, passages))
  query_rows, passage_rows = places
  triples = []
  for line, text in lines.read_lines(remote.staged(path)):
    fields = text.split()
    if not fields or (line == 1 and fields[-1] == "score"):
      continue
    if len(fields) not in (3, 4):
      raise InputError(f"{len(fields)} columns where qrels have 3 or 4", path=path, line=line, value=text)
    for known, name, kind in ((query_rows, fields[0], "query"), (passage_rows, fields[-2], "passage")):
      if name not in known:
        raise InputError(f"unknown {kind} id", path=path, line=line, value=name)
    grade = lines.grade_of(fields[-1], path, line)
    triples.append((query_rows[fields[0]], passage_rows[fields[-2]], grade))
  columns = np.array(triples, np.int64).reshape(-1, 3).T
  return Qrels.from_triples(*columns, len(queries))
