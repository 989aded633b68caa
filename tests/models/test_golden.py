"""Checkpoints of the original implementation give its vectors, scores, loss and gradients."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptdr_jax.core import files
from dptdr_jax.models import convert, prompts
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.represent import hidden_states, represent

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures" / "golden"
FOLDERS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
KINDS = ("query", "passage")


def _load(directory):
  tensors = convert.load_backbone_tensors(directory)
  values = files.read_json(directory / "config.json")
  config = EncoderConfig.from_dict(values)
  spec, prompt = prompts.from_original(tensors, values)
  prompts.check_prompt(spec, prompt, config)
  return config, spec, convert.from_huggingface(tensors, config), prompt, values


def _check(directory):
  golden = np.load(GOLDEN / directory.name / "golden.npz")
  tied = not (directory / "query_model").is_dir()
  models = [_load(directory if tied else directory / f"{kind}_model") for kind in KINDS]
  batches = [(golden[f"{k}_ids"].astype(np.int32), golden[f"{k}_mask"].sum(1).astype(np.int32)) for k in KINDS]
  group = len(golden["passage_ids"]) // len(golden["query_ids"])

  def loss(both):
    queries, passages = (
      represent(config, spec, params, prompt, *batch, pooling="first", normalize=False)
      for (config, spec, params, _, _), prompt, batch in zip(models, both, batches, strict=True)
    )
    scores = jnp.matmul(queries, passages.T, precision="highest")
    rows = jnp.arange(len(scores))
    return -jnp.mean(jax.nn.log_softmax(scores)[rows, rows * group]), (queries, passages)

  gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, (queries, passages)), gradients = gradient([model[3] for model in models])
  np.testing.assert_allclose(queries, golden["query_reps"], rtol=0, atol=2e-5)
  np.testing.assert_allclose(passages, golden["passage_reps"], rtol=0, atol=2e-5)
  # Scores reach 50. The reference was computed in float32, whose spacing there is 4e-6, and errors of 1e-6 in the
  # vectors add up to 2e-5 on some machines. So compute in float64 and allow both.
  exact = np.float64(queries) @ np.float64(passages).T
  np.testing.assert_allclose(exact, golden["scores"], rtol=2e-7, atol=2e-5)
  np.testing.assert_allclose(value, golden["loss"], rtol=0, atol=2e-5)
  if tied:
    gradients = [jax.tree.map(jnp.add, *gradients)]
  for kind, mine in zip(KINDS, gradients, strict=False):
    stem = f"grad/{kind}/"
    names = {name.removeprefix(stem): golden[name] for name in golden if name.startswith(stem)}
    _, reference = prompts.from_original(names, models[0][4])
    jax.tree.map(_assert_near, mine, reference)


def _assert_near(mine, reference):
  assert np.linalg.norm(mine - reference) <= 1e-4 * np.linalg.norm(reference)


@pytest.mark.parametrize("name", FOLDERS)
def test_checkpoint_of_the_original_agrees(name):
  _check(GOLDEN / name)


@pytest.mark.parametrize("name", [name for name in FOLDERS if list((GOLDEN / name).rglob("*.bin"))])
def test_bin_checkpoint_of_the_original_agrees(name, tmp_path):
  copy = tmp_path / name
  shutil.copytree(GOLDEN / name, copy, ignore=shutil.ignore_patterns("*.safetensors", "*.npz"))
  _check(copy)


@pytest.mark.parametrize("name", ["roberta_prefix", "deberta_prefix", "bert_prompt"])
def test_hidden_states_agree(name):
  golden = np.load(GOLDEN / name / "golden.npz")
  config, spec, params, prompt, _ = _load(GOLDEN / name)
  mask = golden["passage_mask"].astype(bool)
  tokens, lengths = golden["passage_ids"].astype(np.int32), mask.sum(1).astype(np.int32)
  encode = jax.jit(hidden_states, static_argnums=(0, 1))
  hidden = np.asarray(encode(config, spec, params, prompt, tokens, lengths))
  np.testing.assert_allclose(hidden[mask], golden["passage_hidden"][mask], rtol=0, atol=2e-5)


def test_flatten_and_unflatten_are_inverse():
  _, _, _, prompt, _ = _load(GOLDEN / "roberta_prompt_lstm")
  flat = prompts.flatten(prompt)
  assert "lstm/backward_1/hidden_kernel" in flat
  jax.tree.map(np.testing.assert_array_equal, prompts.unflatten(flat), prompt)
