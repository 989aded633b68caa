"""The token store: every text tokenised once, memory-mapped, read back as padded batches without a loop over rows.

A store is a directory: tokens.bin (uint16, or uint32 from 65,536 ids on; no special tokens), offsets.npy
(int64 [n + 1]) and store.json, which is written last; where it was asked for also words.bin (uint8, 1 where the
tokenizer starts a word). While it grows it stands beside its place as NAME.growing with lengths.bin and progress.json,
which says how much of these files is whole: a killed run goes on from there.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import tokenizers

from dptdr_jax.core import files, preemption, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.data import ragged
from dptdr_jax.data.tokenizer import Tokenizer

_BATCH = 4096  # texts a call of the tokenizer: enough to keep its threads busy, 20 MB of encodings
_COUNTED = 1 << 24  # tokens looked at a time when counting
_SHARD = 1 << 16  # texts between two notes of progress


class TokenStore:
  """Reads a store: `len(store)`, `store[row]` → ids, `store.batch(rows, …)` → wrapped and padded.

  Attributes:
    tokenizer_hash, max_tokens, key: what it was written with.
    lengths: int64 [n], tokens of each row without special tokens.
    num_special, num_before: special tokens around a text, and those before it.
  """

  def __init__(self, path: str | pathlib.Path):
    path = pathlib.Path(path)
    about = files.read_json(path / "store.json")
    self.path, self.tokenizer_hash, self.key = path, about["tokenizer_hash"], about["key"]
    self.max_tokens, self.pad_id = about["max_tokens"], about["pad_id"]
    self._prefix, self._suffix = np.array(about["prefix"], np.int32), np.array(about["suffix"], np.int32)
    self._offsets = ragged.mapped(path / "offsets.npy")
    self._tokens = _tokens(path / "tokens.bin", np.dtype(about["dtype"]), int(self._offsets[-1]))
    self._words = _tokens(path / "words.bin", np.dtype(np.uint8), len(self._tokens)) if "words" in about else None
    self.num_special, self.num_before = len(self._prefix) + len(self._suffix), len(self._prefix)

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def __getitem__(self, row: int) -> np.ndarray:
    """Returns int32 [length], without special tokens."""
    return self._tokens[self._offsets[row] : self._offsets[row + 1]].astype(np.int32)

  @property
  def lengths(self) -> np.ndarray:
    return np.diff(self._offsets)

  def lengths_at(self, rows: np.ndarray) -> np.ndarray:
    """Returns int64 [n]: tokens of `rows` without special tokens."""
    return self._offsets[rows + 1] - self._offsets[rows]

  def lengths_of(self, rows: np.ndarray, max_tokens: int) -> np.ndarray:
    """Returns int64 [n]: tokens of `rows` once cut and wrapped, special tokens included."""
    content = np.minimum(self.lengths_at(rows), self._room(max_tokens))
    return content + self.num_special

  def width(self, rows: np.ndarray, max_tokens: int, bucket: int = 16) -> int:
    """Returns the smallest multiple of `bucket`, at most `max_tokens`, that all of `rows` fit into."""
    longest = int(self.lengths_of(rows, max_tokens).max(initial=1))
    return min(-(-longest // bucket) * bucket, max_tokens)

  def batch(
    self, rows: np.ndarray, max_tokens: int, bucket: int = 16, width: int | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Gathers rows, cuts them on the right, wraps them in special tokens and pads them on the right.

    Args:
      rows: int [n].
      max_tokens: limit of a row, special tokens included.
      bucket: T is a multiple of it, or `max_tokens`.
      width: T itself, where several hosts must agree on it; from `width` over all of their rows.

    Returns:
      tokens int32 [n, T] and lengths int32 [n], special tokens included.
    """
    rows = np.asarray(rows, np.int64)
    if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
      raise IndexError(f"a row out of 0…{len(self) - 1}: {rows.min()}…{rows.max()}")
    width = width or self.width(rows, max_tokens, bucket)
    content = self.lengths_of(rows, max_tokens) - self.num_special
    return self._wrapped(ragged.gather(self._tokens, self._offsets[rows], content), content, width)

  def heads(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns int32, the first `counts` tokens (int64 [n]) of each of `rows`, one row's behind the other's."""
    return ragged.gather(self._tokens, self._offsets[rows], counts).astype(np.int32)

  def words(self, rows: np.ndarray) -> np.ndarray:
    """Returns bool, one row's tokens behind the other's: where the tokenizer starts a word."""
    if self._words is None:
      raise InputError("the store does not say where words start", path=self.path, fix="Write it with words=True")
    return ragged.gather(self._words, self._offsets[rows], self.lengths_at(rows)) > 0

  def spans(
    self, rows: np.ndarray, starts: np.ndarray, counts: np.ndarray, width: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Gathers parts of rows, tokens starts … starts + counts − 1 of each, wrapped and padded as `batch` does.

    Args:
      rows, starts, counts: int64 [n], within the rows.
      width: T.
    """
    return self._wrapped(ragged.gather(self._tokens, self._offsets[rows] + starts, counts), counts, width)

  def _wrapped(self, flat: np.ndarray, content: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [n, width] and lengths int32 [n] of texts that lie one behind the other in `flat`."""
    before, after = len(self._prefix), len(self._suffix)
    tokens = np.full((len(content), width), self.pad_id, np.int32)
    tokens[:, :before] = self._prefix
    within = np.arange(width) - before < content[:, None]
    within[:, :before] = False
    tokens[within] = flat
    tokens[np.arange(len(content))[:, None], (content + before)[:, None] + np.arange(after)] = self._suffix
    return tokens, (content + before + after).astype(np.int32)

  def token_counts(self) -> np.ndarray:
    """Returns int64 [largest id + 1]: how often each token id stands in the store."""
    counts = np.zeros(0, np.int64)
    for start in range(0, len(self._tokens), _COUNTED):
      found = np.bincount(self._tokens[start : start + _COUNTED], minlength=len(counts))
      found[: len(counts)] += counts
      counts = found
    return counts

  def _room(self, max_tokens: int) -> int:
    room = max_tokens - self.num_special
    if room < 1:
      raise InputError(f"{max_tokens} tokens leave no room for a text", fix="Raise the length limit")
    if room > self.max_tokens:
      what = f"rows were cut to {self.max_tokens} tokens, {room} are asked for"
      raise InputError(what, path=self.path, fix="Write the store again with the higher limit")
    return room


def write_token_store(
  texts: Callable[[int], Iterator[str]],
  count: int,
  tokenizer: Tokenizer,
  path: str | pathlib.Path,
  *,
  max_tokens: int,
  key: str = "",
  words: bool = False,
) -> TokenStore:
  """Tokenises `count` texts in the tokenizer's own threads, in bounded memory; goes on where a killed run stopped.

  Args:
    texts: texts(row) yields the texts from that row on.
    count: the number of texts.
    tokenizer: with it the store is tied to the tokenizer's hash.
    path: directory of the store.
    max_tokens: texts are cut to so many tokens, special tokens not counted.
    key: what else the texts depend on (a hash over inputs and templates); another key starts over.
    words: also store where words start, as the tokenizer's own encodings say; takes it about a fifth longer.
  """
  path = pathlib.Path(path)
  about = {
    "tokenizer_hash": tokenizer.hash, "max_tokens": max_tokens, "key": key, "count": count,
    "prefix": list(tokenizer.prefix), "suffix": list(tokenizer.suffix), "pad_id": tokenizer.pad_id,
    "dtype": "uint16" if tokenizer.vocab_size < 65536 else "uint32",
  }  # fmt: skip
  about |= {"words": True} if words else {}
  if (path / "store.json").is_file() and files.read_json(path / "store.json") == about:
    return TokenStore(path)
  growing = path.with_name(f"{path.name}.growing")
  rows = _resume(growing, about)
  with contextlib.ExitStack() as stack:
    streams = [stack.enter_context(open(growing / name, "ab")) for name in _files(about)]
    with progress.bar("tokenise", count, "text", initial=rows) as bar:
      backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
      backend.enable_truncation(max_length=max_tokens)
      for parts in _encoded(itertools.islice(texts(rows), count - rows), backend, np.dtype(about["dtype"]), words):
        for stream, part in zip(streams, parts, strict=True):
          stream.write(part.data)
        rows += len(parts[1])
        bar.advance(len(parts[1]))
        if rows % _SHARD == 0:
          _note(growing, about, rows, streams)
        preemption.check(f"{rows} of {count} texts are tokenised")
    if rows != count:
      raise InputError(f"{rows} texts came where {count} were expected", path=path)
    _note(growing, about, rows, streams)
  _finish(growing, path, about)
  return TokenStore(path)


def _files(about: dict[str, Any]) -> tuple[str, ...]:
  return ("tokens.bin", "lengths.bin", *(["words.bin"] if "words" in about else []))


def _encoded(
  texts: Iterator[str], backend: tokenizers.Tokenizer, dtype: np.dtype, words: bool
) -> Iterator[tuple[np.ndarray, ...]]:
  """Yields (tokens, lengths int32) of _BATCH texts, and where words start (uint8) if that is asked for.

  The next batch is being tokenised while this one is taken apart.
  """
  encode = backend.encode_batch if words else backend.encode_batch_fast  # the fast one knows no words
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    waiting: concurrent.futures.Future[Any] | None = None
    while True:
      batch = list(itertools.islice(texts, _BATCH))
      following = pool.submit(encode, batch, add_special_tokens=False) if batch else None
      if waiting is not None:
        encodings = waiting.result()
        ids = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype, int(lengths.sum()))
        yield (tokens, lengths, _word_starts(encodings, lengths)) if words else (tokens, lengths)
      if following is None:
        return
      waiting = following


def _word_starts(encodings: list[tokenizers.Encoding], lengths: np.ndarray) -> np.ndarray:
  """uint8, 1 for a token whose word is not that of the token before it; a token of no word is one by itself."""
  flat = itertools.chain.from_iterable(encoding.word_ids for encoding in encodings)
  numbers = np.fromiter((-1 if word is None else word for word in flat), np.int64, int(lengths.sum()))
  starts = np.ones(len(numbers), np.uint8)
  starts[1:] = (numbers[1:] != numbers[:-1]) | (numbers[1:] < 0)
  starts[ragged.offsets_of(lengths)[:-1][lengths > 0]] = 1
  return starts


def _resume(growing: pathlib.Path, about: dict[str, Any]) -> int:
  """Cuts the files in `growing` to what is surely whole and returns its rows; starts over when `about` differs."""
  noted = growing / "progress.json"
  state = files.read_json(noted) if noted.is_file() else {}
  if state.get("about") != about:
    files.remove(growing)
    growing.mkdir(parents=True)
    state = {"about": about, "rows": 0, "tokens_bytes": 0}
  tokens = state["tokens_bytes"] // np.dtype(about["dtype"]).itemsize
  sizes = dict(zip(_files(about), (state["tokens_bytes"], 4 * state["rows"], tokens), strict=False))
  if state["rows"] and any(not (growing / name).is_file() or (growing / name).stat().st_size < size
                           for name, size in sizes.items()):  # fmt: skip
    files.remove(growing)  # less is there than was noted: nothing of it can be trusted
    return _resume(growing, about)
  for name, size in sizes.items():
    with open(growing / name, "ab") as stream:
      stream.truncate(size)
  return state["rows"]


def _note(growing: pathlib.Path, about: dict[str, Any], rows: int, streams: list[BinaryIO]) -> None:
  for stream in streams:
    stream.flush()
    os.fsync(stream.fileno())
  files.write_json(growing / "progress.json", {"about": about, "rows": rows, "tokens_bytes": streams[0].tell()})


def _finish(growing: pathlib.Path, path: pathlib.Path, about: dict[str, Any]) -> None:
  offsets = ragged.offsets_of(np.fromfile(growing / "lengths.bin", np.int32))
  with files.atomic_path(growing / "offsets.npy") as partial, open(partial, "wb") as stream:
    np.save(stream, offsets)
  files.write_json(growing / "store.json", about)
  files.remove(path)
  files.rename(growing, path)
  for name in ("lengths.bin", "progress.json"):
    files.remove(path / name)


def _tokens(path: pathlib.Path, dtype: np.dtype, size: int) -> np.ndarray:
  if not path.is_file() or path.stat().st_size != size * dtype.itemsize:
    raise InputError(f"{size} tokens expected, the file is shorter, longer or gone", path=path, fix="Remove the store")
  return np.asarray(np.memmap(path, dtype, "r", shape=(size,))) if size else np.empty(0, dtype)
