"""Hugging Face fast tokenizers by the tokenizers library: ids without special tokens, and how to wrap them."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import tokenizers

from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import read_json

_NAMES = {"pad": ("[PAD]", "<pad>"), "mask": ("[MASK]", "<mask>")}


class PairTemplate(NamedTuple):
  """The special ids around two texts in one sequence: BERT's (cls), (sep), (sep); RoBERTa's (s), (/s, /s), (/s)."""

  before: tuple[int, ...]
  between: tuple[int, ...]
  after: tuple[int, ...]


class Tokenizer:
  """A fast tokenizer from a directory in Hugging Face layout, without its own truncation and padding.

  Attributes:
    backend: the `tokenizers.Tokenizer`.
    prefix, suffix: special ids before and after one text, such as (cls,) and (sep,).
    pad_id, mask_id: of the special tokens of these names; mask_id is None if the vocabulary has none.
    vocab_size: the number of ids, added tokens included.
    hash: SHA-256 of tokenizer.json's content without truncation and padding.
  """

  def __init__(self, directory: str | pathlib.Path):
    directory = pathlib.Path(directory)
    content = _load(directory)
    content["truncation"] = content["padding"] = None
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    try:
      self.backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
      raise InputError(f"not a tokenizer ({error})", path=directory / "tokenizer.json") from error
    self.directory = directory
    self.hash = hashlib.sha256(text.encode()).hexdigest()
    self.vocab_size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values())
    self.prefix, self.suffix = self._wrapping()
    self.pad_id = self._special("pad")
    if self.pad_id is None:
      raise InputError("the tokenizer has no padding token", path=directory, fix="Name it in tokenizer_config.json")
    self.mask_id = self._special("mask")

  @property
  def separator(self) -> str:
    """The separator token as text: the original puts it between title and text."""
    return self.backend.id_to_token(self.suffix[-1])

  def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> list[list[int]]:
    """Returns token ids without special tokens, cut on the right to `max_tokens`."""
    encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids[:max_tokens] for encoding in encodings]

  def wrap(self, ids: Sequence[int]) -> list[int]:
    """Returns prefix + ids + suffix."""
    return [*self.prefix, *ids, *self.suffix]

  def pair_template(self) -> PairTemplate:
    """Returns the special ids that the tokenizer's own post-processor puts around two texts.

    Raises:
      InputError: it puts none before, between or after them, or the second text first.
    """
    encoding = self.backend.encode("a", "a", add_special_tokens=True)
    first, second = ([at for at, text in enumerate(encoding.sequence_ids) if text == which] for which in (0, 1))
    ids = encoding.ids
    template = PairTemplate(*map(tuple, (ids[: first[0]], ids[first[-1] + 1 : second[0]], ids[second[-1] + 1 :])))
    if not all(template) or second[0] < first[-1]:
      what = "the tokenizer puts no special tokens before, between and after two texts"
      raise InputError(what, path=self.directory, fix="Its post-processor needs a template for pairs")
    return template

  def check_model(self, vocab_size: int, path: str | pathlib.Path) -> None:
    """Raises an InputError if the model at `path` has fewer word embeddings than the tokenizer has ids."""
    if self.vocab_size > vocab_size:
      what = f"the tokenizer in {self.directory} has {self.vocab_size} ids and the model {vocab_size} embeddings"
      raise InputError(what, path=path, fix="Use the tokenizer of the model")

  def _wrapping(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    encoding = self.backend.encode("a", add_special_tokens=True)
    content = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
    prefix, suffix = encoding.ids[: content[0]], encoding.ids[content[-1] + 1 :]
    if not prefix or not suffix:
      what = "the tokenizer puts no special token before and after a text"
      raise InputError(
        what, path=self.directory, fix="Its post-processor must add the special tokens of the model's training"
      )
    return tuple(prefix), tuple(suffix)

  def _special(self, name: str) -> int | None:
    """The id of a special token, named by the directory's files, or else as BERT or RoBERTa name it."""
    named: list[str] = []
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
      if (self.directory / file).is_file():
        value = read_json(self.directory / file).get(f"{name}_token")
        named += [value["content"] if isinstance(value, dict) else value] if value else []
    ids = (self.backend.token_to_id(token) for token in (*named, *_NAMES[name]))
    return next((token_id for token_id in ids if token_id is not None), None)


def _load(directory: pathlib.Path) -> dict[str, Any]:
  """The content of tokenizer.json; transformers makes it if a directory has only vocabulary files."""
  if (directory / "tokenizer.json").is_file():
    return read_json(directory / "tokenizer.json")
  if not any((directory / name).is_file() for name in ("vocab.txt", "vocab.json", "sentencepiece.bpe.model")):
    raise InputError("no tokenizer here (tokenizer.json, vocab.txt or vocab.json)", path=directory)
  import transformers  # takes seconds to import and is rarely needed

  try:
    built = transformers.AutoTokenizer.from_pretrained(str(directory), use_fast=True, local_files_only=True)
  except Exception as error:  # of any kind: a package that is missing, files that do not belong together
    reason = " ".join(str(error).split())
    raise InputError(f"transformers cannot make a tokenizer of it ({reason})", path=directory) from error
  if not built.is_fast:
    raise InputError("only fast tokenizers are supported", path=directory)
  return json.loads(built.backend_tokenizer.to_str())
