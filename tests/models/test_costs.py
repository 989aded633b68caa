"""Work and memory of the compiled prompt step."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dptdr_jax.models import convert, prompts
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.models.represent import represent


def _compile(config, spec, batch, tokens, what, remat="none"):
  """Compiles value and gradient with dropout, from shapes."""
  params = jax.eval_shape(lambda: convert.init_params(jax.random.key(0), config))
  prompt = jax.eval_shape(lambda: prompts.init_prompt(jax.random.key(0), spec, config))
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
  ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
  lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)

  def value(prompt, params, ids, lengths, keys):
    options = {"pooling": "first", "normalize": False, "keys": keys, "remat": remat}
    return jnp.sum(represent(config, spec, params, prompt, ids, lengths, **options))

  step = jax.jit(jax.value_and_grad(value, argnums=0 if what == "prompt" else 1))
  return step.lower(prompt, params, ids, lengths, keys).compile()


@pytest.mark.parametrize(("what", "length"), [("prompt", 16), ("backbone", 0)])
def test_compiled_operations_match_the_hand_count(what, length):
  """Products with frozen weights cost as much backward as forward, those with trained ones twice as much."""
  # The compiler counts the body of the loop over layers once. Three layers (two in the loop) and four have the same
  # count: one layer of the loop and the last layer.
  spec = PromptSpec("deep", length, position_shift=length) if length else PromptSpec("none")
  width, wide, batch, tokens = 512, 2048, 2, 64
  three = EncoderConfig("bert", 50, width, 3, 4, wide, 128)
  counted = _compile(three, spec, batch, tokens, what).cost_analysis()["flops"]
  # The last layer computes keys and values of all rows, and the rest for one.
  dense = 2 * (tokens + 1) * (2 * width**2 + 2 * width * wide) + 2 * 2 * tokens * 2 * width**2
  attention = 4 * (tokens + 1) * (tokens + length) * width
  by_hand = batch * ((2 if what == "prompt" else 3) * dense + 3 * attention)
  assert abs(counted / by_hand - 1) < 0.05
  if what == "prompt":
    deeper = _compile(dataclasses.replace(three, num_layers=4), spec, batch, tokens, what).cost_analysis()["flops"]
    assert abs(deeper / counted - 1) < 0.001


def test_no_copy_of_the_prompt_is_stored_for_each_example():
  # With a long prompt and a short text: a copy for an example would be 2 arrays of P × H in every layer.
  length, width = 256, 64
  array = length * width * 4
  spec = PromptSpec("deep", length, position_shift=length)

  def growth(layers):
    config = EncoderConfig("bert", 50, width, layers, 2, 64, 512)
    few, many = (_compile(config, spec, batch, 8, "prompt").memory_analysis() for batch in (4, 8))
    return (many.temp_size_in_bytes - few.temp_size_in_bytes) / 4

  shallow, deep = growth(4), growth(24)
  # One more layer stores a small part of a copy for each example; the masked prompt of one layer is temporary.
  assert (deep - shallow) / 20 < 0.15 * 2 * array
  assert deep < 0.3 * 24 * 2 * array


def test_remat_attention_stores_everything_but_the_probabilities():
  # Stored in float32: inputs of two norms (2 H), of the activation (4 H), queries, keys and values (3 H), and
  # probabilities.
  batch, tokens, length, width, heads = 4, 64, 64, 64, 4
  spec = PromptSpec("deep", length, position_shift=length)

  def stored(remat):  # bytes that one more layer stores
    sizes = []
    for layers in (4, 12):
      config = EncoderConfig("bert", 50, width, layers, heads, 4 * width, 256)
      sizes.append(_compile(config, spec, batch, tokens, "prompt", remat).memory_analysis().temp_size_in_bytes)
    return (sizes[1] - sizes[0]) / 8

  rows = batch * tokens * 4
  probabilities, others = rows * heads * (length + tokens), rows * 9 * width
  plain, recomputed = stored("none"), stored("attention")
  assert plain - recomputed > 0.95 * probabilities
  assert recomputed < 1.2 * others
