"""Every setting, declared once: type, default, range or choices, unit, source, one line.

From these declarations come the `ConfigDict` of configs/base.py, the checks of single fields, the keys of artefacts and
docs/configuration.md. Rules that concern several fields stand in `pipeline/rules.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pydantic
from ml_collections import ConfigDict

from dptdr_jax.core.errors import InputError


def field(default: Any, says: str, *, unit: str = "", source: str = "", neutral: bool = False, **limits: Any) -> Any:
  """Declares a setting.

  Args:
    default: its value where nothing is said.
    says: one line for people.
    unit: of its value.
    source: where the default comes from.
    neutral: it changes rounding or speed, but no result: keys leave it out.
    limits: of its value, as pydantic names them (ge, gt, le, lt).
  """
  extra = {"neutral": neutral, "unit": unit, "source": source}
  return pydantic.Field(default, description=says, json_schema_extra=extra, **limits)


class Section(pydantic.BaseModel):
  """A group of settings."""

  model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


def _dropout(value: float) -> float:
  if value != -1 and not 0 <= value < 1:
    raise ValueError("must be -1, or at least 0 and below 1")
  return value


Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Names = tuple[str, ...]
Remat = Literal["none", "attention", "layer"]


class Optimization(Section):
  """What the three trainings share."""

  steps: int = field(0, "optimiser steps; 0: from epochs", ge=0)
  epochs: Finite = field(10.0, "passes over the training queries; ignored where steps > 0", ge=0)
  learning_rate: Finite = field(7e-3, "peak", ge=0, source="the paper; some hundred steps want 2e-2 and more")
  schedule: Literal["linear", "cosine", "constant"] = field("linear", "decay after the warm-up", source="the paper")
  warmup: Finite = field(0.1, "share of the steps; from 1 on their number, which needs steps > 0", ge=0)
  weight_decay: Finite = field(0.0, "AdamW's; not on biases and norms", ge=0)
  clip: Finite = field(1.0, "largest norm of the gradient; 0: no limit", ge=0)
  checkpoint_every: int = field(500, "between two checkpoints", ge=1, unit="steps", neutral=True)
  evaluate_every: int = field(500, "between two trials on dev; the best is kept. 0: the last", ge=0, unit="steps")


class Backbone(Section):
  """The model that is frozen."""

  path: str = field("", "hub id, local directory in Hugging Face layout, or 'package:NAME'", neutral=True)
  sha256: str = field("", "of its model.safetensors; checked when given", neutral=True)
  dropout: Annotated[float, pydantic.AfterValidator(_dropout)] = field(
    -1.0, "the backbone's own in every training; -1: as config.json says", source="the original: on"
  )


class Data(Section):
  """Corpus, queries and judgements."""

  format: Literal["beir", "msmarco", "nq", "text"] = field(
    "beir", "layout of the files; 'text': passages without queries, for pretraining alone"
  )
  dir: str = field("", "folder of the files, or a URL", neutral=True)
  download: bool = field(False, "msmarco, nq: fetch the official files into dir, checksums verified", neutral=True)
  empty_text: Literal["title", "keep", "error"] = field("title", "beir: what a passage without text becomes")
  title_augmented: bool = field(False, "msmarco: join para.title.txt", source="the paper's corpus")
  train_split: str = field("train", "split with the training judgements")
  dev_split: str = field("dev", "split that chooses checkpoints; '': none")
  max_stored_tokens: int = field(512, "of a text in the token store; training and encoding cut further", ge=1,
                                 unit="tokens")  # fmt: skip


class Text(Section):
  """How texts become tokens."""

  query_length: int = field(32, "longest query, special tokens included", ge=3, unit="tokens", source="the paper")
  passage_length: int = field(128, "longest passage, special tokens included", ge=3, unit="tokens", source="the paper")
  separator: str = field(" ", "between title and text; RoBERTa's original recipe: '</s>'")
  query_template: str = field("{text}", "E5: 'query: {text}'")
  passage_template: str = field("{title}{separator}{text}", "E5: 'passage: {title}{separator}{text}'")


class Vector(Section):
  """How a text's vector is read and compared, in pretraining too."""

  pooling: Literal["first", "mean"] = field(
    "first", "'first' token or 'mean' over tokens", source="the original: first"
  )
  normalize: bool = field(False, "vectors of length 1")
  temperature: Finite = field(1.0, "the loss divides scores by it; about .05 with normalize", gt=0)


class Shape(Section):
  """The RoBERTa that `pretrain.tokenizer=train` begins with."""

  hidden_size: int = field(384, "width of the vectors", ge=1)
  num_layers: int = field(6, "layers", ge=1)
  num_heads: int = field(6, "attention heads", ge=1)
  intermediate_size: int = field(1536, "width inside a layer", ge=1)
  max_positions: int = field(514, "rows of the position table", ge=1)


