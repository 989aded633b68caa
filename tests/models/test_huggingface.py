"""Vectors agree with transformers in float32, and export is the inverse of import."""

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from dptdr_jax import Backbone, Retriever
from dptdr_jax.models import convert
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.models.represent import hidden_states

SENTENCES = [
  "Deep prompts are keys and values that stand before every layer's own.",
  "What is dense retrieval?",
  "BM25",
  "The quick brown fox jumps over the lazy dog; naïve café owners (aged 42) don't mind at all, they say, and go on. "
  * 2,
]
NONE = PromptSpec("none")
HIDDEN = jax.jit(hidden_states, static_argnames=("config", "spec"))


@pytest.fixture(scope="module")
def batch(minilm):
  encoded = AutoTokenizer.from_pretrained(minilm)(SENTENCES, padding=True, return_tensors="np")
  return encoded["input_ids"].astype(np.int32), encoded["attention_mask"]


def _theirs(model, tokens, mask):
  with torch.no_grad():
    out = model.eval()(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long())
  return out.last_hidden_state.numpy()


def _ours(config, params, tokens, mask):
  return np.asarray(HIDDEN(config, NONE, params, None, tokens, mask.sum(1).astype(np.int32)))


def test_minilm_agrees_with_transformers(minilm, batch):
  tokens, mask = batch
  config = EncoderConfig.from_file(minilm / "config.json")
  params = convert.from_huggingface(convert.load_backbone_tensors(minilm), config)
  theirs = _theirs(transformers.BertModel.from_pretrained(minilm), tokens, mask)
  seen = mask.astype(bool)
  np.testing.assert_allclose(_ours(config, params, tokens, mask)[seen], theirs[seen], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_padding_bucket_and_order_do_not_change_vectors(minilm, pooling):
  retriever = Retriever.untuned(Backbone.load(minilm), pooling=pooling, normalize=True)
  texts = [sentence[:end] for sentence in SENTENCES for end in (9, 40, 200)]
  alone = np.concatenate([retriever.encode_passages([text]) for text in texts])
  order = np.random.default_rng(0).permutation(len(texts))
  together = retriever.encode_passages([texts[place] for place in order])
  np.testing.assert_allclose(together, alone[order], rtol=0, atol=1e-6)
  tokenizer = retriever.backbone.tokenizer
  lists = [tokenizer.wrap(ids) for ids in tokenizer.encode(texts, 100)]
  for width in (104, 112, 128):
    ids = np.full((len(texts), width), tokenizer.pad_id)
    for row, found in zip(ids, lists, strict=True):
      row[: len(found)] = found
    mask = np.arange(width) < np.array([[len(found)] for found in lists])
    np.testing.assert_allclose(retriever.encode_tokens(ids, mask, "passage"), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("types", [["c2p", "p2c"], ["c2p"], ["p2c", "c2p", "p2p"], []])
@pytest.mark.parametrize("absolute", [True, False])
def test_deberta_agrees_with_transformers(types, absolute):
  torch.manual_seed(0)
  theirs = transformers.DebertaConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=24, max_relative_positions=5, pos_att_type=types, relative_attention=bool(types),
    position_biased_input=absolute, type_vocab_size=0, initializer_range=0.3,
  )  # fmt: skip
  model = transformers.DebertaModel(theirs)
  config = EncoderConfig.from_dict(theirs.to_dict())
  tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  params = convert.from_huggingface(tensors, config)
  tokens = np.random.default_rng(0).integers(1, 50, (3, 12)).astype(np.int32)
  mask = (np.arange(12) < np.array([12, 7, 1])[:, None]).astype(np.int64)
  seen = mask.astype(bool)
  ours = _ours(config, params, tokens, mask)
  np.testing.assert_allclose(ours[seen], _theirs(model, tokens, mask)[seen], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
def test_export_is_the_inverse_of_import(family, tmp_path):
  kind = {"bert": transformers.BertModel, "roberta": transformers.RobertaModel, "deberta": transformers.DebertaModel}
  theirs = transformers.AutoConfig.for_model(
    family, vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=24,
  )  # fmt: skip
  theirs.relative_attention, theirs.pos_att_type = True, ["c2p", "p2c"]
  tensors = {name: tensor.numpy() for name, tensor in kind[family](theirs).state_dict().items()}
  config = EncoderConfig.from_dict(theirs.to_dict())
  assert EncoderConfig.from_dict(config.to_dict()) == config
  exported = convert.to_huggingface(convert.from_huggingface(tensors, config), config)
  assert {name for name in tensors if "position_ids" not in name and "token_type_ids" not in name} - set(exported) <= {
    "pooler.dense.weight", "pooler.dense.bias", "embeddings.position_embeddings.weight",
  }  # fmt: skip
  for name, array in exported.items():
    np.testing.assert_array_equal(array, tensors[name])
