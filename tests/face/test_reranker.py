"""CrossEncoder: scores of texts and of stores, saving and loading, refusals."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import tiny

from dptdr_jax import Backbone, CrossEncoder
from dptdr_jax.core.errors import InputError
from dptdr_jax.data.store import write_token_store
from dptdr_jax.data.tokenizer import Tokenizer
from dptdr_jax.models.cross import init_cross, match
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.models.represent import hidden_states
from dptdr_jax.reranker import PairSettings, probabilities

SPEC = PromptSpec("deep", length=4)
PASSAGES = [text for _, text in tiny.sentences(24, 14, seed=0)]
QUERIES = [" ".join(text.split()[: 2 + row % 5]) for row, text in enumerate(PASSAGES)]


@pytest.fixture(scope="module", params=[("bert", "first"), ("roberta", "match")], ids="-".join)
def encoder(request, tmp_path_factory):
  family, head = request.param
  backbone = Backbone.load(tiny.backbone(tmp_path_factory.mktemp("cross") / family, family=family))
  trainable = jax.device_get(init_cross(jax.random.key(0), SPEC, backbone.config, head=head))
  for part in ("dense", "output"):
    trainable["head"][part] = jax.tree.map(lambda leaf: 10 * leaf, trainable["head"][part])
  return CrossEncoder(backbone, SPEC, trainable, PairSettings(query_length=12, pair_length=24, head=head))


def test_scores_are_sigmoids_of_the_head(encoder):
  """Ids and segments by the tokenizers library, the head of token 0 by numpy."""
  scores = encoder.score(QUERIES[:5], PASSAGES[5:10])
  backbone, head = encoder.backbone, encoder.trainable["head"]
  backend = Tokenizer(backbone.tokenizer.directory).backend
  backend.enable_truncation(24, strategy="only_second")
  pairs = backend.encode_batch(list(zip(QUERIES[:5], PASSAGES[5:10], strict=True)))
  tokens, segments = np.full((5, 24), backbone.tokenizer.pad_id, np.int32), np.zeros((5, 24), np.int8)
  lengths = np.array([len(pair.ids) for pair in pairs])
  for row, pair in enumerate(pairs):
    tokens[row, : lengths[row]] = pair.ids
    segments[row, : lengths[row]] = [0 if of is None else 1 + of for of in pair.sequence_ids]
  run = jax.jit(hidden_states, static_argnums=(0, 1))
  hidden = np.asarray(run(backbone.config, SPEC, backbone.params, encoder.trainable["prompt"], tokens, lengths))
  wide = np.tanh(hidden[:, 0] @ head["dense"]["kernel"] + head["dense"]["bias"])
  logits = (wide @ head["output"]["kernel"] + head["output"]["bias"])[:, 0]
  if "match" in head:
    logits += np.exp(head["match"]["log_scale"][0]) * (match(hidden, lengths, segments) + head["match"]["bias"][0])
  np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)), rtol=2e-4)
  assert scores.dtype == np.float32 and np.ptp(scores) > 1e-3


def test_untrained_match_head_prefers_a_passage_with_the_querys_words(encoder):
  own, other = (encoder.score(QUERIES, PASSAGES[shift:] + PASSAGES[:shift]) for shift in (0, 1))  # 1: another topic
  known = np.mean(own > other)
  assert known > 0.9 if encoder.settings.head == "match" else known < 0.9, "token 0 does not"


def test_scores_of_stores_equal_those_of_texts_in_any_order(encoder, tmp_path):
  def write(name, texts):
    path = tmp_path / name
    return write_token_store(
      lambda start: iter(texts[start:]), len(texts), encoder.backbone.tokenizer, path, max_tokens=24
    )

  stores = write("queries", QUERIES), write("passages", PASSAGES)
  rows = np.random.default_rng(0).integers(0, 24, (2, 40))
  stored = encoder.logits_stored(*stores, *rows, batch_tokens=96, description="score")
  texts = encoder.score([QUERIES[row] for row in rows[0]], [PASSAGES[row] for row in rows[1]])
  np.testing.assert_allclose(probabilities(stored), texts, rtol=1e-5)
  np.testing.assert_allclose(encoder.logits_stored(*stores, *rows[:, ::-1])[::-1], stored, rtol=1e-4, atol=1e-6)
  other = json.loads((tmp_path / "queries/store.json").read_text()) | {"tokenizer_hash": "another"}
  (tmp_path / "queries/store.json").write_text(json.dumps(other))
  with pytest.raises(InputError, match="another tokenizer"):
    encoder.logits_stored(type(stores[0])(tmp_path / "queries"), stores[1], *rows)


def test_saved_encoder_scores_the_same_when_loaded(encoder, tmp_path):
  encoder.save(tmp_path / "saved")
  assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["cross_encoder.json", "prompts.safetensors"]
  modes = [path.stat().st_mode & 0o444 for path in (tmp_path / "saved", tmp_path / "saved/prompts.safetensors")]
  assert modes[0] == modes[1], "whoever can read the directory can read the file"
  titled = [("title", passage) for passage in PASSAGES]
  for loaded in (CrossEncoder.load(tmp_path / "saved"), CrossEncoder.load(tmp_path / "saved", encoder.backbone)):
    np.testing.assert_array_equal(loaded.score(QUERIES, titled), encoder.score(QUERIES, titled))
    assert loaded.hash == encoder.hash and loaded.settings == encoder.settings
  assert not np.array_equal(encoder.score(QUERIES, titled), encoder.score(QUERIES, PASSAGES))
  if encoder.settings.head == "first":  # early files have no such entry
    about = json.loads((tmp_path / "saved/cross_encoder.json").read_text())
    del about["head"]
    (tmp_path / "saved/cross_encoder.json").write_text(json.dumps(about))
    older = CrossEncoder.load(tmp_path / "saved", encoder.backbone)
    np.testing.assert_array_equal(older.score(QUERIES, titled), encoder.score(QUERIES, titled))
  given = [{"title": "title" if row % 2 else None, "text": passage} for row, passage in enumerate(PASSAGES)]
  bare = [titled[row] if row % 2 else passage for row, passage in enumerate(PASSAGES)]
  np.testing.assert_array_equal(encoder.score(iter(QUERIES), given), encoder.score(QUERIES, bare))


def test_wrong_inputs_and_files_are_refused(encoder, tmp_path):
  encoder.save(tmp_path / "saved")
  other = Backbone.load(tiny.backbone(tmp_path / "other", seed=9))
  with pytest.raises(InputError, match="another backbone.*cross_encoder.json"):
    CrossEncoder.load(tmp_path / "saved", other)
  with pytest.raises(InputError, match="no cross-encoder here"):
    CrossEncoder.load(tmp_path)
  with pytest.raises(InputError, match="2 queries and 1 passages"):
    encoder.score(QUERIES[:2], PASSAGES[:1])
  with pytest.raises(InputError, match="a list of queries is expected, not one: 'merge'"):
    encoder.score("merge", ["a"] * 5)
  with pytest.raises(InputError, match=r"passage 1 \(NoneType\) has no text"):
    encoder.score(QUERIES[:2], ["merge", None])
  with pytest.raises(InputError, match="don't fit the backbone's"):
    CrossEncoder(encoder.backbone, SPEC, encoder.trainable, PairSettings(pair_length=120))
  with pytest.raises(InputError, match="unknown head of a cross-encoder: 'last'"):
    PairSettings(head="last")
  tensors = load_file(tmp_path / "saved/prompts.safetensors")
  tensors.pop("head/output/bias")
  save_file(tensors, tmp_path / "saved/prompts.safetensors")
  with pytest.raises(InputError, match="head/output/bias has shape None"):
    CrossEncoder.load(tmp_path / "saved", encoder.backbone)