class Pretrain(Optimization):
  """RIP: the whole backbone on the corpus, without labels, before it is frozen."""

  enabled: bool = field(False, "pretrain the backbone")
  corpora: Names = field(("data",), "'data' (this run's), text or JSONL files, workdirs of other runs")
  tokenizer: Literal["backbone", "train"] = field("backbone", "'train': a new tokenizer and a random RoBERTa")
  vocabulary: int = field(30_000, "ids of a new tokenizer (byte-level BPE)", ge=1)
  shape: Shape = Shape()
  spans: int = field(2048, "a step, over all devices; two a passage", source="coCondenser")
  span_tokens: int = field(128, "longest span, special tokens included", unit="tokens", source="coCondenser")
  short_share: Finite = field(0.1, "of spans that aim at a random shorter length", ge=0, le=1, source="coCondenser")
  overlap: bool = field(False, "spans of a passage may overlap", source="Contriever; wants passages longer than spans")
  neighbours: int = field(1, "passages drawn in a row, where the corpus' order means something", ge=1)
  contrast_weight: Finite = field(1.0, "of the contrast between spans; 0: none", ge=0)
  mlm_weight: Finite = field(1.0, "of masked language modelling; 0: none", ge=0)
  chunk: int = field(0, "spans a device at a time (gradient cache); 0: all at once", ge=0, neutral=True)
  remat: Remat = field("none", "what the backward pass computes again to save memory", neutral=True)
  epochs: Finite = field(8.0, "passes over the corpora; ignored where steps > 0", ge=0, source="coCondenser")
  learning_rate: Finite = field(1e-4, "peak", ge=0, source="coCondenser")
  weight_decay: Finite = field(0.01, "AdamW's; not on biases and norms", ge=0, source="coCondenser")
  checkpoint_every: int = field(1000, "between two checkpoints", ge=1, unit="steps", neutral=True)
  evaluate_every: int = field(1000, "between two trials on dev, which choose nothing; 0: none", ge=0, unit="steps")


class Prompt(Section):
  """What is trained for a task."""

  kind: Literal["deep", "shallow", "none"] = field(
    "deep", "'deep': keys and values in every layer; 'shallow': at the embeddings; 'none': all weights"
  )
  length: int = field(32, "prompt vectors a layer (P)", ge=0)
  projection: Literal["none", "mlp", "lstm"] = field("none", "between table and prompt; shallow prompts also 'lstm'")
  projection_size: int = field(512, "width inside the projection", ge=0)
  tied: bool = field(True, "one prompt for queries and passages", source="the paper: MS MARCO tied, NQ untied")
  position_shift: int = field(-1, "tokens' positions start so much later; -1: the prompt's length", ge=-1,
                              source="the original: -1")  # fmt: skip
  dropout: Finite = field(0.1, "on the prompt's keys and values, by example", ge=0, lt=1, source="the original")
  init: Literal["normal", "words"] = field(
    "normal", "'normal': N(0, .02); 'words': the frozen layers' keys and values of frequent words"
  )


class Train(Optimization):
  """Training of a round's retriever."""

  queries: int = field(64, "a step, over all devices", ge=1, source="the paper")
  passages: int = field(2, "a query: its positive and passages - 1 negatives; 1: in-batch negatives alone", ge=1)
  positive: Literal["rotate", "first"] = field("rotate", "'rotate' with the epoch, or always the 'first'")
  negatives: Literal["source", "bm25", "random"] = field("source", "of round 1; 'source': those of the data")
  sampling: Literal["window", "random", "top", "simans"] = field(
    "window", "of negatives in an epoch; 'simans': by score", source="the original: window"
  )
  sample_last: int = field(0, "only a query's best so many negatives; 0: all", ge=0)
  simans_source: str = field("dense", "whose scores SimANS draws by: 'bm25', 'dense', another source's name")
  simans_a: Finite = field(0.5, "SimANS' sharpness; 200 where scores are cosines", ge=0, unit="1 / score²")
  simans_b: Finite = field(0.0, "SimANS' shift", unit="score")
  refresh_every: int = field(0, "re-mine every N steps while training continues; 0: off", ge=0, source="ANCE")
  query_chunk: int = field(0, "queries a device at a time (gradient cache); 0: all at once", ge=0, neutral=True)
  passage_chunk: int = field(0, "passages a device at a time (gradient cache); 0: all at once", ge=0, neutral=True)
  remat: Remat = field("none", "what the backward pass computes again to save memory", neutral=True)
  both_directions: bool = field(False, "also contrast each passage's query with the others")
  evaluate_passages: int = field(4096, "of the dev trial: the judged ones, filled up at random", ge=1)
  evaluate_queries: int = field(512, "of the dev trial", ge=1)


