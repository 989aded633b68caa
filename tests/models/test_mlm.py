"""The language-model head against transformers: scores, loss, export and import."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from dptdr_jax.core.errors import InputError
from dptdr_jax.models import convert, mlm
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.encoder import REMAT
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.models.represent import hidden_states, represent

NONE = PromptSpec("none")
SHAPE = dict(
  vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
  max_position_embeddings=40, hidden_act="gelu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
FAMILIES = {
  "bert": (transformers.BertConfig(**SHAPE, type_vocab_size=2), transformers.BertForMaskedLM),
  "roberta": (transformers.RobertaConfig(**SHAPE, type_vocab_size=1), transformers.RobertaForMaskedLM),
}


@pytest.fixture(params=FAMILIES)
def theirs(request):
  """A random transformers model with a head; every weight differs from its initial value."""
  config, kind = FAMILIES[request.param]
  torch.manual_seed(0)
  model = kind(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model


def tensors_of(model):
  return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def config_of(model):
  return EncoderConfig.from_dict(model.config.to_dict())


def inputs(pad_id):
  rng = np.random.default_rng(1)
  tokens, lengths = rng.integers(5, 50, (4, 12)), np.array([12, 7, 3, 12])
  tokens[np.arange(12) >= lengths[:, None]] = pad_id
  return tokens.astype(np.int32), lengths.astype(np.int32)


def test_scores_and_loss_agree_with_transformers(theirs):
  config, tensors = config_of(theirs), tensors_of(theirs)
  params = convert.from_huggingface(tensors, config)
  head = mlm.head_from_huggingface(tensors, config)
  tokens, lengths = inputs(config.pad_id)
  labels = np.full(tokens.shape, -100)
  labels[:, 1:3] = [[7, 8], [9, 6], [11, 12], [40, 41]]
  labels[0, 9] = 13
  mask = torch.tensor(np.arange(12) < lengths[:, None]).long()
  with torch.no_grad():
    wanted = theirs(input_ids=torch.tensor(tokens).long(), attention_mask=mask, labels=torch.tensor(labels))

  hidden = hidden_states(config, NONE, params, None, tokens, lengths)
  found = mlm.logits(head, params["embeddings"]["word"], hidden, config, jnp.float32)
  visible = np.arange(12) < lengths[:, None]
  np.testing.assert_allclose(np.asarray(found)[visible], wanted.logits.numpy()[visible], atol=2e-5)

  # The order of positions must not matter, nor what the padding points at.
  positions = np.array([[1, 2, 9], [2, 1, 0], [1, 2, 0], [1, 2, 0]], np.int32)
  chosen = np.take_along_axis(labels, positions, 1)
  chosen = np.where(chosen < 0, -1, chosen).astype(np.int32)
  loss, hits = mlm.masked_loss(head, params["embeddings"]["word"], hidden, positions, chosen, config)
  assert loss.sum() / 9 == pytest.approx(wanted.loss.item(), abs=1e-5)
  best = wanted.logits.numpy().argmax(-1)
  assert hits.sum() == (best == labels).sum()


def test_transformers_loads_the_export_without_missing_or_unexpected_tensors(theirs, tmp_path):
  config, tensors = config_of(theirs), tensors_of(theirs)
  params, head = convert.from_huggingface(tensors, config), mlm.head_from_huggingface(tensors, config)
  made = mlm.add_head(convert.to_huggingface(params, config), head, config)
  save_file(made, tmp_path / "model.safetensors", metadata={"format": "pt"})
  (tmp_path / "config.json").write_text(json.dumps(mlm.masked_lm_config(config)))
  loaded, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
  assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
  for name, tensor in tensors_of(loaded).items():
    np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)

  back = load_file(tmp_path / "model.safetensors")
  jax.tree.map(np.testing.assert_array_equal, convert.from_huggingface(back, config), params)
  jax.tree.map(np.testing.assert_array_equal, mlm.head_from_huggingface(back, config), head)


def test_old_names_are_read_a_missing_head_is_none_and_a_broken_one_refused(theirs):
  config, tensors = config_of(theirs), tensors_of(theirs)
  bare = {name: tensor for name, tensor in tensors.items() if not name.startswith(("cls.", "lm_head."))}
  assert mlm.head_from_huggingface(bare, config) is None
  old = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for name, t in tensors.items()}
  jax.tree.map(np.testing.assert_array_equal, *(mlm.head_from_huggingface(each, config) for each in (old, tensors)))
  stem = {"bert": "cls.predictions", "roberta": "lm_head"}[config.family]
  dense = {"bert": "transform.dense", "roberta": "dense"}[config.family]
  without = {name: tensor for name, tensor in tensors.items() if name != f"{stem}.{dense}.bias"}
  with pytest.raises(InputError, match=rf"{stem}.{dense}.bias is missing"):
    mlm.head_from_huggingface(without, config)
  with pytest.raises(InputError, match="unknown tensors"):
    mlm.head_from_huggingface(tensors | {f"{stem}.other.weight": np.zeros(3)}, config)
  with pytest.raises(InputError, match="not tied"):
    mlm.head_from_huggingface(tensors | {f"{stem}.decoder.weight": np.zeros((50, 16), np.float32)}, config)


def test_fresh_head_has_the_shapes_of_a_checkpoint(theirs):
  config = config_of(theirs)
  fresh, read = mlm.init_head(jax.random.key(0), config), mlm.head_from_huggingface(tensors_of(theirs), config)
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, read)
  with pytest.raises(InputError, match="covers BERT and RoBERTa"):
    mlm.init_head(jax.random.key(0), dataclasses.replace(config, family="deberta"))


def test_remat_does_not_change_gradients():
  config = EncoderConfig.from_dict(FAMILIES["bert"][0].to_dict())
  params = convert.init_params(jax.random.key(0), dataclasses.replace(config, initializer_range=0.2))
  tokens, lengths = inputs(0)
  keys = jax.random.split(jax.random.key(1), len(tokens))

  def loss(params, remat):
    hidden = hidden_states(config, NONE, params, None, tokens, lengths, keys=keys, remat=remat)
    return jnp.sum(hidden[:, 0] ** 2)

  plain, *again = jax.jit(lambda p: [jax.grad(loss)(p, remat) for remat in REMAT])(params)
  for other in again:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, other)
  vectors = represent(config, NONE, params, None, tokens, lengths, pooling="first", normalize=False)
  first = hidden_states(config, NONE, params, None, tokens, lengths)[:, 0]
  np.testing.assert_allclose(vectors, first, atol=1e-5)
