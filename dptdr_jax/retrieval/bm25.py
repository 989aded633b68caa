"""BM25 as Lucene scores it, over bm25s, built and searched in bounded memory.

score(q, d) = Σ_t ln(1 + (C − df_t + ½) / (df_t + ½)) · tf / (tf + k1 · (1 − b + b · |d| / mean |d|)), over q's tokens t
with repetition (Kamphuis et al., ECIR 2020, "Lucene (accurate)"). bm25s cuts texts into stemmed tokens and adds up a
query's postings; its own index builder holds a corpus as Python lists, so the postings are made here, in shards of
passages that share the whole corpus' document frequencies and mean length: the ranking is that of one index.
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

from dptdr_jax.core import preemption, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path, atomic_directory, read_json, write_json
from dptdr_jax.retrieval.runs import Run

if TYPE_CHECKING:  # it computes on a jax device as it is imported: not before the processes of a run have met
  import bm25s

_FORMAT = 1
_CHUNK = 10_000  # texts cut at a time
_POSTING = np.dtype([("token", np.int32), ("row", np.int32), ("count", np.int32)])


class Bm25:
  """A BM25 index in a directory, memory-mapped.

  Attributes:
    directory: where it lies.
    count: number of passages C.
  """

  def __init__(self, directory: Path):
    """Opens what `build` made.

    Raises:
      InputError: no index, or one that is not whole.
    """
    self.directory = pathlib.Path(directory)
    manifest = read_json(self.directory / "manifest.json")
    if manifest.get("format") != _FORMAT or manifest.get("kind") != "bm25":
      raise InputError("not a BM25 index of this version", path=self.directory, fix="Build it again.")
    self.count: int = manifest["count"]
    self._shard_rows: int = manifest["shard_rows"]
    self._vocabulary = {token: i for i, token in enumerate(read_json(self.directory / "vocabulary.json"))}
    self._shards = [self._open(number) for number in range(-(-self.count // self._shard_rows))]

  @classmethod
  def build(
    cls, texts: Iterable[str], directory: Path, *, k1: float = 0.9, b: float = 0.4, shard_rows: int = 500_000
  ) -> Bm25:
    """Builds an index atomically: the directory holds a whole one, or what it held before.

    Args:
      texts: one text a passage (title and text joined by a space is the rule), read once.
      directory: replaced if it exists.
      k1, b: of the formula; Anserini's defaults for passages.
      shard_rows: passages a shard. Peak memory is about 1.2 kB a passage of a shard (60 tokens each) and the
        vocabulary; a search holds shard_rows scores.
    """
    with atomic_directory(directory) as partial:
      vocabulary, frequencies, lengths = _count(texts, partial, shard_rows)
      if not lengths:
        raise InputError("no passage to index", path=directory)
      write_json(partial / "vocabulary.json", list(vocabulary))
      lengths = np.frombuffer(lengths, np.int32)
      idf = np.log1p((len(lengths) - frequencies + 0.5) / (frequencies + 0.5))
      norms = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
      for shard, start in enumerate(progress.track(range(0, len(lengths), shard_rows), "BM25 index", unit="shard")):
        _write_shard(partial, shard, idf, norms[start : start + shard_rows])
        preemption.check("the BM25 index will be built again")
      write_json(
        partial / "manifest.json",
        {"format": _FORMAT, "kind": "bm25", "count": len(lengths), "shard_rows": shard_rows, "k1": k1, "b": b,
         "mean_length": float(lengths.mean()), "stemmer": "english", "stop_words": "english"},
      )  # fmt: skip
    return cls(directory)

  def search(self, texts: Sequence[str], k: int) -> Run:
    """Finds the k best passages for each query; passages that share no token with it are not found.

    Equal scores stand by ascending row, also where they straddle rank k.

    Returns:
      A run [Q, k]: −1 fills where fewer than k passages score above 0, or k is beyond the corpus.
    """
    if k < 1:
      raise ValueError(f"k = {k} is not a depth")
    queries = [self._token_ids(found) for found in _tokenize(texts)]
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

  def _token_ids(self, found: Iterable[str]) -> np.ndarray:
    return np.array([self._vocabulary[token] for token in found if token in self._vocabulary], np.int32)

  def _open(self, number: int) -> bm25s.BM25:
    import bm25s

    shard = bm25s.BM25(method="lucene")
    paths = {part: self.directory / f"{part}-{number:05d}.npy" for part in ("data", "indices", "indptr")}
    try:
      shard.scores = {part: np.load(path, mmap_mode="r") for part, path in paths.items()}
    except (OSError, ValueError) as error:
      raise InputError(f"BM25 shard is not whole ({error})", path=self.directory, fix="Build it again.") from error
    rows = min(self._shard_rows, self.count - number * self._shard_rows)
    shard.scores["num_docs"] = rows
    shard.nonoccurrence_array = None  # of other BM25 variants: the score that an absent token gives
    return shard


def _tokenize(texts: Sequence[str]) -> list[list[str]]:
  import bm25s

  return bm25s.tokenize(
    list(texts), stopwords="english", stemmer=Stemmer.Stemmer("english"), return_ids=False, show_progress=False
  )


def _count(
  texts: Iterable[str], directory: pathlib.Path, shard_rows: int
) -> tuple[dict[str, int], np.ndarray, array.array]:
  """Reads the corpus once: vocabulary, document frequencies [V], lengths [C]; postings go to a file a shard."""
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
  found = _tokenize(chunk)
  counts = np.array([len(tokens) for tokens in found], np.int32)
  lengths.frombytes(counts.tobytes())
  # Tokens are numbered as they first appear, so that the same corpus gives the same files.
  ids = np.array([vocabulary.setdefault(token, len(vocabulary)) for tokens in found for token in tokens], np.int64)
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
  """Puts the best of a shard's scores [n] among those of earlier shards, in place; rows and best are [k]."""
  k = len(rows)
  # A later row never displaces an equal score, so only what beats the k-th so far can enter.
  found = np.flatnonzero(scores > max(0.0, best[-1]))
  if len(found) > k:
    threshold = np.partition(scores[found], -k)[-k]
    above, ties = found[scores[found] > threshold], found[scores[found] == threshold]
    found = np.concatenate([above, ties[: k - len(above)]])
  all_rows = np.concatenate([rows, (found + first_row).astype(np.int32)])
  all_scores = np.concatenate([best, scores[found]])
  # fills are −inf and come last whatever their row
  order = np.lexsort((all_rows, -all_scores))[:k]
  rows[:], best[:] = all_rows[order], all_scores[order]
