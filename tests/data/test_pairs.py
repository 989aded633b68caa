"""Two texts in one sequence: equal to the tokenizers library's pairs; batches as a function of the step."""

import numpy as np
import pytest
from support import tiny

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.groups import TrainGroups
from dptdr_jax.data.pairs import PairBatches, PairFormat, Pairs
from dptdr_jax.data.ragged import Ragged
from dptdr_jax.data.store import write_token_store
from dptdr_jax.data.tokenizer import Tokenizer

WORDS = tiny.TOPICS["sorting"].split()
QUERIES = [" ".join(WORDS[row : row + 2 + row]) for row in range(6)]  # 2 … 7 words
PASSAGES = [" ".join(WORDS[: 1 + row % 12]) for row in range(20)]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def tokenizer(request, tmp_path_factory):
  return Tokenizer(tiny.backbone(tmp_path_factory.mktemp("pairs") / "backbone", family=request.param))


@pytest.fixture(scope="module")
def stores(tokenizer, tmp_path_factory):
  directory = tmp_path_factory.mktemp("stores")

  def write(name, texts):
    return write_token_store(lambda start: iter(texts[start:]), len(texts), tokenizer, directory / name, max_tokens=60)

  return write("queries", QUERIES), write("passages", PASSAGES)


def lists(tokenizer):
  return Ragged.of(tokenizer.encode(QUERIES)), Ragged.of(tokenizer.encode(PASSAGES))


@pytest.mark.parametrize("kind", ["stores", "lists"])
def test_pairs_are_the_tokenizers_own(tokenizer, stores, kind):
  """The oracle is the tokenizers library, cut to the passage ('only_second')."""
  queries, passages = stores if kind == "stores" else lists(tokenizer)
  form = PairFormat.of(tokenizer, query_length=14, pair_length=20)  # every query fits, not every passage
  rows = np.random.default_rng(0).integers(0, (6, 20), (30, 2))
  pairs = Pairs(queries, passages, rows[:, 0], rows[:, 1], form)
  batch = pairs.batch(np.arange(30), 20)
  np.testing.assert_array_equal(batch["lengths"], pairs.lengths())
  own = Tokenizer(tokenizer.directory).backend
  own.enable_truncation(20, strategy="only_second")
  parts = ("tokens", "segments", "lengths")
  for (query, passage), tokens, segments, length in zip(rows, *(batch[part] for part in parts), strict=True):
    encoded = own.encode(QUERIES[query], PASSAGES[passage])
    np.testing.assert_array_equal(tokens[:length], encoded.ids)
    texts = [0 if special else 1 + text for special, text in zip(
      encoded.special_tokens_mask, [of or 0 for of in encoded.sequence_ids], strict=True)]  # fmt: skip
    np.testing.assert_array_equal(segments[:length], texts)
    assert (tokens[length:] == tokenizer.pad_id).all() and not segments[length:].any()


def test_query_has_its_own_limit_whatever_the_passage(tokenizer):
  queries, passages = lists(tokenizer)
  form = PairFormat.of(tokenizer, query_length=6, pair_length=12)
  assert form.query_room == 4
  pairs = Pairs(queries, passages, np.array([5, 5, 0]), np.array([0, 11, 11]), form)
  found = [int((row == form.template.between[0]).argmax()) - 1 for row in pairs.batch(slice(None), 12)["tokens"]]
  assert found == [4, 4, len(tokenizer.encode(QUERIES[:1])[0])]
  assert pairs.lengths().tolist() == [4 + len(tokenizer.encode(PASSAGES[:1])[0]) + form.num_special, 12, 12]


def make(tokenizer, stores, group_size=3, **options):
  def positives(row):
    return np.array([row, row + 6])

  form = PairFormat.of(tokenizer, 10, 18)
  groups = TrainGroups(positives, None, num_passages=20, group_size=group_size, seed=5, stage="cross")
  options = {"batch_size": 4, "seed": 5, "stage": "cross", **options}
  return PairBatches(*stores, np.arange(6), groups, form, **options)


def test_batches_hold_the_positive_first_and_are_a_function_of_the_step(tokenizer, stores):
  batches = make(tokenizer, stores)
  rows, batch = batches.rows(2), batches[2]
  assert {name: (value.shape[0], value.dtype) for name, value in batch.items()} == {
    "tokens": (12, np.int32), "lengths": (12, np.int32), "segments": (12, np.int8), "relevant": (12, np.bool_),
    "real": (12, np.bool_),
  }  # fmt: skip
  assert batch["relevant"].tolist() == [True, False, False] * 4
  for at, query in enumerate(rows.queries):
    assert set(rows.passages[at]) & {query, query + 6} == {rows.passages[at, 0]}
  pairs = Pairs(*stores, np.repeat(rows.queries, 3), rows.passages.ravel(), PairFormat.of(tokenizer, 10, 18))
  width = batch["tokens"].shape[1]
  assert pairs.lengths().max() <= width and width in (16, 18)
  np.testing.assert_array_equal(batch["tokens"], pairs.batch(slice(None), width)["tokens"])
  loaded = list(make(tokenizer, stores).load(2, 5, 2))
  np.testing.assert_array_equal(loaded[0]["tokens"], batch["tokens"])
  np.testing.assert_array_equal(loaded[2]["tokens"], batches[4]["tokens"])


def test_slices_of_all_hosts_are_the_batch(tokenizer, stores):
  whole, parts = make(tokenizer, stores)[3], [make(tokenizer, stores, host=host, num_hosts=2)[3] for host in (0, 1)]
  for name, value in whole.items():
    np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)


def test_impossible_pairs_are_refused(tokenizer, stores):
  with pytest.raises(InputError, match="no room for a passage beside queries of 32"):
    PairFormat.of(tokenizer, 32, 32)
  with pytest.raises(InputError, match="cut to 60 tokens"):
    Pairs(*stores, np.zeros(1, int), np.zeros(1, int), PairFormat.of(tokenizer, 32, 99))
  with pytest.raises(InputError, match="a negative for every positive"):
    make(tokenizer, stores, group_size=1)
  bare = Tokenizer(tokenizer.directory)
  bare.backend.post_processor = None
  with pytest.raises(InputError, match="before, between and after"):
    bare.pair_template()
