"""Training files of the original DPTDR code: JSONL lines of a query, its positives and its negatives.

{"query": …, "positives": [passage, …], "negatives": [passage, …]}, where a text is a string or a list of token
ids without special tokens; a passage may also be {"title": …, "text": …}.
"""

from __future__ import annotations

import hashlib
import logging
import pathlib
from collections.abc import Iterator
from typing import Any, Protocol

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.formats import Format, Kind, Located, in_order
from dptdr_jax.data.formats.lines import id_of, read_json_lines, text_of, title_of
from dptdr_jax.data.records import Judgement, Negatives, Passage, Query

_log = logging.getLogger(__name__)

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


class TextCodec(Protocol):
  """Turns token ids into text and back, as data.tokenizer.Tokenizer does."""

  def decode(self, ids: list[int]) -> str: ...

  def encode(self, texts: list[str]) -> list[list[int]]: ...

  @property
  def vocab_size(self) -> int: ...


class OriginalJsonl(Format):
  """Reads SPLIT.jsonl (or .json) files, or SPLIT/ directories of them, each plain or gzipped.

  Passages have no ids in these files: the corpus is every distinct positive and negative of all splits in order of
  appearance, and a passage's id is a hash of its text. A query's id is `FILE-LINE`, or `DIRECTORY/FILE-LINE`.

  Token ids are decoded to text, so that BM25, reports and other tokenizers can read them. An id that the tokenizer
  lacks is an InputError.

  Attributes:
    changed: how many passages of token ids become other ids when they are encoded again; logged.

  Args:
    directory: holds the files.
    tokenizer: decodes token ids; None if the files are text.
  """

  def __init__(self, directory: str | pathlib.Path, *, tokenizer: TextCodec | None = None):
    super().__init__(directory)
    self._tokenizer = tokenizer
    self.changed = self._decoded = 0

  def splits(self) -> tuple[str, ...]:
    """Names of the JSONL files and directories here, training first."""
    names = {path.name.removesuffix(".gz").rsplit(".", 1)[0] for path in self.directory.iterdir() if _is_jsonl(path)}
    names |= {path.name for path in self.directory.iterdir() if path.is_dir() and any(map(_is_jsonl, path.iterdir()))}
    if not names:
      raise InputError("no SPLIT.jsonl here", path=self.directory)
    return in_order(names, self.directory)

  def files(self, split: str | None = None) -> list[pathlib.Path]:
    """Files of a split; the corpus is read from the files of all splits."""
    if split is None:
      return [path for name in self.splits() for path in self.files(name)]
    inside = self.directory / split
    paths = sorted(filter(_is_jsonl, inside.iterdir())) if inside.is_dir() else []
    paths += [path for suffix in _SUFFIXES if (path := self.directory / (split + suffix)).is_file()]
    if not paths:
      raise InputError(f"no {split}.jsonl here", path=self.directory)
    return paths

  def records(self, kind: Kind, split: str | None) -> Iterator[Located]:
    """Yields (path, line, record) of one kind."""
    if kind == "passages":
      yield from self._passages()
      return
    for path, line, value in self._lines(split):
      query_id = self._query_id(path, line)
      if kind == "queries":
        yield path, line, Query(query_id, self._text(value.get("query"), "query", path, line))
        continue
      name = "positives" if kind == "judgements" else "negatives"
      ids = dict.fromkeys(passage.id for passage in self._side(value, name, path, line))
      if kind == "judgements":
        if not ids:
          raise InputError("no positives", path=path, line=line)
        yield from ((path, line, Judgement(query_id, passage_id, 1)) for passage_id in ids)
      elif ids:
        yield path, line, Negatives(query_id, tuple(ids))

  def _query_id(self, path: pathlib.Path, line: int) -> str:
    name = path.relative_to(self.directory).as_posix()
    ending = max((suffix for suffix in _SUFFIXES if name.endswith(suffix)), key=len)
    return id_of(f"{name.removesuffix(ending)}-{line}", "the file's name", path, line)

  def _lines(self, split: str | None) -> Iterator[tuple[pathlib.Path, int, dict[str, Any]]]:
    for path in self.files(split):
      for line, value in read_json_lines(path):
        yield path, line, value

  def _passages(self) -> Iterator[Located]:
    seen: set[bytes] = set()
    self.changed = self._decoded = 0
    for path, line, value in self._lines(None):
      for name in ("positives", "negatives"):
        for passage in self._side(value, name, path, line, check=True):
          key = bytes.fromhex(passage.id)
          if key not in seen:
            seen.add(key)
            yield path, line, passage
    if self.changed:
      _log.warning("%s: %d of %d passages of token ids become other ids when encoded again; if these are most of them, "
                   "the ids are of another tokenizer", self.directory, self.changed, self._decoded)  # fmt: skip

  def _side(
    self, value: dict[str, Any], name: str, path: pathlib.Path, line: int, check: bool = False
  ) -> Iterator[Passage]:
    entries = value.get(name, [])
    if not isinstance(entries, list):
      raise InputError(f"{name} must be a list", path=path, line=line, value=entries)
    for entry in entries:
      title = ""
      if isinstance(entry, dict):
        title, entry = title_of(entry, path, line), entry.get("text")
      text = self._text(entry, f"text in {name}", path, line, check)
      digest = hashlib.blake2b(f"{title}\0{text}".encode(), digest_size=12).hexdigest()
      yield Passage(digest, title, text)

  def _text(self, value: object, what: str, path: pathlib.Path, line: int, check: bool = False) -> str:
    if isinstance(value, list):
      if not all(isinstance(token, int) and token >= 0 for token in value):
        raise InputError(f"{what}: token ids must be whole numbers", path=path, line=line, value=value)
      if self._tokenizer is None:
        raise InputError(f"{what} is token ids", path=path, line=line, fix="Name the tokenizer that made them")
      if (largest := max(value, default=0)) >= self._tokenizer.vocab_size:
        known = self._tokenizer.vocab_size
        raise InputError(f"{what}: the tokenizer has {known} ids, not this one", path=path, line=line,
                         value=largest, fix="Set backbone.path to the model whose tokenizer made them")  # fmt: skip
      text = text_of(self._tokenizer.decode(value), what, path, line)
      self._decoded += check
      self.changed += check and self._tokenizer.encode([text])[0] != value
      return text
    return text_of(value, what, path, line)


def _is_jsonl(path: pathlib.Path) -> bool:
  return path.is_file() and path.name.endswith(_SUFFIXES)
