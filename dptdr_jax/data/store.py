"""The token store: every text tokenised once, memory-mapped, read back as padded batches without a loop over rows.

A store is a directory: tokens.bin (uint16, or uint32 from 65,536 ids on; no special tokens), offsets.npy
(int64 [n + 1]), store.json, and optionally words.bin (uint8, 1 where the tokenizer starts a word). While it grows,
lengths.bin replaces offsets.npy, and progress.json says how much of the files is whole: a killed run resumes there.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import tokenizers

from dptdr_jax.core import files, preemption, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.data import ragged
from dptdr_jax.data.tokenizer import Tokenizer

_BUCKET = 16
_BATCH = 4096  # texts a call of the tokenizer: enough to keep its threads busy, 20 MB of encodings
_COUNTED = 1 << 24  # tokens counted at a time
_NOTED = 1 << 16  # texts between two states of progress.json


class TokenStore(ragged.Ragged):
  """Reads a store: `len(store)`, `store[row]` → ids as stored, `store.batch(rows, …)` → wrapped and padded.

  `lengths`, `lengths_at`, `heads` and `take` (see Ragged) do not count special tokens.

  Attributes:
    path: its directory.
    tokenizer_hash, max_tokens: what it was written with.
    pad_id: fills up batches.
    num_special, num_before: special tokens around a text, and those before it.

  Raises:
    InputError: a file is missing or cut, or they do not belong together.
  """

  def __init__(self, path: str | pathlib.Path):
    self.path = path = pathlib.Path(path)
    about, offsets = files.read_json(path / "store.json"), ragged.open_offsets(path)
    with files.fields_of(path / "store.json"):
      self.tokenizer_hash, self.max_tokens, self.pad_id = about["tokenizer_hash"], about["max_tokens"], about["pad_id"]
      self._prefix, self._suffix = np.array(about["prefix"], np.int32), np.array(about["suffix"], np.int32)
      dtype, words = np.dtype(about["dtype"]), about["words"]
    super().__init__(_open_raw(path / "tokens.bin", dtype, int(offsets[-1])), offsets)
    self._words = None
    if words:
      self._words = ragged.Ragged(_open_raw(path / "words.bin", np.dtype(np.uint8), len(self.flat)), offsets)
    self.num_special, self.num_before = len(self._prefix) + len(self._suffix), len(self._prefix)

  def lengths_of(self, rows: np.ndarray, max_tokens: int) -> np.ndarray:
    """Returns int64 [n]: tokens of `rows` when cut and wrapped, special tokens included."""
    content = np.minimum(self.lengths_at(rows), self._room(max_tokens))
    return content + self.num_special

  def width(self, rows: np.ndarray, max_tokens: int) -> int:
    """Returns the bucket, see `bucketed`, that all of `rows` fit into."""
    return bucketed(self.lengths_of(rows, max_tokens).max(initial=1), max_tokens)

  def batch(self, rows: np.ndarray, max_tokens: int, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Gathers rows, cuts them on the right, wraps them in special tokens and pads them on the right.

    Args:
      rows: int [n].
      max_tokens: limit of a row, special tokens included.
      width: T, if several hosts must agree on it: from `width` over all of their rows.

    Returns:
      tokens int32 [n, T] and lengths int32 [n], special tokens included.
    """
    rows = np.asarray(rows, np.int64)
    if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
      raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
    content = self.lengths_of(rows, max_tokens) - self.num_special
    return self._wrapped(self.heads(rows, content), content, width or self.width(rows, max_tokens))

  def words(self, rows: np.ndarray) -> np.ndarray:
    """Returns bool, one row's tokens after the other's: where the tokenizer starts a word."""
    if self._words is None:
      raise InputError("the store does not say where words start", path=self.path, fix="Write it with words=True")
    return self._words.take(rows) > 0

  def spans(
    self, rows: np.ndarray, starts: np.ndarray, counts: np.ndarray, width: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Gathers parts of rows, tokens starts … starts + counts − 1 of each, wrapped and padded as `batch` does.

    Args:
      rows, starts, counts: int64 [n], within the rows.
      width: T.
    """
    return self._wrapped(ragged.gather(self.flat, self.offsets[rows] + starts, counts), counts, width)

  def _wrapped(self, flat: np.ndarray, content: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [n, width] and lengths int32 [n] of texts that lie one after the other in `flat`."""
    before, after = len(self._prefix), len(self._suffix)
    tokens = np.full((len(content), width), self.pad_id, np.int32)
    tokens[:, :before] = self._prefix
    within = np.arange(width) - before < content[:, None]
    within[:, :before] = False
    tokens[within] = flat
    tokens[np.arange(len(content))[:, None], (content + before)[:, None] + np.arange(after)] = self._suffix
    return tokens, (content + before + after).astype(np.int32)

  def token_counts(self) -> np.ndarray:
    """Returns int64 [largest id + 1]: how often each token id occurs in the store."""
    counts = np.zeros(0, np.int64)
    for start in range(0, len(self.flat), _COUNTED):
      more = np.bincount(self.flat[start : start + _COUNTED], minlength=len(counts))
      more[: len(counts)] += counts
      counts = more
    return counts

  def _room(self, max_tokens: int) -> int:
    room = max_tokens - self.num_special
    if room < 1:
      raise InputError(f"{max_tokens} tokens leave no room for a text", fix="Raise the length limit")
    if room > self.max_tokens:
      what = f"texts were cut to {self.max_tokens} tokens, {room} are needed"
      raise InputError(what, path=self.path, fix="Raise data.max_stored_tokens")
    return room


def bucketed(longest: int, limit: int) -> int:
  """Returns the width of a batch: a multiple of 16, so that there are few shapes, or the limit."""
  return min(-(-int(longest) // _BUCKET) * _BUCKET, limit)


def write_token_store(
  texts: Callable[[int], Iterator[str]],
  count: int,
  tokenizer: Tokenizer,
  path: str | pathlib.Path,
  *,
  max_tokens: int,
  words: bool = False,
) -> TokenStore:
  """Tokenises `count` texts in the tokenizer's own threads, in bounded memory; resumes what a killed run has begun.

  Args:
    texts: texts(row) yields the texts from that row on.
    path: directory of the store. If it has files, they are from a run with the same arguments.
    max_tokens: texts are cut to so many tokens, special tokens not counted.
    words: also store where words start, as the tokenizer's own encodings say; takes a fifth longer.
  """
  path = pathlib.Path(path)
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size < 65536 else np.uint32)
  if not (path / "store.json").is_file():
    _grow(texts, count, tokenizer.backend, path, dtype, max_tokens, words)
    lengths = np.fromfile(path / "lengths.bin", np.int32)
    with files.atomic_path(path / "offsets.npy") as partial, open(partial, "wb") as stream:
      np.save(stream, ragged.offsets_of(lengths))
    about = {
      "tokenizer_hash": tokenizer.hash, "max_tokens": max_tokens, "count": count, "prefix": list(tokenizer.prefix),
      "suffix": list(tokenizer.suffix), "pad_id": tokenizer.pad_id, "dtype": dtype.name, "words": words,
    }  # fmt: skip
    files.write_json(path / "store.json", about)
  for name in ("lengths.bin", "progress.json"):
    files.remove(path / name)
  return TokenStore(path)


def _grow(
  texts: Callable[[int], Iterator[str]],
  count: int,
  backend: tokenizers.Tokenizer,
  path: pathlib.Path,
  dtype: np.dtype,
  max_tokens: int,
  words: bool,
) -> None:
  """Appends to tokens.bin, lengths.bin and words.bin until they have `count` texts."""
  names = ("tokens.bin", "lengths.bin", *(["words.bin"] if words else []))
  rows = _resume(path, names, dtype)
  with contextlib.ExitStack() as stack:
    streams = [stack.enter_context(open(path / name, "ab")) for name in names]
    with progress.bar("tokenise", count, "text", initial=rows) as bar:
      cutting = tokenizers.Tokenizer.from_str(backend.to_str())
      cutting.enable_truncation(max_length=max_tokens)
      for parts in _encoded(itertools.islice(texts(rows), count - rows), cutting, dtype, words):
        for stream, part in zip(streams, parts, strict=True):
          stream.write(part.data)
        rows += len(parts[1])
        bar.advance(len(parts[1]))
        if rows % _NOTED == 0:
          _note(path, rows, streams)
        preemption.check(f"{rows} of {count} texts are tokenised")
    if rows != count:
      raise InputError(f"{count} texts expected, {rows} read", path=path)
    _note(path, rows, streams)


def _encoded(
  texts: Iterator[str], backend: tokenizers.Tokenizer, dtype: np.dtype, words: bool
) -> Iterator[tuple[np.ndarray, ...]]:
  """Yields (tokens, lengths int32) of _BATCH texts, with `words` also where words start (uint8).

  The next batch is tokenised in a thread meanwhile.
  """
  encode = backend.encode_batch if words else backend.encode_batch_fast  # the fast one has no word ids
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
  """uint8, 1 for a token that starts a word; a token that the tokenizer gives no word is a word of its own."""
  flat = itertools.chain.from_iterable(encoding.word_ids for encoding in encodings)
  numbers = np.fromiter((-1 if word is None else word for word in flat), np.int64, int(lengths.sum()))
  starts = np.ones(len(numbers), np.uint8)
  starts[1:] = (numbers[1:] != numbers[:-1]) | (numbers[1:] < 0)
  starts[ragged.offsets_of(lengths)[:-1][lengths > 0]] = 1
  return starts


def _resume(path: pathlib.Path, names: Sequence[str], dtype: np.dtype) -> int:
  """Cuts the files to what progress.json says is whole and returns its number of rows; 0 if less is there."""
  path.mkdir(parents=True, exist_ok=True)
  rows = size = 0
  with contextlib.suppress(InputError, KeyError, TypeError, ValueError):
    state = files.read_json(path / "progress.json")
    rows, size = int(state["rows"]), int(state["tokens_bytes"])
  for name in names:
    (path / name).touch()
  sizes = (size, 4 * rows, size // dtype.itemsize)[: len(names)]
  if any((path / name).stat().st_size < wanted for name, wanted in zip(names, sizes, strict=True)):
    rows, sizes = 0, (0,) * len(names)
  for name, wanted in zip(names, sizes, strict=True):
    os.truncate(path / name, wanted)
  return rows


def _note(path: pathlib.Path, rows: int, streams: Sequence[BinaryIO]) -> None:
  for stream in streams:
    stream.flush()
    os.fsync(stream.fileno())
  files.write_json(path / "progress.json", {"rows": rows, "tokens_bytes": streams[0].tell()})


def _open_raw(path: pathlib.Path, dtype: np.dtype, size: int) -> np.ndarray:
  if not path.is_file() or path.stat().st_size != size * dtype.itemsize:
    raise InputError(f"{size} tokens expected: the file is shorter, longer or missing", path=path)
  return np.asarray(np.memmap(path, dtype, "r", shape=(size,))) if size else np.empty(0, dtype)
