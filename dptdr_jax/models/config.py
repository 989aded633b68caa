"""The shape of an encoder, read from Hugging Face's config.json: BERT, RoBERTa (XLM-R, CamemBERT) and DeBERTa v1."""

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

# config.json's name of every field that must be there.
_REQUIRED = {
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "intermediate_size": "intermediate_size",
  "max_positions": "max_position_embeddings",
}
# The same for those that config.json may leave out, with transformers' defaults for the family.
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
_MODEL_CLASS = {"bert": "BertModel", "roberta": "RobertaModel", "deberta": "DebertaModel"}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """The shape of an encoder: sizes are counts, dropout rates are probabilities; read by `from_file`."""

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
  # DeBERTa only: the reach of relative positions, which biases it adds, whether tokens get absolute positions too.
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
    """The row of the position table that a first token reads: RoBERTa's stand behind the padding id."""
    return self.pad_id + 1 if self.family == "roberta" else 0

  @property
  def has_positions(self) -> bool:
    """Whether the embedding layer adds absolute positions (DeBERTa mostly does not)."""
    return self.family != "deberta" or self.position_biased_input

  @classmethod
  def from_file(cls, path: str | os.PathLike) -> EncoderConfig:
    """Reads a config.json."""
    return cls.from_dict(files.read_json(path), source=path)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any], source: str | os.PathLike | None = None) -> EncoderConfig:
    """Takes the fields of a config.json; `source` is the file that errors name.

    Raises:
      InputError: an architecture or an option of it that is not covered, or a field that is missing or no number.
    """
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
      raise InputError(
        "this model_type is not supported", path=source, value=model_type,
        fix=f"Supported: {', '.join(FAMILIES)} (DeBERTa's first version only)",
      )  # fmt: skip
    family = FAMILIES[model_type]
    if values.get("position_embedding_type", "absolute") not in ("absolute", None):
      raise InputError("only absolute positions are supported", path=source, value=values["position_embedding_type"])
    fields: dict[str, Any] = {"family": family}
    for ours, theirs in _REQUIRED.items():
      if not isinstance(values.get(theirs), int) or values[theirs] < 1:
        raise InputError(f"{theirs} must be a positive whole number", path=source, value=values.get(theirs))
      fields[ours] = values[theirs]
    fields |= _DEFAULTS[family]
    fields |= {ours: values[theirs] for ours, theirs in _OPTIONAL.items() if values.get(theirs) is not None}
    if family == "deberta":
      fields |= _deberta_fields(values, source)
    try:
      return cls(**fields)
    except InputError as error:
      raise InputError(str(error), path=source) from error

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


def _deberta_fields(values: Mapping[str, Any], source: str | os.PathLike | None) -> dict[str, Any]:
  if values.get("talking_head"):
    raise InputError("DeBERTa's talking_head is not supported", path=source)
  if values.get("embedding_size", values["hidden_size"]) != values["hidden_size"]:
    raise InputError("an embedding_size other than hidden_size is not supported", path=source)
  reach = values.get("max_relative_positions", -1)
  types = values.get("pos_att_type") or () if values.get("relative_attention", False) else ()
  types = types.split("|") if isinstance(types, str) else types
  types = tuple(name.strip().lower() for name in types)
  if unknown := set(types) - {"c2p", "p2c", "p2p"}:
    raise InputError("unknown pos_att_type", path=source, value=sorted(unknown), fix="Known: c2p, p2c, p2p")
  return {
    "max_relative_positions": values["max_position_embeddings"] if reach < 1 else reach,
    "pos_att_type": types,
    "position_biased_input": values.get("position_biased_input", True),
  }