class MineBm25(Section):
  """BM25 as a source of negatives."""

  depth: int = field(100, "ranks that are candidates; 0: not asked", ge=0)
  first: int = field(0, "best ranks that are skipped: false negatives stand there", ge=0)
  relative_margin: Finite = field(0.0, "drop what scores above this share of the positive's score; 0: off", ge=0)


class MineDense(MineBm25):
  """The retriever of the round before as a source of negatives."""

  depth: int = field(200, "ranks that are candidates; 0: not asked", ge=0, source="Tevatron")


class Mine(Section):
  """UNM: the negatives of several sources in one pool, without false ones."""

  bm25: MineBm25 = MineBm25()
  dense: MineDense = MineDense()
  sources: tuple[Literal["bm25", "dense", "runs"], ...] = field(
    ("bm25", "dense", "runs"), "of pools between two rounds; ignored before round 1"
  )
  runs: Names = field((), "TREC run files of other retrievers over the training queries", neutral=True)
  runs_depth: int = field(200, "ranks of each run file that are candidates; 0: not used", ge=0)
  runs_first: int = field(0, "best ranks of run files that are skipped", ge=0)
  runs_relative_margin: Finite = field(0.0, "as relative_margin, for run files; 0: off", ge=0)
  same_text: bool = field(True, "drop what equals a positive's text, or contains one of 40 characters or more")
  cross_encoder: bool = field(False, "keep only what the cross-encoder is sure of", source="RocketQA")
  negative_below: Finite = field(0.1, "probability below which a candidate stays", ge=0, le=1, source="RocketQA")
  positive_above: Finite = field(0.9, "and above which it is a pseudo-positive", ge=0, le=1, source="RocketQA")
  pseudo_positives: bool = field(False, "train on pseudo-positives as on judged ones")


class Cross(Optimization):
  """The cross-encoder: prompts and a head on the same backbone."""

  enabled: bool = field(False, "train one; it reranks, and denoises with mine.cross_encoder")
  negatives: Literal["source", "bm25", "random"] = field("bm25", "as train.negatives")
  sample_last: int = field(0, "only a query's best so many negatives; 0: all", ge=0)
  queries: int = field(32, "a step, over all devices", ge=1)
  passages: int = field(4, "a query: its positive and passages - 1 negatives; both classes weigh the same", ge=2)
  pair_length: int = field(160, "query and passage together, special tokens included", ge=1, unit="tokens")
  length: int = field(32, "prompt vectors a layer, of its own deep prompt; prompt.init holds too", ge=1)
  head: Literal["match", "first"] = field("match", "'match': token vectors compared, besides token 0; 'first': token 0")
  chunk: int = field(0, "pairs a device at a time; 0: all at once", ge=0, neutral=True)
  epochs: Finite = field(2.0, "passes over the training queries; ignored where steps > 0", ge=0)
  evaluate_queries: int = field(128, "of the dev trial", ge=1)
  evaluate_passages: int = field(16, "of the dev trial, a query: a positive and BM25's best others", ge=2)
  depth: int = field(50, "candidates of a training query that are scored for denoising", ge=1, source="RocketQA")
  rerank: int = field(100, "passages of the last retriever that are ranked again in evaluation", ge=1)


class Encode(Section):
  """Vectors of corpus and queries."""

  batch_tokens: int = field(0, "a device encodes at a time, padding included; 0: 2,048 on a CPU, 16,384 on others",
                            ge=0, unit="tokens", neutral=True)  # fmt: skip
  shard_passages: int = field(100_000, "a shard; a killed run goes on at the next", ge=1, neutral=True)
  dtype: Literal["float32", "float16"] = field("float32", "of stored vectors")


class Index(Section):
  """Search in vectors, by inner product."""

  backend: Literal["faiss", "devices"] = field("faiss", "on the host, or exact on all local accelerators")
  factory: str = field("Flat", "FAISS index: 'Flat' (exact), 'IVF4096,Flat', 'HNSW32', …")
  sample: int = field(262_144, "vectors that an index trains on", ge=1)
  search_parameters: str = field("", "FAISS parameters of the search: 'nprobe=64' or 'efSearch=128'")
  device_dtype: Literal["float32", "bfloat16"] = field(
    "float32", "devices: 'bfloat16' halves the memory; the best are scored again in float32"
  )


