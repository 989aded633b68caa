"""A batch of rows with different prompts gives the vectors that each prompt gives alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.models import bank, convert, prompts
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.models.represent import represent

LONGEST = 8  # of the bank's prompts
TASKS = [  # (prompt, pooling, normalize)
  (PromptSpec("deep", 5, position_shift=5), "first", False),
  (PromptSpec("deep", 8), "mean", True),
  (PromptSpec("deep", 3, "mlp", 7, position_shift=3), "mean", False),
  (PromptSpec("none"), "mean", True),
  (PromptSpec("none"), "first", False),
]
WRITE = jax.jit(bank.write, donate_argnums=0)
STATIC = ("config", "compute_dtype", "attention")
ROWS = jax.jit(bank.represent_rows, static_argnames=STATIC)


def raw(spec, config, seed):
  return jax.tree.map(lambda x: 50 * x, prompts.init_prompt(jax.random.key(seed), spec, config))


def entry_of(model, task, seed):
  spec, pooling, normalize = task
  return bank.make_entry(
    model.config, spec, raw(spec, model.config, seed), pooling=pooling, normalize=normalize, dtype=np.float32
  )


def alone(model, task, seed, rows):
  spec, pooling, normalize = task
  encode = jax.jit(functools.partial(represent, model.config, spec, pooling=pooling, normalize=normalize))
  return encode(model.params, raw(spec, model.config, seed), model.tokens[rows], model.lengths[rows])


def filled(model, tasks):
  slots = bank.empty_bank(model.config, len(tasks), LONGEST, np.float32)
  for slot, task in enumerate(tasks):
    slots = WRITE(slots, slot, **bank.slot_values(entry_of(model, task, slot), LONGEST))
  return slots


@pytest.mark.parametrize("model", ["bert", "roberta"], indirect=True)
@pytest.mark.parametrize("method", ["split", "concat"])
def test_mixed_batch_gives_the_vectors_of_each_task_alone(model, method):
  slots = np.array([4, 1, 0, 2, 3, 0, 1, 2], np.int32)
  rows = np.array([0, 1, 2, 3, 0, 1, 2, 3])
  tokens, lengths = model.tokens[rows], model.lengths[rows]
  mixed = ROWS(model.config, model.params, filled(model, TASKS), tokens, lengths, slots, attention=method)
  expected = np.stack([alone(model, TASKS[slot], slot, [row])[0] for slot, row in zip(slots, rows, strict=True)])
  np.testing.assert_allclose(mixed, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("model", ["bert"], indirect=True)
def test_last_layer_of_one_row_gives_the_vectors_of_the_whole_layer(model):
  contents = filled(model, TASKS)
  first = np.array([0, 4, 0, 4], np.int32)  # no row needs the mean
  vectors = ROWS(model.config, model.params, contents, model.tokens, model.lengths, first)
  tokens, lengths = (np.concatenate([array, array[:1]]) for array in (model.tokens, model.lengths))
  mixed = ROWS(model.config, model.params, contents, tokens, lengths, np.append(first, np.int32(1)))
  np.testing.assert_allclose(vectors, mixed[:4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ["bert"], indirect=True)
def test_slot_is_overwritten_in_place_without_compiling(model):
  contents = filled(model, TASKS[:2])
  compiled = WRITE._cache_size()
  before = contents.prompts.unsafe_buffer_pointer()
  contents = WRITE(contents, 0, **bank.slot_values(entry_of(model, TASKS[3], 7), LONGEST))
  assert contents.prompts.unsafe_buffer_pointer() == before and WRITE._cache_size() == compiled
  slots = np.array([0, 1, 0, 1], np.int32)
  mixed = ROWS(model.config, model.params, contents, model.tokens, model.lengths, slots)
  np.testing.assert_allclose(mixed[::2], alone(model, TASKS[3], 7, [0, 2]), rtol=0, atol=2e-5)
  np.testing.assert_allclose(mixed[1::2], alone(model, TASKS[1], 1, [1, 3]), rtol=0, atol=2e-5)


def test_prompts_are_gathered_one_layer_at_a_time():
  rows, length, width = 16, 256, 32
  one_layer = rows * 2 * length * width * 4  # bytes

  def temporary(layers):
    config = EncoderConfig("bert", 50, width, layers, 2, 64, 300)
    params = jax.eval_shape(lambda: convert.init_params(jax.random.key(0), config))
    slots = jax.eval_shape(lambda: bank.empty_bank(config, 4, length, np.float32))
    ids = jax.ShapeDtypeStruct((rows, 4), np.int32)
    row = jax.ShapeDtypeStruct((rows,), np.int32)
    return ROWS.lower(config, params, slots, ids, row, row).compile().memory_analysis().temp_size_in_bytes

  few, many = temporary(3), temporary(11)
  assert many - few < 0.5 * one_layer and many < 6 * one_layer


@pytest.mark.parametrize("model", ["bert"], indirect=True)
def test_unsupported_prompts_are_refused_by_name(model):
  make = functools.partial(bank.make_entry, model.config, pooling="first", normalize=False, dtype=np.float32)
  with pytest.raises(InputError, match="shallow prompts cannot share a batch"):
    make(PromptSpec("shallow", 3), {})
  with pytest.raises(InputError, match="unknown pooling: 'max'"):
    make(PromptSpec("none"), {}, pooling="max")
  spec = PromptSpec("deep", 3)
  with pytest.raises(InputError, match="not finite"):
    make(spec, {"table": np.full((3, 192), np.nan)})
  with pytest.raises(InputError, match="at most 2: 3"):
    bank.slot_values(make(spec, raw(spec, model.config, 0)), 2)
  with pytest.raises(InputError, match="DeBERTa cannot serve several tasks"):
    bank.check_backbone(dataclasses.replace(model.config, family="deberta"))
