"""The architecture of an encoder, read from config.json: BERT, RoBERTa (XLM-R, CamemBERT) and DeBERTa v1."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError

FAMILIES = {
  "bert": "bert",
  "roberta": "roberta",
  "xlm-roberta": "roberta",
  "camembert": "roberta",
  "deberta": "deberta",
}
ACTIVATIONS = ("gelu", "gelu_new", "relu")

# Required fields: our name, config.json's name.
_REQUIRED = {
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "intermediate_size": "intermediate_size",
  "max_positions": "max_position_embeddings",
}
# Optional fields, and transformers' defaults for each family.
_OPTIONAL = {
  "layer_norm_eps": "layer_norm_eps",
  "activation": "hidden_act",
  "hidden_dropout": "hidden_dropout_prob",
  "attention_dropout": "attention_probs_dropout_prob",
  "initializer_range": "initializer_range",
  "type_vocab_size": "type_vocab_size",
  "pad_id": "pad_token_id",
}
_DEFAULTS = {
  "bert": {"type_vocab_size": 2, "pad_id": 0},
  "roberta": {"type_vocab_size": 2, "pad_id": 1},
  "deberta": {"type_vocab_size": 0, "pad_id": 0, "layer_norm_eps": 1e-7},
}
# Options that change vectors and are not implemented. config.json may name them with a false value.
_UNSUPPORTED = {
  "is_decoder": "causal attention",
  "add_cross_attention": "cross-attention",
  "alibi_starting_size": "ALiBi positions",
  "rotary_emb_fraction": "rotary positions",
  "rope_theta": "rotary positions",
  "talking_head": "DeBERTa's talking heads",
}
# Fields that matter in training only.
_TRAINING_FIELDS = ("hidden_dropout", "attention_dropout", "initializer_range")
_MODEL_CLASS = {"bert": "BertModel", "roberta": "RobertaModel", "deberta": "DebertaModel"}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """The architecture of an encoder. Sizes are counts, dropout rates are probabilities."""

  family: str  # 'bert', 'roberta' or 'deberta'
  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  intermediate_size: int
  max_positions: int  # rows of the position table
  type_vocab_size: int = 2
  pad_id: int = 0
  layer_norm_eps: float = 1e-12
  activation: str = "gelu"
  hidden_dropout: float = 0.1
  attention_dropout: float = 0.1
  initializer_range: float = 0.02
  # DeBERTa only: largest relative position, which position scores are added, whether absolute positions are added too.
  max_relative_positions: int = 0
  pos_att_type: tuple[str, ...] = ()
  position_biased_input: bool = True

  def __post_init__(self):
    if self.hidden_size % self.num_heads:
      raise InputError(
        f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_heads}",
        fix="Check the backbone's config.json",
      )
    if self.activation not in ACTIVATIONS:
      raise InputError("unknown hidden_act", value=self.activation, fix=f"Known: {', '.join(ACTIVATIONS)}")

  @property
  def head_size(self) -> int:
    """D, the width of one attention head."""
    return self.hidden_size // self.num_heads

  @property
  def first_position(self) -> int:
    """The row of the position table for the first token: RoBERTa's positions start after the padding id."""
    return self.pad_id + 1 if self.family == "roberta" else 0

  @property
  def has_positions(self) -> bool:
    """Whether the embedding layer adds absolute positions (DeBERTa mostly does not)."""
    return self.family != "deberta" or self.position_biased_input

  @classmethod
  def from_file(cls, path: str | os.PathLike) -> EncoderConfig:
    """Reads a config.json."""
    values = files.read_json(path)
    if not isinstance(values, dict):
      raise InputError("a JSON object was expected", path=path)
    return cls.from_dict(values, source=path)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any], source: str | os.PathLike | None = None) -> EncoderConfig:
    """Reads the fields of a config.json; errors name the file `source`.

    Raises:
      InputError: an unsupported architecture or option, or a field that is missing or of the wrong type.
    """
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
      raise InputError(
        "this model_type is not supported", path=source, value=model_type,
        fix=f"Supported: {', '.join(FAMILIES)} (DeBERTa's first version only)",
      )  # fmt: skip
    family = FAMILIES[model_type]
    _check_supported(values, source)
    fields: dict[str, Any] = {"family": family}
    for ours, theirs in _REQUIRED.items():
      if not isinstance(values.get(theirs), int) or values[theirs] < 1:
        raise InputError(f"{theirs} must be a positive whole number", path=source, value=values.get(theirs))
      fields[ours] = values[theirs]
    fields |= _DEFAULTS[family]
    fields |= _optional_fields(values, source)
    if family == "deberta":
      fields |= _deberta_fields(values, source)
    try:
      return cls(**fields)
    except InputError as error:
      raise InputError(str(error), path=source) from error

  def identity(self) -> dict[str, Any]:
    """Everything here that can change vectors when the tensors stay the same, as plain JSON values.

    A backbone's hash covers it. Every field counts unless it matters in training only. A new field therefore changes
    all hashes; leave it out at its default if old vectors do not change.
    """
    fields = dataclasses.asdict(self)
    for name in _TRAINING_FIELDS:
      del fields[name]
    return fields | {"pos_att_type": sorted(self.pos_att_type), "first_position": self.first_position}

  def to_dict(self) -> dict[str, Any]:
    """The fields of a config.json that transformers loads as this encoder."""
    fields: dict[str, Any] = {"model_type": self.family, "architectures": [_MODEL_CLASS[self.family]]}
    fields |= {theirs: getattr(self, ours) for ours, theirs in (_REQUIRED | _OPTIONAL).items()}
    if self.family == "deberta":
      fields |= {
        "relative_attention": bool(self.pos_att_type),
        "max_relative_positions": self.max_relative_positions,
        "pos_att_type": list(self.pos_att_type),
        "position_biased_input": self.position_biased_input,
      }
    return fields


def _check_supported(values: Mapping[str, Any], source: str | os.PathLike | None) -> None:
  positions = values.get("position_embedding_type") or "absolute"
  if positions != "absolute":
    raise InputError("only absolute positions are supported", path=source, value=positions)
  for name, what in _UNSUPPORTED.items():
    if values.get(name):
      raise InputError(f"{what} ({name}) is not supported", path=source, value=values[name])


def _optional_fields(values: Mapping[str, Any], source: str | os.PathLike | None) -> dict[str, Any]:
  fields = {}
  for ours, theirs in _OPTIONAL.items():
    value = values.get(theirs)
    if value is None:
      continue
    wanted = str if ours == "activation" else int if ours in ("type_vocab_size", "pad_id") else int | float
    if not isinstance(value, wanted):
      raise InputError(f"{theirs} has the wrong type", path=source, value=value)
    fields[ours] = value
  return fields


def _deberta_fields(values: Mapping[str, Any], source: str | os.PathLike | None) -> dict[str, Any]:
  if values.get("embedding_size", values["hidden_size"]) != values["hidden_size"]:
    raise InputError("an embedding_size other than hidden_size is not supported", path=source)
  largest = values.get("max_relative_positions", -1)
  types = values.get("pos_att_type") or () if values.get("relative_attention", False) else ()
  types = types.split("|") if isinstance(types, str) else types
  types = tuple(name.strip().lower() for name in types)
  if unknown := set(types) - {"c2p", "p2c", "p2p"}:
    raise InputError("unknown pos_att_type", path=source, value=sorted(unknown), fix="Known: c2p, p2c, p2p")
  return {
    "max_relative_positions": values["max_position_embeddings"] if largest < 1 else largest,
    "pos_att_type": types,
    "position_biased_input": values.get("position_biased_input", True),
  }
