"""A vector depends on text, prompt and key, not on padding, batch, order or the attention method."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.models import convert, dropout, prompts
from dptdr_jax.models.attention import choose_method
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.dropout import Dropout
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.models.represent import hidden_states, represent

KEYS = jax.random.split(jax.random.key(7), 4)
STATIC = ("config", "spec", "pooling", "normalize", "dropout", "compute_dtype", "attention")
ENCODE = jax.jit(represent, static_argnames=STATIC)
HIDDEN = jax.jit(hidden_states, static_argnames=("config", "spec"))


def _vectors(model, pooling="first", normalize=False, **options):
  return np.asarray(ENCODE(*model.arguments(), pooling=pooling, normalize=normalize, **options))


@pytest.mark.parametrize(
  ("backend", "capability", "method"),
  [("gpu", "9.0", "concat"), ("gpu", "10.0", "concat"), ("gpu", "7.5", "split"), ("gpu", "gfx90a", "split"),
   ("tpu", None, "split")],
)  # fmt: skip
def test_auto_attention_uses_the_fused_kernel_if_the_device_has_it(monkeypatch, backend, capability, method):
  device = types.SimpleNamespace() if capability is None else types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  query, key = (jnp.zeros((2, rows, 4, 64), jnp.bfloat16) for rows in (8, 8))
  assert choose_method("auto", query, key, None, None, None) == method


@pytest.mark.parametrize(
  ("pooling", "keys"), [("mean", None), ("first", KEYS)], ids=["plain mean", "first under dropout"]
)
def test_padding_order_and_batch_do_not_change_vectors(model, pooling, keys):
  options = {"pooling": pooling, "normalize": True}
  whole = _vectors(model, keys=keys, **options)
  np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)

  padded = np.full((4, 16), model.config.pad_id, np.int32)
  padded[:, :9] = model.tokens
  wider = _vectors(dataclasses.replace(model, tokens=padded), keys=keys, **options)
  np.testing.assert_allclose(wider, whole, rtol=0, atol=1e-6)

  order = np.array([2, 0, 3, 1])
  shuffled = dataclasses.replace(model, tokens=model.tokens[order], lengths=model.lengths[order])
  moved = _vectors(shuffled, keys=None if keys is None else keys[order], **options)
  np.testing.assert_allclose(moved, whole[order], rtol=0, atol=1e-6)

  alone = dataclasses.replace(model, tokens=model.tokens[1:2, :4], lengths=model.lengths[1:2])
  single = _vectors(alone, keys=None if keys is None else keys[1:2], **options)
  np.testing.assert_allclose(single[0], whole[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("keys", [None, KEYS], ids=["plain", "dropout"])
def test_last_layer_for_one_row_equals_that_row_of_the_full_layer(model, keys):
  hidden = np.asarray(HIDDEN(*model.arguments(), keys=keys))
  np.testing.assert_allclose(_vectors(model, keys=keys), hidden[:, 0], rtol=0, atol=3e-6)  # values reach 3
  visible = np.arange(9) < model.lengths[:, None]
  mean = (hidden * visible[..., None]).sum(1) / model.lengths[:, None]
  np.testing.assert_allclose(_vectors(model, "mean", keys=keys), mean, rtol=0, atol=3e-6)


@pytest.mark.parametrize("model", ["bert", "deberta"], indirect=True)
def test_split_and_concat_attention_agree(model):
  if model.config.family == "deberta":
    with pytest.raises(InputError, match="relative biases"):
      _vectors(model, attention="concat")
    return
  for keys in (None, KEYS):
    options = {"keys": keys, "dropout": Dropout(0.1, 0.0)}

    def both(prompt, method, options=options):
      out = represent(
        *model.arguments()[:3], prompt, *model.arguments()[4:], pooling="mean", normalize=True, attention=method,
        **options,
      )  # fmt: skip
      return jnp.sum(out * jnp.arange(32)), out

    split, concat = (
      jax.jit(jax.grad(both, has_aux=True), static_argnums=1)(model.prompt, method) for method in ("split", "concat")
    )
    np.testing.assert_allclose(split[1], concat[1], rtol=0, atol=1e-6)
    apart = np.linalg.norm(split[0]["table"] - concat[0]["table"])
    assert apart <= 1e-4 * np.linalg.norm(concat[0]["table"])
  with pytest.raises(InputError, match="probabilities"):
    _vectors(model, keys=KEYS, attention="concat")
  with pytest.raises(InputError, match="flash"):
    _vectors(model, attention="flash")


@pytest.mark.parametrize("model", ["deberta", "shallow"], indirect=True)
def test_gradients_through_custom_rules_match_finite_differences(model):
  def value(prompt):
    out = represent(*model.arguments()[:3], prompt, *model.arguments()[4:], pooling="mean", normalize=False, keys=KEYS)
    return jnp.sum(out * jnp.sin(jnp.arange(32.0)))

  gradient = jax.jit(jax.grad(value))(model.prompt)["table"]
  direction = gradient / jnp.linalg.norm(gradient)
  step = 3e-3
  value = jax.jit(value)
  ahead, behind = (value({"table": model.prompt["table"] + sign * step * direction}) for sign in (1, -1))
  np.testing.assert_allclose((ahead - behind) / (2 * step), jnp.linalg.norm(gradient), rtol=1e-2)


@pytest.mark.parametrize("model", ["roberta", "deberta"], indirect=True)
def test_every_weight_has_a_gradient(model):
  def value(params):
    out = represent(*model.arguments()[:2], params, *model.arguments()[3:], pooling="mean", normalize=True, keys=KEYS)
    return jnp.sum(out * jnp.sin(jnp.arange(32.0)))

  gradients = prompts.flatten(jax.jit(jax.grad(value))(model.params))
  # A key's bias adds the same number to all token scores of a row, so without a prompt its gradient would be 0.
  silent = [name for name, gradient in gradients.items() if not np.abs(gradient).max() > 0]
  assert silent == []


@pytest.mark.parametrize("model", ["roberta", "deberta"], indirect=True)
def test_bfloat16_vectors_are_close_to_float32(model):
  exact = _vectors(model, normalize=True)
  low = _vectors(model, normalize=True, compute_dtype=jnp.bfloat16, attention="split")
  assert low.dtype == np.float32
  assert (np.sum(exact * low, axis=1) > 0.995).all()


def test_dropout_masks_have_the_rate_and_are_independent():
  noise = dropout.Noise.from_keys(jax.random.split(jax.random.key(0), 64), Dropout(0.1, 0.1))
  ones = jnp.ones((64, 32, 64))
  masks = [
    np.asarray(dropout.dropout(ones, noise.at(layer, site), 0.1)) > 0 for layer in (0, 1) for site in (2, 3)
  ]  # fmt: skip
  for mask in masks:
    assert abs(mask.mean() - 0.9) < 4 * np.sqrt(0.09 / mask.size)
  # Correlations between examples, sites, layers and neighbours are those of independent draws.
  pairs = [(masks[0], masks[1]), (masks[0], masks[2]), (masks[0][1:], masks[0][:-1])]
  pairs += [(masks[0][:, 1:], masks[0][:, :-1]), (masks[0][..., 1:], masks[0][..., :-1])]
  for one, other in pairs:
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(one.size)
  kept = np.asarray(dropout.dropout(ones, noise.at(0, 0), 0.1))
  np.testing.assert_allclose(kept[kept > 0], 1 / 0.9, rtol=1e-6)


@pytest.mark.parametrize("model", ["bert", "deberta", "shallow"], indirect=True)
def test_init_words_uses_the_backbones_keys_or_embeddings_of_the_words(model):
  ids = np.array([5, 9, 11, 30, 8])
  spec = dataclasses.replace(model.spec, init="words")
  prompt = prompts.init_prompt(jax.random.key(0), spec, model.config, model.params, ids)
  prompts.check_prompt(spec, prompt, model.config)
  table = np.asarray(prompt["table"])
  if spec.kind == "shallow":
    np.testing.assert_array_equal(table, np.asarray(model.params["embeddings"]["word"])[ids])
  else:
    keys, _ = prompts.expand_prompt(spec, prompt, model.config)
    row = np.asarray(model.params["embeddings"]["word"])[ids]  # keys of layer 0, computed by hand
    if model.config.has_positions:
      row = row + np.asarray(model.params["embeddings"]["position"])[model.config.first_position + np.arange(5)]
    if model.config.type_vocab_size:
      row = row + np.asarray(model.params["embeddings"]["token_type"])[0]
    row = (row - row.mean(1, keepdims=True)) / np.sqrt(row.var(1, keepdims=True) + model.config.layer_norm_eps)
    weights = model.params["layers"]["key"]
    by_hand = row @ np.asarray(weights["kernel"][0])
    np.testing.assert_allclose(np.asarray(keys[0]).reshape(5, -1), by_hand, rtol=0, atol=1e-5)
  with pytest.raises(InputError, match="5 token ids"):
    prompts.init_prompt(jax.random.key(0), spec, model.config, model.params, ids[:4])


@pytest.mark.parametrize("spec", [PromptSpec("deep", 3, "mlp", 7), PromptSpec("shallow", 3, "lstm", 6)])
def test_fresh_projections_have_zero_biases_and_give_finite_vectors(spec):
  config = EncoderConfig("bert", 20, 16, 1, 2, 16, 16)
  prompt = prompts.init_prompt(jax.random.key(0), spec, config)
  assert float(jnp.abs(prompt["hidden"]["bias"]).max()) == 0
  params = convert.init_params(jax.random.key(1), config)
  tokens, lengths = np.ones((2, 4), np.int32), np.array([4, 2], np.int32)
  out = ENCODE(config, spec, params, prompt, tokens, lengths, pooling="first", normalize=False)
  assert out.shape == (2, 16) and bool(jnp.isfinite(out).all())
