"""The public face: a frozen Backbone, and Retrievers (prompts and all that a vector depends on) that share it."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dptdr_jax import backbone as backbones
from dptdr_jax.backbone import Backbone
from dptdr_jax.core import files, marks, remote
from dptdr_jax.core.errors import InputError
from dptdr_jax.data import sequences, text
from dptdr_jax.data.records import Passage, Query
from dptdr_jax.data.store import TokenStore
from dptdr_jax.data.tokenizer import Tokenizer
from dptdr_jax.models import convert, prompts
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.models.represent import represent
from dptdr_jax.runtime import buckets
from dptdr_jax.runtime import mesh as meshes

FORMAT = 2  # of retriever.json; 1 named the backbone by its tensors alone, and is read, too
_DESCRIPTION, _PROMPTS = "retriever.json", "prompts.safetensors"


@dataclasses.dataclass(frozen=True)
class VectorSettings:
  """What a vector depends on besides weights and prompts."""

  pooling: str = "first"  # 'first' token or 'mean' over tokens
  normalize: bool = False
  temperature: float = 1.0  # of the training loss; scores are plain inner products
  query_length: int = 32  # tokens, special tokens included
  passage_length: int = 128
  separator: str = " "  # between title and text
  query_template: str = text.QUERY_TEMPLATE
  passage_template: str = text.PASSAGE_TEMPLATE

  def __post_init__(self):
    text.check_templates(self.query_template, self.passage_template)

  def limit(self, kind: str) -> int:
    """The most tokens of a 'query' or a 'passage'."""
    return {"query": self.query_length, "passage": self.passage_length}[kind]


@dataclasses.dataclass(frozen=True)
class Retriever:
  """Prompts on a backbone: texts to vectors whose inner product is the score.

  Attributes:
    backbone: shared, never changed.
    spec: the prompt's kind and settings.
    prompts: raw prompt parameters of 'query' and 'passage' (the same object where they are tied).
    settings: pooling, lengths, templates, …
    passage_backbone: the passages' own, where the original saved two different ones; None: `backbone`.
  """

  backbone: Backbone
  spec: PromptSpec
  prompts: dict[str, Any] = dataclasses.field(repr=False)
  settings: VectorSettings
  passage_backbone: Backbone | None = None

  def __post_init__(self):
    lengths = (self.settings.query_length, self.settings.passage_length)
    prompts.check_lengths(self.backbone.config, self.spec, max(lengths))
    tokenizer = self.backbone.tokenizer
    special = len(tokenizer.wrap([])) if tokenizer else 0
    if min(lengths) <= special:
      what = "query_length and passage_length leave no room for a text"
      raise InputError(what, value=lengths, fix=f"Raise both above {special}, the number of special tokens")

  @classmethod
  def untuned(cls, backbone: Backbone, **settings: Any) -> Retriever:
    """The bare backbone as a retriever; `settings` as in VectorSettings."""
    return cls(backbone, PromptSpec(kind="none"), {"query": {}, "passage": {}}, VectorSettings(**settings))

  @classmethod
  def load(
    cls, path: files.Path, backbone: Backbone | None = None, *, compute_dtype: str = "auto", fsdp: int = 1
  ) -> Retriever:
    """Loads what `save` wrote, or what the original DPTDR saved (tied or untied, .bin or .safetensors).

    Args:
      path: the directory, local or a URL.
      backbone: the one that the prompts were trained on, if it is in memory already; checked by its hash.
      compute_dtype, fsdp: of one that is not, see `Backbone.load`.

    Raises:
      InputError: no retriever there, a truncated file, or prompts of another backbone or tokenizer.
    """
    path = _home(path)
    if (path / _DESCRIPTION).is_file():
      return _load_own(path, backbone, {"compute_dtype": compute_dtype, "fsdp": fsdp})
    return _load_original(path, backbone, (compute_dtype, fsdp))

  def save(self, path: files.Path) -> None:
    """Writes retriever.json and prompts.safetensors, as a whole or not at all (to a URL: the .json last); see `load`.

    The backbone is named and hashed, not copied; where all of its weights were tuned it is written beside.

    Raises:
      InputError: the directory holds something else than a retriever.
    """
    if not remote.is_remote(path):
      marks.check_replaceable(path, lambda directory: backbones.is_saved(directory, _DESCRIPTION, _PROMPTS))
    tied = self.prompts["query"] is self.prompts["passage"]
    trees = {"prompt": self.prompts["query"]} if tied else self.prompts
    with remote.written(path, last=_DESCRIPTION, whole=True) as local, files.atomic_directory(local) as partial:
      convert.write_safetensors(partial / _PROMPTS, prompts.flatten(trees))
      description = {
        "format": FORMAT,
        "tied": tied,
        "prompt": dataclasses.asdict(self.spec),
        **dataclasses.asdict(self.settings),
        "backbone": backbones.name(self.backbone, path),
        "passage_backbone": self.passage_backbone and backbones.name(self.passage_backbone, path),
        "tokenizer": {"hash": self.backbone.tokenizer.hash if self.backbone.tokenizer else None},
      }
      backbones.write_beside(self.backbone, partial)
      (partial / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

  @functools.cached_property
  def hash(self) -> str:
    """Over everything that a vector depends on: what embeddings on disk are tied to."""
    tensors = {**prompts.flatten({"query": self.prompts["query"], "passage": self.prompts["passage"]})}
    hashes = [self.backbone_of(kind).hash for kind in ("query", "passage")]
    hashes += [self.backbone.tokenizer.hash] if self.backbone.tokenizer else []
    described = json.dumps([self.spec.read_fields(), dataclasses.asdict(self.settings), hashes], sort_keys=True)
    return backbones.hash_tensors(tensors, described)

  @functools.cached_property
  def _placed(self) -> dict[str, Any]:
    sides = {kind: (tree, meshes.replicated(self.backbone_of(kind).mesh)) for kind, tree in self.prompts.items()}
    return {kind: jax.device_put(*placed) for kind, placed in sides.items()}

  def backbone_of(self, kind: str) -> Backbone:
    """The backbone of a 'query' or a 'passage'."""
    return self.passage_backbone if kind == "passage" and self.passage_backbone else self.backbone

  def encode_queries(self, texts: Iterable[str]) -> np.ndarray:
    """Vectors of queries, float32 [n, H].

    Raises:
      InputError: one query in place of a list, or what is no text or an empty one, by its place.
    """
    return self._encode_texts(text.query_texts(texts, self.settings.query_template), "query")

  def encode_passages(self, texts: Iterable[text.GivenPassage]) -> np.ndarray:
    """Vectors of passages, float32 [n, H].

    Args:
      texts: each a text, (title, text), a Passage, or {'text': …} with a 'title' or none; a title may be None.

    Raises:
      InputError: one passage in place of a list, or what is none of these or empty, by its place.
    """
    settings = self.settings
    return self._encode_texts(text.passage_texts(texts, settings.separator, settings.passage_template), "passage")

  def encode_records(self, records: Iterable[Query | Passage], **options: Any) -> np.ndarray:
    """Vectors of prepared queries, or of prepared passages, in order: float32 [n, H]. A text may be empty here.

    `options` are batch_tokens and description, as of `encode_store`.
    """
    records, settings = list(records), self.settings
    if records and isinstance(records[0], Passage):
      form = functools.partial(text.passage_text, separator=settings.separator, template=settings.passage_template)
      return self._encode_texts([form(record) for record in records], "passage", **options)
    texts = [text.query_text(record, settings.query_template) for record in records]
    return self._encode_texts(texts, "query", **options)

  def encode_tokens(self, ids: np.ndarray, mask: np.ndarray, kind: str = "query") -> np.ndarray:
    """Vectors of padded token ids.

    Args:
      ids: int [n, T], special tokens included.
      mask: int or bool [n, T], ones before zeros: padding is on the right.
      kind: 'query' or 'passage'.

    Returns:
      float32 [n, H].

    Raises:
      InputError: a mask of another form, an id that is not in the vocabulary, an unknown kind.
    """
    if kind not in ("query", "passage"):
      raise InputError("unknown kind of text", value=kind, fix="Use query or passage")
    ids, mask = np.asarray(ids), np.asarray(mask).astype(bool)
    if ids.ndim != 2 or ids.shape != mask.shape:
      raise InputError("ids and mask are of one shape [n, T]", value=(ids.shape, mask.shape))
    lengths = mask.sum(1)
    wrong = (mask != (np.arange(ids.shape[1]) < lengths[:, None])).any(1) | (lengths == 0)
    if wrong.any():
      row = int(np.flatnonzero(wrong)[0])
      raise InputError(f"a mask has ones before zeros, and a one: row {row} has not", value=mask[row].astype(int))
    size = self.backbone_of(kind).config.vocab_size
    wrong = mask & ~((ids >= 0) & (ids < size))
    if wrong.any():
      row = int(np.flatnonzero(wrong.any(1))[0])
      raise InputError(f"token ids are 0 … {size - 1}, row {row} has another", value=ids[wrong][0].item())
    return self._encode(sequences.Padded(ids.astype(np.int32), lengths), kind)

  def encode_store(self, store: TokenStore, kind: str, rows: np.ndarray | None = None, **options: Any) -> np.ndarray:
    """Vectors of rows of a token store, float32 [n, H], in the order of `rows` (default: all).

    Args:
      options: batch_tokens, that a device encodes at a time, padding included; description, of a progress bar.

    Raises:
      InputError: a store of another tokenizer.
    """
    tokenizer = self.backbone.tokenizer
    if tokenizer is not None and store.tokenizer_hash != tokenizer.hash:
      raise InputError("tokens of another tokenizer than the retriever's", path=store.path)
    rows = np.arange(len(store)) if rows is None else np.asarray(rows)
    return self._encode(sequences.Stored(store, rows, self.settings.limit(kind)), kind, **options)

  def _encode_texts(self, texts: list[str], kind: str, **options: Any) -> np.ndarray:
    tokenizer = self.backbone.tokenizer
    if tokenizer is None:
      raise InputError("texts need a tokenizer, and this backbone has none", path=self.backbone.path)
    room = self.settings.limit(kind) - len(tokenizer.wrap([]))
    lists = [np.array(tokenizer.wrap(ids), np.int32) for ids in tokenizer.encode(texts, room)]
    source = sequences.Lists(lists, tokenizer.pad_id, self.settings.limit(kind))
    return self._encode(source, kind, **options)

  def _encode(self, source: Any, kind: str, **options: Any) -> np.ndarray:
    backbone, settings = self.backbone_of(kind), self.settings
    static = dict(
      config=backbone.config, spec=prompts.as_read(self.spec), pooling=settings.pooling, normalize=settings.normalize,
      compute_dtype=backbone.compute_dtype,
    )  # fmt: skip
    return buckets.map_sequences(
      lambda batch: vectors_of(backbone.params, self._placed[kind], **batch, **static),
      source, backbone.mesh, (backbone.config.hidden_size,), **options,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config", "spec", "pooling", "normalize", "compute_dtype"))
def vectors_of(params, prompt, tokens, lengths, *, config, spec, pooling, normalize, compute_dtype):
  """A batch: tokens [B, T] and lengths [B] to vectors [B, H] float32; see `models.represent.represent`."""
  return represent(
    config, spec, params, prompt, tokens, lengths, pooling=pooling, normalize=normalize,
    compute_dtype=jnp.dtype(compute_dtype),
  )  # fmt: skip


def check_saved(path: files.Path) -> None:
  """Looks at a saved retriever without reading weights.

  Raises:
    InputError: there is none, it is not whole, or a backbone or the tokenizer is not where it is named.
  """
  path = _home(path)
  if not (path / _DESCRIPTION).is_file():
    for place in _sides(path).values():
      prompts.check_original(files.read_json(place / "config.json"), place)
    _check_tokenizer(_sides(path)["query"])
    return
  about, spec, settings = _described(path)
  if not (path / _PROMPTS).is_file():
    raise InputError("no prompts here", path=path / _PROMPTS)
  for named in filter(None, (about["passage_backbone"], about["backbone"])):
    try:
      directory = backbones.locate(backbones.find_named(path, named))
    except InputError as error:
      raise InputError(f"its backbone cannot be had: {error}", path=path / _DESCRIPTION) from error
    config = EncoderConfig.from_file(directory / "config.json")
    prompts.check_lengths(config, spec, max(settings.query_length, settings.passage_length))
  _check_tokenizer(directory)


def _check_tokenizer(directory: pathlib.Path) -> None:
  """Raises InputError where the queries' backbone has none: both sides' texts are tokenised with it."""
  home = backbones.tokenizer_home(directory)
  if home is None:
    raise InputError("no tokenizer here, and texts need one", path=directory)
  Tokenizer(home)


def saved_files(path: files.Path) -> list[pathlib.Path]:
  """What is read of a saved retriever, but for a backbone that it names elsewhere and has the hash of."""
  path = _home(path)
  if not (path / _DESCRIPTION).is_file():
    return [one for place in _sides(path).values() for one in backbones.files_of(place)]
  beside = backbones.files_of(path / "backbone") if (path / "backbone").is_dir() else []
  return [path / _DESCRIPTION, path / _PROMPTS, *beside]


def saved_backbone(path: files.Path) -> dict[str, str] | None:
  """How a saved retriever names its backbone, see `Backbone.is_named`; None: a checkpoint of the original."""
  path = _home(path)
  return _described(path)[0]["backbone"] if (path / _DESCRIPTION).is_file() else None


def _home(path: files.Path) -> pathlib.Path:
  """Where a saved retriever is, fetched from a URL first."""
  found = remote.staged(path)
  if not any((found / name).exists() for name in (_DESCRIPTION, "query_model", "config.json")):
    raise InputError("no retriever here: neither retriever.json nor a checkpoint of the original", path=path)
  return found


def _described(path: pathlib.Path) -> tuple[dict[str, Any], PromptSpec, VectorSettings]:
  """What retriever.json says, in its fields and as the settings that these are."""
  source = path / _DESCRIPTION
  about = files.read_json(source)
  if not isinstance(about, dict) or about.get("format") not in (1, FORMAT):
    raise InputError(f"not a retriever of format 1 or {FORMAT}", path=source)
  with files.fields_of(source):
    spec, settings = PromptSpec.from_dict({**about["prompt"]}), backbones.settings_of(VectorSettings, about, source)
    for named in (about["backbone"], about["passage_backbone"] or about["backbone"]):
      _ = named["path"], named["hash"]  # they are there, as is what follows
    _ = about["tied"], about["tokenizer"]["hash"]
  return about, spec, settings


def _load_own(path: pathlib.Path, backbone: Backbone | None, options: dict[str, Any]) -> Retriever:
  about, spec, settings = _described(path)
  source, other = path / _DESCRIPTION, about["passage_backbone"]
  backbone = backbones.load_named(source, about["backbone"], backbone, about["tokenizer"]["hash"], **options)
  second = other and backbones.load_named(source, other, **options)
  tensors = convert.read_safetensors(path / _PROMPTS)
  backbones.check_finite(tensors, path / _PROMPTS)
  trees = prompts.unflatten(tensors)
  sides = {side: trees.get("prompt" if about["tied"] else side, {}) for side in ("query", "passage")}
  for tree in sides.values():
    prompts.check_prompt(spec, tree, backbone.config, path / _PROMPTS)
  return Retriever(backbone, spec, sides, settings, second)


def _sides(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """The directories of a checkpoint of the original: a whole model, or untied query_model/ and passage_model/."""
  if not (path / "query_model").is_dir():
    return {"query": path}
  return {side: path / f"{side}_model" for side in ("query", "passage")}


def _load_original(path: pathlib.Path, backbone: Backbone | None, options: tuple[str, int]) -> Retriever:
  """The original's directory; two sides are on one backbone as a rule."""
  places = _sides(path)
  specs, sides, loaded, hashes = {}, {}, {}, {}
  for side, place in places.items():
    tensors = convert.load_backbone_tensors(place)
    specs[side], sides[side] = prompts.from_original(tensors, files.read_json(place / "config.json"))
    config = EncoderConfig.from_file(place / "config.json")
    hashes[side] = backbones.hashes_of(config, backbones.encoder_tensors(tensors))[0]
    known = {one.hash: one for one in (backbone, *loaded.values()) if one is not None}
    loaded[side] = known.get(hashes[side]) or Backbone.from_tensors(str(place), place, tensors, *options)
    prompts.check_prompt(specs[side], sides[side], loaded[side].config, place)
    backbones.check_finite(prompts.flatten(sides[side]), place)
  if backbone is not None and backbone.hash not in hashes.values():
    raise InputError(f"this checkpoint's backbone is not the one of {backbone.path}", path=path)
  backbone, spec = loaded["query"], specs["query"]
  if any(other.read_fields() != spec.read_fields() for other in specs.values()):
    raise InputError("query_model and passage_model have prompts of two kinds or lengths", path=path)
  second = None if loaded.get("passage", backbone) is backbone else loaded["passage"]
  sides = {"query": sides["query"], "passage": sides.get("passage", sides["query"])}
  usual = VectorSettings(separator=backbone.tokenizer.separator if backbone.tokenizer else " ")
  longest = prompts.longest_input(backbone.config, spec) or usual.passage_length
  lengths = {name: min(getattr(usual, name), longest) for name in ("query_length", "passage_length")}
  return Retriever(backbone, spec, sides, dataclasses.replace(usual, **lengths), second)
