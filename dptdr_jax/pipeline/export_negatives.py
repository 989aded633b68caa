"""Mined negatives as files for other trainers, and mining for vectors that others have made."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np

from dptdr_jax.core import files, marks, remote
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.formats import lines
from dptdr_jax.data.prepare import Corpus, Split
from dptdr_jax.pipeline import pools, run
from dptdr_jax.pipeline.mine import positive_scores
from dptdr_jax.retrieval import exports
from dptdr_jax.retrieval.candidates import MAX_DEPTH, Pool
from dptdr_jax.retrieval.denoise import MarginRule
from dptdr_jax.retrieval.merge import Source, pool_from_runs
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.search import search_exact

_SOURCE = "dense"
_NEGATIVES = "negatives.jsonl"


def export(
  workdir: files.Path, number: int, out: files.Path, form: str, count: int, *,
  generation: int | None = None, separator: str | None = None,
) -> dict[str, int]:  # fmt: skip
  """Writes the negatives of mining round `number`, or of a generation that was mined during round `number`.

  Where the run trains on pseudo-positives they are positives here, too.

  Args:
    form: 'original', or 'ntuples' of `count` negatives.
    separator: between title and text; None: the run's own for 'original', a space for n-tuples.

  Raises:
    InputError: no such round of mining, or no such generation.
  """
  _, root = run.opened(workdir)
  mined = root / f"mine{number}" if generation is None else root / f"train{number}" / "generations" / str(generation)
  if not (mined / "mining.json").exists():
    what = f"round {number} of mining" if generation is None else f"generation {generation} of round {number}"
    there = [*root.glob("mine*/mining.json"), *root.glob("train*/generations/*/mining.json")]
    named = ", ".join(sorted(path.parent.relative_to(root).as_posix() for path in there))
    fix = f"There are {named}: --round and --generation take the numbers" if there else "Nothing is mined here yet"
    raise InputError(f"{what} is not done here", path=mined, fix=fix)
  about, pool, original = files.read_json(mined / "mining.json"), Pool.open(mined / "pool"), form == "original"
  corpus = Corpus(run.artefact(root, "prepare/corpus"))
  split = Split(run.artefact(root, f"prepare/splits/{about['split']}"), about["split"])
  separator = (about["separator"] if original else " ") if separator is None else separator
  trainable = set(split.trainable.tolist())

  def positives(row: int) -> np.ndarray:
    judged = split.relevant(row) if row in trainable else []  # without a positive the run does not train on it
    pseudo = pool.pseudo_positives(row) if about["pseudo_positives"] and len(judged) else []
    return np.concatenate([judged, pseudo]).astype(np.int64)

  queries = (query.text for query in split.queries.read())
  examples = exports.training_examples(pool, queries, positives, pools.texts(corpus.passages))
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
      matrix = np.load(remote.staged(self.path), mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
      raise InputError(f"not a .npy file ({error})", path=self.path) from error
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind != "f":
      shown = f"{matrix.dtype} {matrix.shape}" if isinstance(matrix, np.ndarray) else "an archive of arrays"
      raise InputError(f"a matrix of floats in a .npy file is wanted, not {shown}", path=self.path)
    return matrix

  @functools.cached_property
  def ids(self) -> list[str]:
    """Raises InputError where their number is not that of the rows, or one is there twice."""
    if not self.ids_path:
      return [str(row) for row in range(len(self))]
    ids = [text.strip() for _, text in lines.read_lines(remote.staged(self.ids_path))]
    if len(ids) != len(self) or len(set(ids)) != len(ids):
      raise InputError(f"{len(set(ids))} different ids for {len(self)} vectors", path=self.ids_path)
    return ids

  def __len__(self) -> int:
    return len(self.matrix)

  def take(self, rows: np.ndarray) -> np.ndarray:
    """float32 [n, H]."""
    return np.asarray(self.matrix[np.asarray(rows)], np.float32)


def mine(
  passages: Vectors, queries: Vectors, qrels: files.Path, out: files.Path, *, depth: int, first: int = 0,
  margin: float = 0.0,
) -> dict[str, int]:  # fmt: skip
  """Writes OUT/pool and OUT/negatives.jsonl: {"query", "negatives", "scores"} by id, best first; returns counts.

  A query without a positive is left out: what is ranked for it may well be one.

  Args:
    margin: drop what scores above this share of the query's best positive; 0: off.
  """
  depth = min(depth, len(passages))
  if not 0 <= first < depth <= MAX_DEPTH:
    raise InputError(f"ranks go from 0 ≤ first < depth ≤ {MAX_DEPTH}", value=(first, depth))
  positives = _read_qrels(qrels, queries, passages)
  if not remote.is_remote(out):
    marks.check_replaceable(out, lambda directory: (directory / _NEGATIVES).is_file())
  with remote.written(out, last=_NEGATIVES) as out:
    ranked = search_exact(queries.take(np.arange(len(queries))), passages.matrix, depth)
    source = Source(ranked, depth, first, positive_scores=positive_scores(queries, passages, positives))
    rules = [MarginRule(_SOURCE, margin)] if margin else []
    pool = pool_from_runs(out / "pool", {_SOURCE: source}, positives, rules)
    with files.atomic_path(out / _NEGATIVES) as partial, open(partial, "w", encoding="utf-8") as stream:
      judged = np.array([(positives.of(row)[1] > 0).any() for row in range(len(queries))])
      for row in np.flatnonzero(judged):
        scores, _ = pool.candidate_scores(row, _SOURCE)
        names = [passages.ids[passage] for passage in pool.candidates(row)]
        line = {"query": queries.ids[row], "negatives": names, "scores": [round(float(score), 6) for score in scores]}
        stream.write(json.dumps(line, ensure_ascii=False) + "\n")
  counts = {"queries": int(judged.sum()), "without a positive": int((~judged).sum())}
  return {**counts, **pool.manifest["counts"], "left": pool.manifest["kept"]}


def _read_qrels(path: files.Path, queries: Vectors, passages: Vectors) -> Qrels:
  """BEIR's three columns (with or without a header) or TREC's four."""
  query_rows, passage_rows = ({name: row for row, name in enumerate(vectors.ids)} for vectors in (queries, passages))
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
