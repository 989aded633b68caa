"""What all stages build on: text, tokens, backbones, vectors and runs as nodes of the graph."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from types import MappingProxyType

from dptdr_jax import backbone as backbones
from dptdr_jax import retriever as retrievers
from dptdr_jax.core import remote
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.store import Inputs, Kind, Ref, read_about
from dptdr_jax.data import text
from dptdr_jax.data.formats import Format
from dptdr_jax.pipeline import encode, prepare, pretrain
from dptdr_jax.pipeline.models import BackboneInput, Compute, RetrieverInput
from dptdr_jax.pipeline.outside import Files, Outside
from dptdr_jax.pipeline.systems import System
from dptdr_jax.pipeline.trials import DevInput, PairDevInput
from dptdr_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class Node:
  """An artefact to be made."""

  stage: str  # to which it belongs: 'prepare', 'mine0', 'train1', …
  kind: Kind
  ref: Ref
  inputs: Inputs
  links: dict[str, str]  # where people look for it, from the working directory: {link: path within the artefact}


class Foundations:
  """Artefacts that several stages ask for; each is added to the stage that asks first.

  Attributes:
    nodes: by reference.
    trained: the retrievers of the rounds so far.
    stage: the one that asks.
  """

  def __init__(self, settings: Settings, outside: Outside):
    self.settings, self._outside, self.stage = settings, outside, "prepare"
    self.nodes: dict[Ref, Node] = {}
    self.trained: dict[int, Ref] = {}
    self.compute = Compute(dtype=backbones.resolve_dtype(settings.compute_dtype), fsdp=settings.fsdp)

  @property
  def stages(self) -> list[str]:
    """Names of the stages, in order."""
    return list(dict.fromkeys(node.stage for node in self.nodes.values()))

  def add(self, kind: Kind, inputs: Inputs, links: Mapping[str, str] = MappingProxyType({})) -> Ref:
    """Adds an artefact to the stage that asks for it first; `links` as in `Node`."""
    ref = kind.ref(inputs)
    if ref not in self.nodes:
      self.nodes[ref] = Node(self.stage, kind, ref, inputs, {})
    self.nodes[ref].links.update(links)
    return ref

  # What comes from outside.

  @functools.cached_property
  def directory(self) -> pathlib.Path:
    """The folder of the data."""
    return prepare.data_directory(self.settings.data)

  @functools.cached_property
  def format(self) -> Format:
    """The reader of the data."""
    data = self.settings.data
    return prepare.open_format(data.format, self.directory, data.empty_text, data.title_augmented)

  def _data(self, split: str | None) -> prepare.DataInput:
    data, paths = self.settings.data, self.format.files(split)
    return prepare.DataInput(
      format=data.format, files=self._outside.files(self.directory, paths), empty_text=data.empty_text,
      title_augmented=data.title_augmented,
    )  # fmt: skip

  @functools.cached_property
  def scratch(self) -> Ref | None:
    """The backbone that a run from nothing begins with."""
    pretraining = self.settings.pretrain
    if not (pretraining.enabled and pretraining.tokenizer == "train"):
      return None
    inputs = prepare.ScratchInputs(
      corpora=self._corpora(), separator=self.settings.text.separator, vocabulary=pretraining.vocabulary,
      shape=pretraining.shape, seed=self.settings.seed,
    )  # fmt: skip
    return self.add(prepare.SCRATCH, inputs)

  @functools.cached_property
  def tokenizer(self) -> prepare.TokenizerInput:
    """That of the backbone."""
    if self.scratch is not None:
      return prepare.TokenizerInput(scratch=self.scratch)
    directory = backbones.locate(self.settings.backbone.path)
    home = backbones.tokenizer_home(directory)
    if home is None:
      raise InputError("this backbone has no tokenizer", path=directory)
    return prepare.TokenizerInput(files=self._outside.files(home, backbones.tokenizer_files(home)))

  @functools.cached_property
  def base(self) -> BackboneInput:
    """The backbone that the run starts from."""
    if self.scratch is not None:
      return BackboneInput(made=self.scratch)
    directory = backbones.locate(self.settings.backbone.path)
    files = self._outside.files(directory, backbones.files_of(directory))
    return BackboneInput(files=files, path=self.settings.backbone.path)

  @functools.cached_property
  def pretrained(self) -> BackboneInput:
    """The backbone that prompts are trained on: after pretraining, where the settings have it."""
    settings = self.settings
    if not settings.pretrain.enabled:
      return self.base
    dev = self.dev() if settings.pretrain.evaluate_every else None
    inputs = pretrain.PretrainInputs(
      seed=settings.seed, pretrain=settings.pretrain, vector=settings.vector, text=settings.text if dev else None,
      compute=self.compute, dropout=settings.backbone.dropout, backbone=self.base, tokens=self._span_tokens(), dev=dev,
      log_every=settings.log_every,
    )  # fmt: skip
    return BackboneInput(made=self.add(pretrain.PRETRAIN, inputs, {"pretrain": ""}))

  def _corpora(self) -> tuple[prepare.TextsInput, ...]:
    listed = []
    for name in self.settings.pretrain.corpora:
      other = pathlib.Path(name, "prepare", "corpus")
      if name == prepare.OWN_CORPUS:
        listed.append(prepare.TextsInput(name=name, own=self.corpus))
      elif other.is_dir():
        listed.append(prepare.TextsInput(name=name, other=read_about(other)["key"], directory=str(other.resolve())))
      elif pathlib.Path(name).is_file():
        parent = pathlib.Path(name).parent
        listed.append(prepare.TextsInput(name=name, file=self._outside.files(parent, [pathlib.Path(name)])))
      else:
        raise InputError("no such corpus for pretraining", path=name,
                         fix="Name 'data' (this run's own), a text or JSONL file, or the workdir of a run")  # fmt: skip
    return tuple(listed)

  def _span_tokens(self) -> tuple[Ref, ...]:
    separator = self.settings.text.separator
    return tuple(
      self.add(
        pretrain.SPAN_TOKENS, pretrain.SpanTokensInputs(texts=texts, separator=separator, tokenizer=self.tokenizer)
      )
      for texts in self._corpora()
    )

  # Text, tokens, BM25.

  @functools.cached_property
  def corpus(self) -> Ref:
    """Text of the corpus."""
    return self.add(prepare.CORPUS, prepare.CorpusInputs(data=self._data(None)), {"prepare/corpus": ""})

  @functools.cache  # noqa: B019 — a graph lives as long as its run
  def split(self, name: str) -> Ref:
    """Text and judgements of a split."""
    return self.add(prepare.SPLIT, prepare.SplitInputs(data=self._data(name), split=name, corpus=self.corpus),
                    {f"prepare/splits/{name}": ""})  # fmt: skip

  @functools.cache  # noqa: B019
  def tokens(self, split: str = "") -> Ref:
    """Tokens of the corpus or of a split's queries."""
    settings = self.settings.text
    text.check_templates(settings.query_template, settings.passage_template)
    inputs = prepare.TokensInputs(
      text=self.split(split) if split else self.corpus, split=split, tokenizer=self.tokenizer,
      template=settings.query_template if split else settings.passage_template,
      separator="" if split else settings.separator, max_tokens=self.settings.data.max_stored_tokens,
    )  # fmt: skip
    return self.add(prepare.TOKENS, inputs)

  @property
  def bm25(self) -> Ref:
    """The BM25 index of the corpus."""
    return self.add(prepare.BM25, prepare.Bm25Inputs(corpus=self.corpus))

  def dev(self) -> DevInput | None:
    """The trial of a retriever on dev."""
    name, settings = self.settings.data.dev_split, self.settings.train
    if not name or self.settings.data.format == "text":
      return None
    return DevInput(split=self.split(name), name=name, queries=self.tokens(name), corpus=self.tokens(),
                    num_queries=settings.evaluate_queries, num_passages=settings.evaluate_passages)  # fmt: skip

  def pair_dev(self) -> PairDevInput | None:
    """The trial of a cross-encoder on dev."""
    name, settings = self.settings.data.dev_split, self.settings.cross
    if not name or not settings.evaluate_every:
      return None
    return PairDevInput(split=self.split(name), name=name, queries=self.tokens(name), corpus=self.tokens(),
                        bm25=self.bm25, num_queries=settings.evaluate_queries,
                        num_passages=settings.evaluate_passages)  # fmt: skip

  # Retrievers, vectors, runs.

  def retriever(self, system: System) -> RetrieverInput:
    """A dense system as an input."""
    if system.kind == "saved":
      saved = self._outside.files(remote.staged(system.directory), retrievers.saved_files(system.directory))
      return RetrieverInput(kind="saved", saved=Files(hashes=saved.hashes, directory=system.directory),
                            backbone=self._unhashed(system.directory))  # fmt: skip
    if system.kind == "trained":
      tuned = self.settings.prompt.kind == "none"
      return RetrieverInput(kind="trained", trained=self.trained[system.number],
                            backbone=None if tuned else self.pretrained)  # fmt: skip
    vector = self.settings.vector.model_copy(update={"pooling": system.pooling})
    backbone = self.pretrained if system.pretrained or not self.settings.pretrain.enabled else self.base
    return RetrieverInput(kind="untuned", backbone=backbone, vector=vector)

  def _unhashed(self, saved: str) -> BackboneInput | None:
    """config.json of the backbone of a saved retriever of format 1, which has the hash of its tensors alone."""
    named = retrievers.saved_backbone(saved)
    if named is None or named.get("hash_format", 1) > 1:
      return None
    directory = backbones.locate(backbones.find_named(remote.staged(saved), named))
    return BackboneInput(files=self._outside.files(directory, [directory / "config.json"]))

  def encoding(self) -> encode.Encoding:
    settings = self.settings.encode
    return encode.Encoding(dtype=settings.dtype, batch_tokens=settings.batch_tokens,
                           shard_passages=settings.shard_passages)  # fmt: skip

  def vectors(self, made: RetrieverInput, split: str = "") -> Ref:
    """Vectors of the corpus or of a split's queries."""
    settings = self.settings.text
    inputs = encode.VectorsInputs(
      retriever=made, text=self.split(split) if split else self.corpus, split=split,
      tokens=None if made.kind == "saved" else self.tokens(split), compute=self.compute, encoding=self.encoding(),
      limit=settings.query_length if split else settings.passage_length,
    )  # fmt: skip
    return self.add(encode.VECTORS, inputs)

  def dense_run(self, queries: Ref, passages: Ref, depth: int) -> Ref:
    settings, index = self.settings.index, None
    if settings.backend == "faiss" and settings.factory != "Flat":
      built = encode.IndexInputs(passages=passages, factory=settings.factory, sample=settings.sample)
      index = self.add(encode.INDEX, built)
    return self.add(encode.DENSE_RUN, encode.DenseRunInputs(queries=queries, passages=passages, index=index,
                                                            search=search_of(self.settings), depth=depth))  # fmt: skip

  def bm25_run(self, split: str, depth: int) -> Ref:
    inputs = encode.Bm25RunInputs(bm25=self.bm25, split=self.split(split), name=split, depth=depth)
    return self.add(encode.BM25_RUN, inputs)


def search_of(settings: Settings) -> encode.Search:
  """How vectors are searched; on the host the devices' dtype does not matter, and the other way round."""
  index = settings.index
  dtype = index.device_dtype if index.backend == "devices" else ""
  return encode.Search(backend=index.backend, parameters=index.search_parameters, device_dtype=dtype)
