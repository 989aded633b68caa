"""BM25 as Lucene scores it, over bm25s, built and searched in bounded memory.

score(q, d) = Σ_t ln(1 + (C − df_t + ½) / (df_t + ½)) · tf / (tf + k1 · (1 − b + b · |d| / mean |d|)), over q's tokens t
with repetition. Kamphuis et al., ECIR 2020, call it "Lucene (accurate)". bm25s splits texts into stemmed tokens and
sums a query's postings. Its own index builder holds a corpus as Python lists, so the postings are built here, in shards
of passages. They have the document frequencies and mean length of the whole corpus: the ranking is that of one index.
"""

from __future__ import annotations

import array
import itertools
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import Stemmer

from dptdr_jax.core import preemption, progress, shards
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path, read_json, write_json
from dptdr_jax.retrieval.runs import Run

if TYPE_CHECKING:  # importing it computes on a jax device, which must not happen before jax.distributed is set up
  import bm25s

_K1, _B = 0.9, 0.4  # of the formula; Anserini's for passages
_FORMAT = 1
_KIND = "bm25"
_AGAIN = "Build it again"
_CHUNK = 10_000  # texts tokenised at a time
_POSTING = np.dtype([("token", np.int32), ("row", np.int32), ("count", np.int32)])


class Bm25:
  """A BM25 index in a directory, memory-mapped.

  Attributes:
    directory: of the index.
    count: number of passages C.
  """

  def __init__(self, directory: Path):
    """Opens what `build` wrote.

    Raises:
      InputError: there is no index, or a file is missing, cut or of another shape.
    """
    self.directory = pathlib.Path(directory)
    path = self.directory / "manifest.json"
    manifest = read_json(path)
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("kind")) != (_FORMAT, _KIND):
      raise InputError("not a BM25 index of this version", path=path, fix=_AGAIN)
    self.count, self._shard_rows = manifest.get("count"), manifest.get("shard_rows")
    if not all(type(number) is int and number > 0 for number in (self.count, self._shard_rows)):
      raise InputError("count and shard_rows must be numbers from 1", path=path, fix=_AGAIN)
    tokens = read_json(self.directory / "vocabulary.json")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
      raise InputError("not a list of tokens", path=self.directory / "vocabulary.json", fix=_AGAIN)
    self._vocabulary = {token: i for i, token in enumerate(tokens)}
    self._shards = [self._open(number) for number in range(-(-self.count // self._shard_rows))]

  @classmethod
  def build(cls, texts: Iterable[str], directory: Path, *, shard_rows: int = 500_000) -> Bm25:
    """Builds an index; its manifest is written last.

    Args:
      texts: one text a passage (title and text joined by a space is the rule), read once.
      directory: of the index; one that is there is replaced.
      shard_rows: passages a shard. Peak memory is about 1.2 kB a passage of a shard (60 tokens each) and the
        vocabulary; a search holds shard_rows scores.

    Raises:
      InputError: there is no passage.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "manifest.json").unlink(missing_ok=True)
    vocabulary, frequencies, lengths = _count(texts, directory, shard_rows)
    if not lengths:
      raise InputError("no passage to index", path=directory)
    write_json(directory / "vocabulary.json", list(vocabulary))
    lengths = np.frombuffer(lengths, np.int32)
    idf = np.log1p((len(lengths) - frequencies + 0.5) / (frequencies + 0.5))
    norms = _K1 * (1 - _B + _B * lengths / max(lengths.mean(), 1e-9))
    for shard, start in enumerate(progress.track(range(0, len(lengths), shard_rows), "BM25 index", unit="shard")):
      _write_shard(directory, shard, idf, norms[start : start + shard_rows])
      preemption.check("the BM25 index will be built again")
    write_json(
      directory / "manifest.json",
      {"format": _FORMAT, "kind": _KIND, "count": len(lengths), "shard_rows": shard_rows, "k1": _K1, "b": _B,
       "mean_length": float(lengths.mean()), "stemmer": "english", "stop_words": "english"},
    )  # fmt: skip
    return cls(directory)

  def search(self, texts: Sequence[str], k: int) -> Run:
    """Finds the k best passages for each query among those that share a token with it.

    Equal scores are ordered by ascending row, also across rank k.

    Returns:
      A run [Q, k]: −1 fills where fewer than k passages score above 0, or k is beyond the corpus.
    """
    queries = [self._token_ids(tokens) for tokens in _tokenize(texts)]
    run = Run.empty(len(queries), k)
    with progress.bar("BM25 search", len(queries) * len(self._shards), "query") as shown:
      for number, shard in enumerate(self._shards):
        for query, token_ids in enumerate(queries):
          if len(token_ids):
            scores = shard.get_scores_from_ids(token_ids)
            _merge(run.rows[query], run.scores[query], scores, number * self._shard_rows)
          shown.advance()
          preemption.check("the search by BM25 will begin again")
    return run

  def _token_ids(self, tokens: Iterable[str]) -> np.ndarray:
    return np.array([self._vocabulary[token] for token in tokens if token in self._vocabulary], np.int32)

  def _open(self, number: int) -> bm25s.BM25:
    import bm25s

    dtypes = {"data": np.float32, "indices": np.int32, "indptr": np.int64}
    paths = {name: self.directory / f"{name}-{number:05d}.npy" for name in dtypes}
    scores = {name: shards.mapped(path) for name, path in paths.items()}
    if scores["indptr"].shape != (len(self._vocabulary) + 1,):
      raise InputError("not as long as the vocabulary", path=paths["indptr"], fix=_AGAIN)
    for name, part in scores.items():
      if part.dtype != dtypes[name] or part.ndim != 1 or (name != "indptr" and len(part) != scores["indptr"][-1]):
        raise InputError(f"array is {part.dtype} {part.shape}", path=paths[name], fix=_AGAIN)
    shard = bm25s.BM25(method="lucene")
    shard.scores = {**scores, "num_docs": min(self._shard_rows, self.count - number * self._shard_rows)}
    shard.nonoccurrence_array = None  # of other BM25 variants: the score of an absent token
    return shard


def _tokenize(texts: Sequence[str]) -> list[list[str]]:
  import bm25s

  return bm25s.tokenize(
    list(texts), stopwords="english", stemmer=Stemmer.Stemmer("english"), return_ids=False, show_progress=False
  )


def _count(
  texts: Iterable[str], directory: pathlib.Path, shard_rows: int
) -> tuple[dict[str, int], np.ndarray, array.array]:
  """Reads the corpus once: vocabulary, document frequencies [V], lengths [C]; writes a file of postings a shard."""
  vocabulary: dict[str, int] = {}
  frequencies = np.zeros(0, np.int64)
  lengths = array.array("i")
  texts = iter(progress.track(texts, "BM25 tokens", unit="passage"))
  for shard in itertools.count():
    with open(directory / f"postings-{shard:05d}", "wb") as stream:
      rows = 0
      while rows < shard_rows and (chunk := list(itertools.islice(texts, min(_CHUNK, shard_rows - rows)))):
        frequencies = _count_chunk(chunk, rows, vocabulary, frequencies, lengths, stream)
        rows += len(chunk)
        preemption.check("the BM25 index will be built again")
    if not rows:
      os.remove(stream.name)
    if rows < shard_rows:
      return vocabulary, frequencies, lengths


def _count_chunk(
  chunk: list[str], first_row: int, vocabulary: dict[str, int], frequencies: np.ndarray, lengths: array.array,
  stream: BinaryIO,
) -> np.ndarray:  # fmt: skip
  tokenized = _tokenize(chunk)
  counts = np.array([len(tokens) for tokens in tokenized], np.int32)
  lengths.frombytes(counts.tobytes())
  # Numbered by first appearance, so that the same corpus gives the same files.
  ids = np.array([vocabulary.setdefault(token, len(vocabulary)) for tokens in tokenized for token in tokens], np.int64)
  rows = np.repeat(np.arange(first_row, first_row + len(chunk)), counts)
  pairs, repeats = np.unique(rows * len(vocabulary) + ids, return_counts=True)
  postings = np.empty(len(pairs), _POSTING)
  if len(pairs):
    postings["row"], postings["token"] = np.divmod(pairs, len(vocabulary))
  postings["count"] = repeats
  stream.write(postings.tobytes())
  grown = np.bincount(postings["token"], minlength=len(vocabulary))
  grown[: len(frequencies)] += frequencies
  return grown


def _write_shard(directory: pathlib.Path, number: int, idf: np.ndarray, norms: np.ndarray) -> None:
  source = directory / f"postings-{number:05d}"
  postings = np.fromfile(source, _POSTING)
  postings = postings[np.argsort(postings["token"], kind="stable")]  # rows stay ascending within a token
  counts = postings["count"].astype(np.float64)
  scores = idf[postings["token"]] * counts / (counts + norms[postings["row"]])
  starts = np.searchsorted(postings["token"], np.arange(len(idf) + 1))
  np.save(directory / f"data-{number:05d}.npy", scores.astype(np.float32))
  np.save(directory / f"indices-{number:05d}.npy", np.ascontiguousarray(postings["row"]))
  np.save(directory / f"indptr-{number:05d}.npy", starts.astype(np.int64))
  source.unlink()


def _merge(rows: np.ndarray, best: np.ndarray, scores: np.ndarray, first_row: int) -> None:
  """Merges a shard's scores [n] into the best of earlier shards, in place; rows and best are [k]."""
  k = len(rows)
  # A later row never displaces an equal score, so only what beats the k-th so far can enter.
  better = np.flatnonzero(scores > max(0.0, best[-1]))
  if len(better) > k:
    threshold = np.partition(scores[better], -k)[-k]
    above, ties = better[scores[better] > threshold], better[scores[better] == threshold]
    better = np.concatenate([above, ties[: k - len(above)]])
  all_rows = np.concatenate([rows, (better + first_row).astype(np.int32)])
  all_scores = np.concatenate([best, scores[better]])
  # fills are −inf and come last whatever their row
  order = np.lexsort((all_rows, -all_scores))[:k]
  rows[:], best[:] = all_rows[order], all_scores[order]