class Evaluate(Section):
  """What is measured."""

  splits: Names = field(("dev",), "judged splits to report")
  measures: Names = field(("RR@10", "R@20", "R@50", "R@100", "R@1000", "nDCG@10"), "ir-measures' names")
  answers: bool = field(False, "Success@k counts passages with an answer in them (NQ), not judged ones")
  graded_splits: Names = field((), "splits in which grades from 2 on are relevant (TREC Deep Learning)")
  depth: int = field(1000, "passages a query in the run files", ge=1)
  baselines: tuple[Literal["bm25", "backbone"], ...] = field(
    ("bm25", "backbone"), "BM25 (k1 .9, b .4, stemmed); the untuned backbone, before and after pretraining"
  )
  retrievers: Names = field((), "saved retrievers, each 'NAME=DIR': of any run, or a checkpoint of the original",
                            neutral=True)  # fmt: skip
  other_poolings: tuple[Literal["first", "mean"], ...] = field((), "baselines of the backbone with these too")


class Settings(Section):
  """A whole run."""

  seed: int = field(0, "of everything random: prompts, order of examples, negatives, dropout", ge=0)
  rounds: int = field(1, "of training, negatives mined between two; 0: measure only", ge=0, source="the paper: 2")
  fsdp: int = field(1, "devices over which weights are split; all devices split the batch", ge=1, neutral=True)
  compute_dtype: Literal["auto", "float32", "bfloat16"] = field(
    "auto", "of matrix products; 'auto': bfloat16 on accelerators, float32 on a CPU"
  )
  wait_seconds: Finite = field(86_400.0, "how long a process waits for the others", gt=0, unit="s", neutral=True)
  log_every: int = field(10, "between two lines of metrics.jsonl", ge=1, unit="steps", neutral=True)
  backbone: Backbone = Backbone()
  data: Data = Data()
  text: Text = Text()
  vector: Vector = Vector()
  pretrain: Pretrain = Pretrain()
  prompt: Prompt = Prompt()
  train: Train = Train()
  mine: Mine = Mine()
  cross: Cross = Cross()
  encode: Encode = Encode()
  index: Index = Index()
  evaluate: Evaluate = Evaluate()

  @classmethod
  def of(cls, config: ConfigDict) -> Settings:
    """The settings that a ConfigDict holds.

    Raises:
      InputError: a field that does not exist, or a value that it cannot have.
    """
    try:
      return cls.model_validate(config.to_dict())
    except pydantic.ValidationError as error:
      raise _told(error) from None

  def get(self, name: str) -> Any:
    """The value of 'section.field'."""
    value: Any = self
    for part in name.split("."):
      value = getattr(value, part)
    return value

  def replace(self, **values: Any) -> Settings:
    """The settings with other values, by name: replace(**{'train.steps': 100}).

    Raises:
      InputError: as `of`.
    """
    plain = self.model_dump()
    for name, value in values.items():
      *sections, last = name.split(".")
      place = plain
      for section in sections:
        place = place.get(section) if isinstance(place, dict) else None
      if not isinstance(place, dict) or last not in place:
        raise InputError("no such setting", value=name, fix="docs/configuration.md lists all")
      place[last] = value
    try:
      return type(self).model_validate(plain)
    except pydantic.ValidationError as error:
      raise _told(error) from None


def config_dict() -> ConfigDict:
  """All defaults: what configs/base.py gives."""
  return ConfigDict(Settings().model_dump())


def declared(model: type[Section] = Settings, prefix: str = "") -> Iterator[tuple[str, pydantic.fields.FieldInfo]]:
  """Yields (name, declaration) of every setting, in order."""
  for name, info in model.model_fields.items():
    if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
      yield from declared(info.annotation, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", info


def _told(error: pydantic.ValidationError) -> InputError:
  """The first thing that is wrong, in our words."""
  first = error.errors(include_url=False)[0]
  name = ".".join(str(part) for part in first["loc"])
  limits = {"greater_than_equal": ("at least", "ge"), "greater_than": ("above", "gt"),
            "less_than_equal": ("at most", "le"), "less_than": ("below", "lt")}  # fmt: skip
  context = first.get("ctx", {})
  if first["type"] in limits:
    word, limit = limits[first["type"]]
    return InputError(f"{name} must be {word} {context[limit]:g}", value=first["input"])
  if first["type"] == "literal_error":
    return InputError(f"unknown {name}", value=first["input"], fix=f"Use {context['expected']}".replace("'", ""))
  if first["type"] == "extra_forbidden":
    return InputError("no such setting", value=name, fix="docs/configuration.md lists all")
  what = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
  return InputError(f"{name} {what}", value=first["input"])
