"""The public cross-encoder: a query and a passage in one sequence, its own prompt and head on a shared Backbone."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dptdr_jax import backbone as backbones
from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files, marks, remote
from dptdr_jax.core.errors import InputError
from dptdr_jax.data import text
from dptdr_jax.data.pairs import PairFormat, Pairs
from dptdr_jax.data.ragged import Ragged
from dptdr_jax.data.store import TokenStore
from dptdr_jax.models import convert, prompts
from dptdr_jax.models.cross import HEADS, check_cross, cross_logits
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.runtime import buckets
from dptdr_jax.runtime import mesh as meshes

FORMAT = 2  # of cross_encoder.json; 1 named the backbone by its tensors alone, and is read, too
_ABOUT, _TENSORS = "cross_encoder.json", "prompts.safetensors"


@dataclasses.dataclass(frozen=True)
class PairSettings:
  """What a score depends on besides weights, prompt and head."""

  query_length: int = 32  # tokens of a query at most, special tokens included
  pair_length: int = 160  # tokens of a pair at most, special tokens included; the passage is what is cut
  separator: str = " "  # between title and text
  query_template: str = text.QUERY_TEMPLATE
  passage_template: str = text.PASSAGE_TEMPLATE
  head: str = "match"  # or 'first', see `models.cross`

  def __post_init__(self):
    text.check_templates(self.query_template, self.passage_template)
    if self.head not in HEADS:
      raise InputError("unknown head of a cross-encoder", value=self.head, fix=f"Use {' or '.join(HEADS)}")


@dataclasses.dataclass(frozen=True)
class CrossEncoder:
  """Scores pairs by reading both texts at once: far better than vectors, far too slow for a whole corpus.

  Attributes:
    backbone: shared, never changed; it has a tokenizer, whose template for pairs is used.
    spec: the prompt's kind and settings.
    trainable: {'prompt': …, 'head': …}, see `models.cross`.
    settings: lengths, templates.
  """

  backbone: Backbone
  spec: PromptSpec
  trainable: dict[str, Any] = dataclasses.field(repr=False)
  settings: PairSettings

  def __post_init__(self):
    if self.backbone.tokenizer is None:
      raise InputError("a cross-encoder needs a tokenizer, and this backbone has none", path=self.backbone.path)
    prompts.check_lengths(self.backbone.config, self.spec, self.settings.pair_length)
    check_cross(self.spec, self.settings.head, self.trainable, self.backbone.config)

  @classmethod
  def load(cls, path: files.Path, backbone: Backbone | None = None) -> CrossEncoder:
    """Loads what `save` wrote.

    Args:
      path: the directory, local or a URL.
      backbone: the one that it was trained on, if it is in memory already; checked by its hash.

    Raises:
      InputError: no cross-encoder there, a truncated file, or one of another backbone or tokenizer.
    """
    path = remote.staged(path)
    if not (path / _ABOUT).is_file():
      raise InputError(f"no cross-encoder here: no {_ABOUT}", path=path)
    about = files.read_json(path / _ABOUT)
    if not isinstance(about, dict) or about.get("format") not in (1, FORMAT):
      raise InputError(f"not a cross-encoder of format 1 or {FORMAT}", path=path / _ABOUT)
    with files.fields_of(path / _ABOUT):
      named, tokenizer, spec = about["backbone"], about["tokenizer"]["hash"], PromptSpec.from_dict({**about["prompt"]})
      _ = named["path"], named["hash"]  # they are there
    settings = backbones.settings_of(PairSettings, {"head": "first", **about}, path / _ABOUT)  # the one head at first
    backbone = backbones.load_named(path / _ABOUT, named, backbone, tokenizer)
    tensors = convert.read_safetensors(path / _TENSORS)
    backbones.check_finite(tensors, path / _TENSORS)
    trainable = {"prompt": {}, **prompts.unflatten(tensors)}  # kind 'none' has none
    check_cross(spec, settings.head, trainable, backbone.config, path / _TENSORS)
    return cls(backbone, spec, trainable, settings)

  def save(self, path: files.Path) -> None:
    """Writes cross_encoder.json and prompts.safetensors, as a whole or not at all; the backbone is named and hashed.

    One that is stored with its retriever, where all weights were tuned, is written beside.

    Raises:
      InputError: the directory holds something else than a cross-encoder.
    """
    if not remote.is_remote(path):
      marks.check_replaceable(path, lambda directory: backbones.is_saved(directory, _ABOUT, _TENSORS))
    with remote.written(path, last=_ABOUT, whole=True) as local, files.atomic_directory(local) as partial:
      convert.write_safetensors(partial / _TENSORS, prompts.flatten(self.trainable))
      about = {
        "format": FORMAT,
        "prompt": dataclasses.asdict(self.spec),
        **dataclasses.asdict(self.settings),
        "backbone": backbones.name(self.backbone, path),
        "tokenizer": {"hash": self.backbone.tokenizer.hash},
      }
      backbones.write_beside(self.backbone, partial)
      (partial / _ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

  @property
  def num_parameters(self) -> int:
    """Trained ones: prompt and head."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.trainable))

  @functools.cached_property
  def hash(self) -> str:
    """Over everything that a score depends on: what scores on disk are tied to."""
    hashes = [self.backbone.hash, self.backbone.tokenizer.hash]
    described = json.dumps([self.spec.read_fields(), dataclasses.asdict(self.settings), hashes], sort_keys=True)
    return backbones.hash_tensors(prompts.flatten(self.trainable), described)

  @functools.cached_property
  def _placed(self) -> dict[str, Any]:
    return jax.device_put(self.trainable, meshes.replicated(self.backbone.mesh))

  @functools.cached_property
  def form(self) -> PairFormat:
    """How two texts become one sequence."""
    return PairFormat.of(self.backbone.tokenizer, self.settings.query_length, self.settings.pair_length)

  def score(self, queries: Iterable[str], passages: Iterable[text.GivenPassage]) -> np.ndarray:
    """Probabilities that passage i is relevant to query i, at even odds (see `training.cross_encoder`).

    Args:
      queries: n texts; one that comes again is tokenised once.
      passages: n, each a text, (title, text), a Passage, or {'text': …} with a 'title' or none; a title may be None.

    Returns:
      float32 [n].

    Raises:
      InputError: more of one than of the other, one text in place of a list, or what is none of these, by its place.
    """
    settings, tokenizer = self.settings, self.backbone.tokenizer
    asked = text.query_texts(queries, settings.query_template)
    whole = text.passage_texts(passages, settings.separator, settings.passage_template)
    if len(asked) != len(whole):
      raise InputError(f"{len(asked)} queries and {len(whole)} passages: pairs want as many of both")
    different = {query: place for place, query in enumerate(dict.fromkeys(asked))}
    lists = (
      Ragged.of(tokenizer.encode(list(different), settings.query_length)),
      Ragged.of(tokenizer.encode(whole, settings.pair_length)),
    )
    rows = np.array([different[query] for query in asked], np.int64)
    return probabilities(self._logits(Pairs(*lists, rows, np.arange(len(whole)), self.form)))

  def logits_stored(
    self, queries: TokenStore, passages: TokenStore, query_rows: np.ndarray, passage_rows: np.ndarray, *,
    batch_tokens: int = 0, description: str = "",
    advance: Callable[[int], None] = lambda count: None,
  ) -> np.ndarray:  # fmt: skip
    """Logits of those probabilities (see `probabilities`, which saturate and tie) for rows of token stores.

    Args:
      query_rows, passage_rows: int [n].
      batch_tokens: tokens a device takes at a time, padding included; 0: by the device.
      description: of the progress bar; '' for none.
      advance: told how many more are done, where a caller shows its own.

    Returns:
      float32 [n].

    Raises:
      InputError: a store of another tokenizer, or one that was cut shorter than pairs need.
    """
    for store in (queries, passages):
      if store.tokenizer_hash != self.backbone.tokenizer.hash:
        raise InputError("tokens of another tokenizer than the cross-encoder's", path=store.path)
    rows = (np.asarray(part, np.int64) for part in (query_rows, passage_rows))
    options = {"batch_tokens": batch_tokens, "description": description, "advance": advance}
    return self._logits(Pairs(queries, passages, *rows, self.form), **options)

  def _logits(self, pairs: Pairs, **options: Any) -> np.ndarray:
    backbone = self.backbone
    static = dict(config=backbone.config, spec=prompts.as_read(self.spec), compute_dtype=backbone.compute_dtype)
    return buckets.map_sequences(
      lambda batch: logits_of(backbone.params, self._placed, **batch, **static),
      pairs, backbone.mesh, unit="pair", **options,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config", "spec", "compute_dtype"))
def logits_of(params, trainable, tokens, lengths, segments, *, config, spec, compute_dtype):
  """A batch of pairs, as `data.pairs.Pairs.batch` has it, to logits [B] float32."""
  inputs = (params, trainable, tokens, lengths, segments)
  return cross_logits(config, spec, *inputs, compute_dtype=jnp.dtype(compute_dtype))


def probabilities(logits: np.ndarray) -> np.ndarray:
  """Sigmoids, float32 of the same shape; NaN stays. From a logit of some 17 on they are 1 and tie: rank by logits."""
  return (0.5 * (1 + np.tanh(0.5 * logits))).astype(np.float32)
