"""Bad configurations, weights and lengths: errors name the file and what is wrong."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError
from dptdr_jax.models import convert, prompts
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.models.represent import represent

VALUES = {
  "model_type": "bert",
  "vocab_size": 20,
  "hidden_size": 8,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 16,
  "max_position_embeddings": 24,
}
CONFIG = EncoderConfig.from_dict(VALUES)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "deberta-v2"}, "model_type is not supported: 'deberta-v2'"),
    ({"model_type": None}, "model_type is not supported"),
    ({"position_embedding_type": "relative_key"}, "absolute positions"),
    ({"is_decoder": True}, "causal attention .is_decoder. is not supported"),
    ({"alibi_starting_size": 512}, "ALiBi"),
    ({"rotary_emb_fraction": 1.0}, "rotary"),
    ({"layer_norm_eps": "1e-5"}, "layer_norm_eps has the wrong type: '1e-5'"),
    ({"hidden_size": None}, "hidden_size must be"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
    ({"num_attention_heads": 3}, "not a multiple"),
    ({"hidden_act": "swiglu"}, "unknown hidden_act: 'swiglu'"),
    ({"model_type": "deberta", "talking_head": True}, "talking heads"),
    ({"model_type": "deberta", "embedding_size": 4}, "embedding_size"),
    ({"model_type": "deberta", "relative_attention": True, "pos_att_type": "c2p|x2p"}, "pos_att_type"),
  ],
)
def test_unsupported_configuration_is_refused_with_the_file_and_the_field(change, message, tmp_path):
  files.write_json(tmp_path / "config.json", VALUES | change)
  with pytest.raises(InputError, match=message) as error:
    EncoderConfig.from_file(tmp_path / "config.json")
  assert str(tmp_path / "config.json") in str(error.value)


def test_config_reads_families_and_defaults():
  assert (CONFIG.first_position, CONFIG.layer_norm_eps, CONFIG.head_size) == (0, 1e-12, 4)
  roberta = EncoderConfig.from_dict(VALUES | {"model_type": "xlm-roberta", "layer_norm_eps": 1e-5})
  assert (roberta.family, roberta.first_position, roberta.layer_norm_eps) == ("roberta", 2, 1e-5)
  deberta = EncoderConfig.from_dict(
    VALUES | {"model_type": "deberta", "relative_attention": True, "pos_att_type": "c2p|p2c"}
  )
  assert (deberta.pos_att_type, deberta.max_relative_positions) == (("c2p", "p2c"), 24)


@pytest.mark.parametrize(
  "fields",
  [
    {"kind": "soft", "length": 3},
    {"kind": "deep", "length": 0},
    {"kind": "none", "length": 3},
    {"kind": "deep", "length": 3, "projection": "lstm", "projection_size": 4},
    {"kind": "deep", "length": 3, "projection": "mlp"},
    {"kind": "shallow", "length": 3, "position_shift": 3},
    {"kind": "deep", "length": 3, "dropout": 1.0},
    {"kind": "deep", "length": 3, "projection": "mlp", "projection_size": 4, "init": "words"},
  ],
)
def test_impossible_prompt_fields_are_refused(fields):
  with pytest.raises(InputError, match="prompt"):
    PromptSpec(**fields)


def test_prompt_fields_of_earlier_versions_are_ignored_and_unknown_ones_refused():
  former = {"kind": "deep", "length": 3, "dropout_per": "batch", "init_scale": 0.5}
  assert PromptSpec.from_dict(former) == PromptSpec("deep", 3)
  with pytest.raises(TypeError, match="other"):
    PromptSpec.from_dict({"kind": "deep", "length": 3, "other": 1})


def test_identity_changes_with_every_option_that_changes_vectors():
  changes = [
    {"model_type": "roberta"}, {"hidden_act": "relu"}, {"num_attention_heads": 4}, {"layer_norm_eps": 1e-5},
    {"model_type": "roberta", "pad_token_id": 2}, {"model_type": "deberta"},
    {"model_type": "deberta", "relative_attention": True, "pos_att_type": "c2p"},
    {"model_type": "deberta", "relative_attention": True, "pos_att_type": "c2p", "max_relative_positions": 8},
    {"model_type": "deberta", "position_biased_input": False},
  ]  # fmt: skip
  identities = [EncoderConfig.from_dict(VALUES | change).identity() for change in [{}, *changes]]
  assert len({json.dumps(identity, sort_keys=True) for identity in identities}) == len(identities)
  training = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
  assert EncoderConfig.from_dict(VALUES | training).identity() == identities[0]


@pytest.mark.parametrize(
  ("family", "spec", "longest"),
  [
    ("bert", PromptSpec("none"), 24),
    ("bert", PromptSpec("deep", 5, position_shift=5), 19),
    ("bert", PromptSpec("deep", 5), 24),
    ("roberta", PromptSpec("deep", 5, position_shift=5), 17),
    ("roberta", PromptSpec("shallow", 5), 17),
  ],
)
def test_texts_longer_than_the_position_table_are_refused(family, spec, longest):
  config = EncoderConfig.from_dict(VALUES | {"model_type": family, "pad_token_id": 1 if family == "roberta" else 0})
  assert prompts.longest_input(config, spec) == longest
  prompts.check_lengths(config, spec, longest)
  with pytest.raises(InputError, match=f"largest length that fits is {longest}"):
    prompts.check_lengths(config, spec, longest + 1)
  params = convert.init_params(jax.random.key(0), config)
  prompt = prompts.init_prompt(jax.random.key(0), spec, config)
  tokens = np.full((1, longest + 1), 3, np.int32)
  with pytest.raises(InputError, match="positions"):
    represent(config, spec, params, prompt, tokens, np.array([2], np.int32), pooling="first", normalize=False)


def test_deberta_supports_deep_prompts_only():
  config = EncoderConfig.from_dict(VALUES | {"model_type": "deberta"})
  with pytest.raises(InputError, match="deep prompts only"):
    prompts.init_prompt(jax.random.key(0), PromptSpec("shallow", 3), config)


@pytest.fixture
def tensors():
  return convert.to_huggingface(convert.init_params(jax.random.key(0), CONFIG), CONFIG)


def test_missing_unknown_and_misshaped_tensors_are_refused(tensors):
  name = "encoder.layer.1.output.dense.weight"
  unused = {"pooler.dense.bias": np.zeros(8), "cls.predictions.bias": np.zeros(20)}
  convert.from_huggingface(tensors | unused, CONFIG)
  convert.from_huggingface({f"bert.{name}": array for name, array in tensors.items()}, CONFIG)
  with pytest.raises(InputError, match=f"here: tensor {name} is missing"):
    convert.from_huggingface({k: v for k, v in tensors.items() if k != name}, CONFIG, source="here")
  with pytest.raises(InputError, match=rf"tensor {name} has shape \(16, 8\), expected \(8, 16\)"):
    convert.from_huggingface(tensors | {name: tensors[name].T}, CONFIG)
  with pytest.raises(InputError, match="encoder.layer.2.output.dense.bias"):
    convert.from_huggingface(tensors | {"encoder.layer.2.output.dense.bias": np.zeros(8)}, CONFIG)


def test_old_layer_norm_names_are_read(tensors):
  old = {
    k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
    for k, v in tensors.items()
  }
  one, other = convert.from_huggingface(old, CONFIG), convert.from_huggingface(tensors, CONFIG)
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_damaged_and_missing_weight_files_are_refused(tensors, tmp_path, monkeypatch):
  with pytest.raises(InputError, match="neither model.safetensors nor"):
    convert.load_backbone_tensors(tmp_path)
  path = tmp_path / "pytorch_model.bin"
  path.write_bytes(b"PK\x03\x04 cut short")
  with pytest.raises(InputError, match="pytorch_model.bin: not a complete"):
    convert.load_backbone_tensors(tmp_path)
  torch.save({"model": {"weight": torch.zeros(2)}}, path)
  with pytest.raises(InputError, match="not a flat dict of tensors.*state_dict"):
    convert.load_backbone_tensors(tmp_path)
  torch.save({"weight": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}, path)
  np.testing.assert_array_equal(convert.load_backbone_tensors(tmp_path)["weight"], np.ones(2, np.float32))
  monkeypatch.setitem(__import__("sys").modules, "torch", None)
  with pytest.raises(InputError, match="Install torch"):
    convert.load_backbone_tensors(tmp_path)

  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  whole = (tmp_path / "model.safetensors").read_bytes()
  for size in (4, 200, len(whole) - 10):
    (tmp_path / "model.safetensors").write_bytes(whole[:size])
    with pytest.raises(InputError, match="model.safetensors: not a complete safetensors file"):
      convert.load_backbone_tensors(tmp_path)


def test_shards_are_read_and_missing_or_outside_ones_refused(tensors, tmp_path):
  names = sorted(tensors)
  shards = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
  for shard, part in shards.items():
    safetensors.numpy.save_file({name: tensors[name] for name in part}, tmp_path / shard)
  where = {name: shard for shard, part in shards.items() for name in part}
  files.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": where})
  loaded = convert.load_backbone_tensors(tmp_path)
  assert loaded.keys() == tensors.keys()
  (tmp_path / "b.safetensors").unlink()
  with pytest.raises(InputError, match="b.safetensors: this file is missing"):
    convert.load_backbone_tensors(tmp_path)
  for content, message in (({"a": "../b.safetensors"}, "must be a file in this directory"), ([5], "of another kind")):
    files.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": content})
    with pytest.raises(InputError, match=f"index.json: .*{message}"):
      convert.load_backbone_tensors(tmp_path)


def test_prompts_of_another_backbone_or_layout_are_refused():
  spec = PromptSpec("deep", 3)
  with pytest.raises(InputError, match="prompts.safetensors: prompt tensor table has shape"):
    prompts.check_prompt(spec, {"table": np.zeros((3, 16))}, CONFIG, source="prompts.safetensors")
  with pytest.raises(InputError, match="no prompt"):
    prompts.from_original({}, {"prefix": True})
  with pytest.raises(InputError, match="missing or unknown"):
    prompts.from_original({"prefix_encoder.other": np.zeros(3)}, {"prefix": True})
  with pytest.raises(InputError, match="does not describe"):
    prompts.from_original(
      {"prefix_encoder.embedding.weight": np.zeros((3, 32)), "prefix_encoder.trans.0.weight": np.zeros((4, 8))},
      {"prefix": True},
    )
