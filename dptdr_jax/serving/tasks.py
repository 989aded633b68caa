"""A task: a name, and how its texts become token ids and vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from dptdr_jax.backbone import Backbone
from dptdr_jax.core.errors import InputError
from dptdr_jax.data import text
from dptdr_jax.data.tokenizer import Tokenizer
from dptdr_jax.models.bank import Entry, make_entry
from dptdr_jax.retriever import Retriever, VectorSettings
from dptdr_jax.serving.limits import TooLarge
from dptdr_jax.serving.waiting import KINDS


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """A retriever that is served.

  Attributes:
    hash: of the retriever: what the vectors of this task depend on.
    entries: what the bank holds for a 'query' and a 'passage'; the same object if they are tied.
  """

  name: str
  hash: str
  settings: VectorSettings
  entries: dict[str, Entry]
  tokenizer: Tokenizer

  @classmethod
  def of(cls, name: str, retriever: Retriever, backbone: Backbone) -> Task:
    """Makes a task of a retriever. Its prompts are not copied.

    Raises:
      InputError: another backbone, two backbones, no tokenizer, or a prompt that cannot share a batch.
    """
    if retriever.passage_backbone is not None:
      raise InputError("a retriever with two backbones cannot be served on one", value=name)
    if retriever.backbone.hash != backbone.hash:
      raise InputError("this retriever was trained on another backbone", value=name, fix=f"Serve {backbone.path}")
    if backbone.tokenizer is None:
      raise InputError("texts need a tokenizer, and this backbone has none", path=backbone.path)
    settings, entries = retriever.settings, {}
    for kind in KINDS:
      if kind == "passage" and retriever.prompts["passage"] is retriever.prompts["query"]:
        entries["passage"] = entries["query"]
        continue
      entries[kind] = make_entry(
        backbone.config, retriever.spec, retriever.prompts[kind], pooling=settings.pooling,
        normalize=settings.normalize, dtype=jnp.dtype(backbone.compute_dtype),
      )  # fmt: skip
    return cls(name, retriever.hash, settings, entries, backbone.tokenizer)

  def texts(self, kind: str, given: Iterable[Any]) -> list[str]:
    """The texts to tokenize for queries or passages as users give them; see `Retriever.encode_queries`.

    Raises:
      InputError: an unknown kind, or something that is no text.
    """
    settings = self.settings
    if kind == "query":
      return text.query_texts(given, settings.query_template)
    if kind == "passage":
      return text.passage_texts(given, settings.separator, settings.passage_template)
    raise InputError("unknown kind of text", value=kind, fix="Use query or passage")

  def guess_tokens(self, kind: str, texts: list[str]) -> int:
    """A number of tokens that few languages exceed, without tokenizing."""
    special, limit = len(self.tokenizer.wrap([])), self.settings.limit(kind)
    return sum(min(limit, special + 1 + len(one) // 2) for one in texts)

  def tokenize(self, kind: str, texts: list[str], truncate: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Token ids of each text, with special tokens, and how many tokens of each were cut off.

    Raises:
      TooLarge: a text is longer than the task reads, and `truncate` is off.
    """
    tokenizer, limit = self.tokenizer, self.settings.limit(kind)
    room = limit - len(tokenizer.wrap([]))
    lists = tokenizer.encode(texts)
    cut = np.array([max(0, len(ids) - room) for ids in lists], np.int32)
    if cut.any() and not truncate:
      place = int(np.flatnonzero(cut)[0])
      raise TooLarge(
        f"{kind} {place} has {limit + cut[place]} tokens, and the task {self.name} reads {limit}. "
        "Set truncate to cut it off, or split it"
      )
    return [np.array(tokenizer.wrap(ids[:room]), np.int32) for ids in lists], cut
