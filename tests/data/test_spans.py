"""Spans and masks: lengths, whole words, shares; batches as a function of the step."""

import json
import pydoc_data.topics

import numpy as np
import pytest
from support import tiny

from dptdr_jax.core.errors import InputError
from dptdr_jax.data import masking as masking_module
from dptdr_jax.data import spans
from dptdr_jax.data.masking import Masking
from dptdr_jax.data.spans import SpanBatches, SpanLengths, cut, shuffled
from dptdr_jax.data.store import write_token_store
from dptdr_jax.data.tokenizer import Tokenizer
from dptdr_jax.data.vocabulary import train_byte_level_bpe

TEXT = "unbelievably the tokenizers' re-reading isn't über-quick, of 3.14159 internationalisation (cat) sat!"


def texts(count, length, seed=0):
  """Texts of words that a small vocabulary must cut into pieces."""
  generator = np.random.default_rng(seed)
  return [" ".join(generator.choice(TEXT.split(), size)) for size in generator.integers(*length, count)]


def windows(tokens, width):
  """All parts of so many tokens."""
  return np.lib.stride_tricks.sliding_window_view(tokens, width)


def store_of(tokenizer, written, path, **options):
  return write_token_store(lambda start: iter(written[start:]), len(written), tokenizer, path, max_tokens=400,
                           words=True, **options)  # fmt: skip


@pytest.fixture(params=["minilm", "roberta"])
def tokenizer(request):
  """WordPiece and byte-level BPE."""
  return Tokenizer(request.getfixturevalue(request.param))


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
  """Spans of 4 tokens and more, so that short texts do."""
  monkeypatch.setattr(spans, "SHORTEST", 4)


def batches_of(stores, masking=None, lengths=None, **options):
  lengths = lengths or SpanLengths(32, 0.2)
  return SpanBatches(stores, lengths, masking, **{"batch_size": 32, "seed": 3} | options)


def test_words_start_where_the_tokenizer_says(tokenizer, tmp_path):
  written = [*texts(50, (1, 30)), "", "one </s> two [SEP] three"]
  store = store_of(tokenizer, written, tmp_path / "store")
  for row, text in enumerate(written):
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    wanted = [i == 0 or w != encoding.word_ids[i - 1] for i, w in enumerate(encoding.word_ids)]
    assert store.words(np.array([row])).tolist() == wanted
    assert store[row].tolist() == encoding.ids
  if "##s" in tokenizer.backend.get_vocab():
    pieces = [tokenizer.backend.id_to_token(i) for row in range(50) for i in store[row]]
    assert [not piece.startswith("##") for piece in pieces] == store.words(np.arange(50)).tolist()
  plain = write_token_store(lambda start: iter(written[start:]), len(written), tokenizer, tmp_path / "p", max_tokens=9)
  with pytest.raises(InputError, match="does not say where words start"):
    plain.words(np.array([0]))


@pytest.mark.parametrize("kind", ["minilm", "byte-level"])
def test_masks_fall_on_whole_words_at_the_rate(kind, request, tmp_path):
  said = " ".join(pydoc_data.topics.topics.values()).split()[:12_000]  # Python's own reference
  parts = [" ".join(said[begin : begin + 20]) for begin in range(0, len(said), 20)]
  if kind == "byte-level":
    assert train_byte_level_bpe(iter(parts), 3000, tmp_path) > 2000
  tokenizer = Tokenizer(request.getfixturevalue(kind) if kind == "minilm" else tmp_path)
  separator = f" {tokenizer.separator} "  # within the text, as with titles
  written = [separator.join(pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
  store = store_of(tokenizer, written, tmp_path / "store")
  masking = Masking.of(tokenizer)
  tokens, lengths = store.batch(np.arange(len(store)), 400)
  content = np.arange(tokens.shape[1]) < lengths[:, None] - 1
  content[:, 0] = False
  starts = np.zeros(tokens.shape, bool)
  starts[content] = store.words(np.arange(len(store)))
  masked, positions, labels = masking.apply(tokens, starts, content, np.random.default_rng(0))

  real = labels >= 0
  assert (np.take_along_axis(tokens, positions, 1)[real] == labels[real]).all()
  chosen = np.zeros(tokens.shape, bool)
  np.put_along_axis(chosen, np.where(real, positions, 0), real, 1)
  assert (chosen.sum(1) == real.sum(1)).all()
  assert (masked[~chosen] == tokens[~chosen]).all()
  assert not chosen[masking.is_special[tokens]].any() and not chosen[~content].any()

  ordinary = content & ~masking.is_special[tokens]
  words = np.cumsum(starts.ravel()) * ordinary.ravel()  # no text ends within a word of the next
  sizes, taken = np.bincount(words)[1:], np.bincount(words, chosen.ravel())[1:]
  sizes, taken = sizes[sizes > 0], taken[sizes > 0]
  assert len(sizes) > 10_000 and np.sum(sizes > 1) > 500
  assert ((taken == 0) | (taken == sizes)).all()  # whole words
  assert chosen.sum() / ordinary.sum() == pytest.approx(0.15, abs=0.004)
  for size in np.unique(sizes):  # whatever their length
    here = sizes == size
    assert (taken[here] > 0).mean() == pytest.approx(0.15, abs=5 * (0.1275 / here.sum()) ** 0.5)

  became = masked[chosen]
  share = 3 * (0.16 / len(became)) ** 0.5
  assert (became == masking.mask_id).mean() == pytest.approx(0.8, abs=share)
  kept = (became == tokens[chosen]).mean()
  assert kept == pytest.approx(0.1, abs=share)
  assert not masking.is_special[became[became != masking.mask_id]].any()


def test_no_span_has_more_masks_than_there_is_room(monkeypatch):
  monkeypatch.setattr(masking_module, "RATE", 0.5)
  masking = Masking(4, np.arange(40) < 5)
  tokens = np.full((200, 32), 7, np.int32)
  starts = np.zeros(tokens.shape, bool)
  starts[:, ::8] = True
  _, _, labels = masking.apply(tokens, starts, np.ones(tokens.shape, bool), np.random.default_rng(0))
  assert labels.shape[1] == 32 and (labels >= 0).sum() == pytest.approx(3200, rel=0.1)


def test_words_too_long_for_masks_leave_the_others_their_share():
  masking = Masking(4, np.arange(40) < 5)
  tokens = np.full((1000, 512), 7, np.int32)
  starts = np.ones(tokens.shape, bool)
  starts[:, 112:] = np.arange(400) % 100 == 0  # four words of 100 tokens, where 96 can be masked
  _, positions, labels = masking.apply(tokens, starts, np.ones(tokens.shape, bool), np.random.default_rng(0))
  real = labels >= 0
  assert labels.shape[1] == 96 and positions[real].max() < 112
  assert real.sum() / (1000 * 112) == pytest.approx(0.15, abs=0.012)


def test_spans_do_not_overlap_and_have_their_lengths():
  lengths = SpanLengths(34, 0.2)
  totals = np.repeat([1, 7, 8, 20, 63, 64, 300], 400)
  first, count = cut(totals, lengths, 32, np.random.default_rng(0))
  assert (first >= 0).all() and (first + count <= totals[:, None]).all()
  twins = totals < 8
  assert (count[twins] == totals[twins, None]).all()
  low = np.where(first[:, :1] <= first[:, 1:], [[0, 1]], [[1, 0]])
  begin, size = np.take_along_axis(first, low, 1), np.take_along_axis(count, low, 1)
  assert (begin[~twins, 0] + size[~twins, 0] <= begin[~twins, 1]).all()
  assert (count[~twins] >= 4).all() and (count[~twins] <= 32).all()
  # Nothing of a passage that is cut is lost, unless both spans were to be short.
  assert (count[totals == 20].sum(1) == 20).mean() > 0.95
  long = totals == 300
  assert (count[long] < 32).mean() == pytest.approx(0.2, abs=0.05)
  assert first[long].min() < 30 and (first + count)[long].max() > 270
  assert (first[long, 0] < first[long, 1]).mean() == pytest.approx(0.5, abs=0.08)


def test_of_a_cut_passage_up_to_a_quarter_is_in_neither_span():
  totals = np.repeat([8, 20, 32, 33, 50, 63], 400)
  _, count = cut(totals, SpanLengths(34, 0.0), 32, np.random.default_rng(0))
  lost = (totals - count.sum(1)) / totals
  assert (lost[totals <= 32] == 0).all() and lost.max() == pytest.approx(0.25, abs=0.02) and lost.min() == 0


def test_spans_that_may_overlap_are_drawn_each_by_itself():
  lengths = SpanLengths(34, 0.5, overlap=True)
  totals = np.repeat([1, 4, 20, 32, 300], 1000)
  first, count = cut(totals, lengths, 32, np.random.default_rng(0))
  assert (first >= 0).all() and (first + count <= totals[:, None]).all()
  for total in (1, 4):
    assert (count[totals == total] == total).all()
  assert (count[totals == 20] == 20).mean() == pytest.approx(0.5 + 0.5 * 12 / 28, abs=0.05)  # as it aims at 20 or more
  assert (count[totals >= 20] >= 4).all() and (count[totals == 300] == 32).mean() == pytest.approx(0.5, abs=0.05)
  begin, end = first[totals == 32], (first + count)[totals == 32]
  shared = np.minimum(end[:, 0], end[:, 1]) - np.maximum(begin[:, 0], begin[:, 1])
  assert (shared > 0).mean() > 0.75 and (shared < 0).any()
  assert np.corrcoef(first[totals == 300].T)[0, 1] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("overlap", [False, True])
def test_counts_of_passages_by_kind(roberta, tmp_path, overlap):
  lengths = SpanLengths(18, 0.0, overlap)  # 16 tokens of text
  written = [" ".join(["the"] * count) for count in (0, 1, 7, 8, 16, 17, 31, 32, 50)]
  store = store_of(Tokenizer(roberta), written, tmp_path / "store")
  assert store.lengths.tolist() == [0, 1, 7, 8, 16, 17, 31, 32, 50]
  found = batches_of([store], lengths=lengths).counts()
  wanted = {"twins": 4, "cut": 0, "whole": 4} if overlap else {"twins": 2, "cut": 4, "whole": 2}
  assert found == [{"empty": 1, **wanted}]
  first, count = cut(store.lengths[1:], lengths, 16, np.random.default_rng(0))
  same = (first[:, 0] == first[:, 1]) & (count[:, 0] == count[:, 1])
  assert same[: wanted["twins"]].all() and (overlap or not same[wanted["twins"] :].any())


@pytest.mark.parametrize("overlap", [False, True])
def test_spans_are_parts_of_their_passage_and_whole_words(tokenizer, tmp_path, overlap):
  store = store_of(tokenizer, texts(40, (1, 120)), tmp_path / "store")
  batches = batches_of([store], lengths=SpanLengths(32, 0.2, overlap))
  for step in range(4):
    batch, rows = batches[step], np.repeat(batches.draw(step).rows, 2)
    assert (batch["groups"][::2] == batch["groups"][1::2]).all()
    for row, tokens, length in zip(rows, batch["tokens"], batch["lengths"], strict=True):
      assert (tokens[0], tokens[length - 1]) == (*tokenizer.prefix, *tokenizer.suffix)
      assert (tokens[length:] == tokenizer.pad_id).all()
      part = tokens[1 : length - 1]
      starts = store.words(np.array([row]))
      places = np.flatnonzero((windows(store[row], len(part)) == part).all(1))
      ends = [*starts, True]
      assert any(
        (starts[p] and ends[p + len(part)]) or not starts[p + 1 : p + len(part)].any()  # or a part of one long word
        for p in places
      )


def test_where_two_spans_meet_no_word_is_lost(tokenizer, tmp_path, monkeypatch):
  monkeypatch.setattr(spans, "SHORTEST", 2)
  store = store_of(tokenizer, texts(40, (4, 14)), tmp_path / "store")
  batches = batches_of([store], lengths=SpanLengths(42, 0.0))  # 40 tokens of text: most passages are cut in two
  seen = 0
  for step in range(8):
    lengths, rows = batches[step]["lengths"].reshape(-1, 2) - 2, batches.draw(step).rows
    whole = store.lengths[rows]
    here = (whole >= 4) & (whole <= 53)  # three quarters of them fit a span
    np.testing.assert_array_equal(lengths.sum(1)[here], whole[here])
    seen += here.sum()
  assert seen > 30 and (store.words(np.arange(40)) == 0).sum() > 100


def test_masks_fall_on_whole_words_of_the_spans(tokenizer, tmp_path, monkeypatch):
  monkeypatch.setattr(masking_module, "RATE", 0.3)
  stores = [store_of(tokenizer, texts(20, (8, 30), seed), tmp_path / str(seed)) for seed in (1, 2)]
  words = [[np.cumsum(store.words(np.array([row]))) for row in range(20)] for store in stores]
  plain, masked, parts_of_words = batches_of(stores), batches_of(stores, Masking.of(tokenizer)), 0
  for step in range(3):
    before, after, drawn = plain[step], masked[step], masked.draw(step)
    chosen = np.zeros(before["tokens"].shape, bool)
    spans_of, places = np.nonzero(after["labels"] >= 0)
    chosen[spans_of, after["positions"][spans_of, places]] = True
    np.testing.assert_array_equal(after["labels"][spans_of, places], before["tokens"][chosen])
    np.testing.assert_array_equal(after["tokens"][~chosen], before["tokens"][~chosen])
    for span, (tokens, length) in enumerate(zip(before["tokens"], before["lengths"], strict=True)):
      corpus, row = drawn.corpora[span // 2], drawn.rows[span // 2]
      part, inside = tokens[1 : length - 1], chosen[span, 1 : length - 1]
      assert chosen[span].sum() == inside.sum(), "no mask outside of the text"
      starts = np.flatnonzero((windows(stores[corpus][row], len(part)) == part).all(1))
      numbers = [words[corpus][row][start : start + len(part)] for start in starts]
      whole_words = [n for n in numbers if all(len(set(inside[n == word])) == 1 for word in n)]
      assert whole_words
      parts_of_words += np.sum(inside[1:] & (np.diff(whole_words[0]) == 0))
  assert parts_of_words > 60  # so many masked tokens are not the first of their word


def test_batch_is_a_function_of_the_step_and_hosts_share_it(roberta, tmp_path):
  tokenizer = Tokenizer(roberta)
  store = store_of(tokenizer, texts(30, (1, 60)), tmp_path / "store")
  masking = Masking.of(tokenizer)
  batches = batches_of([store], masking)
  forward, again = list(batches.load(0, 6, workers=3)), batches_of([store], masking)
  for step in (5, 2):
    for name, value in again[step].items():
      np.testing.assert_array_equal(value, forward[step][name])
  assert (forward[0]["tokens"] != batches_of([store], masking, seed=4)[0]["tokens"]).any()
  hosts = [batches_of([store], masking, host=host, num_hosts=2)[1] for host in range(2)]
  for name, value in forward[1].items():
    parts = [host[name] for host in hosts]
    np.testing.assert_array_equal(parts[0] if name == "groups" else np.concatenate(parts), value)


def test_spans_of_one_text_are_one_group_in_all_corpora(tokenizer, tmp_path):
  written = texts(6, (8, 30))
  stores = [
    store_of(tokenizer, [*written, written[2]], tmp_path / "a"),
    store_of(tokenizer, written[::-1], tmp_path / "b"),
  ]
  batches = batches_of(stores, batch_size=26)  # every step all of both
  batch, drawn = batches[3], batches.draw(3)
  owners = [0, 1, 2, 3, 4, 5, 2], [5, 4, 3, 2, 1, 0]
  of = np.array([owners[corpus][row] for corpus, row in zip(drawn.corpora, drawn.rows, strict=True) for _ in range(2)])
  np.testing.assert_array_equal(batch["groups"][:, None] == batch["groups"], of[:, None] == of)


@pytest.mark.parametrize("sizes", [(5, 5000), (7, 5, 3000, 3)])
def test_every_corpus_is_a_stream_in_proportion_to_its_size(roberta, tmp_path, sizes):
  """A small one gives a passage every few steps."""
  tokenizer = Tokenizer(roberta)
  stores = [store_of(tokenizer, [*(f"the {row}" for row in range(n)), ""], tmp_path / str(n)) for n in sizes]
  masking = Masking.of(tokenizer)
  batches = batches_of(stores, masking, batch_size=16)
  assert [counts["empty"] for counts in batches.counts()] == [1] * len(sizes), "the empty text never comes"
  assert batches.steps_per_epoch == sum(sizes) / 8
  steps = 2 * sum(sizes) // 8
  drawn = [batches.draw(step) for step in range(steps)]
  assert {len(part.rows) for part in drawn} == {8}
  corpora, rows, epochs = (np.concatenate([part[i] for part in drawn]) for i in range(3))
  assert np.bincount(corpora) == pytest.approx(8 * steps * np.array(sizes) / sum(sizes), abs=len(sizes) - 1)
  for corpus, size in enumerate(sizes):
    here = rows[corpora == corpus]
    assert epochs[corpora == corpus].tolist() == [i // size for i in range(len(here))]  # no passage left out or again
    assert sorted(here[:size]) == list(range(size))
    assert batches.position(steps)[corpus] == dict(zip(("epoch", "passage"), divmod(len(here), size), strict=True))
  small = [step for step, part in enumerate(drawn) if sizes.index(5) in part.corpora]
  for step in (small[1] - 1, small[1]):  # without and with one
    batch, part = batches[step], batches.draw(step)
    texts_of = [stores[corpus][row].tolist() for corpus, row in zip(part.corpora, part.rows, strict=True)]
    assert batch["tokens"].shape == (16, 16) and len(set(batch["groups"])) == len(set(map(tuple, texts_of)))
    plain = batches_of(stores, batch_size=16)[step]
    assert [row[1 : length - 1].tolist() for row, length in zip(plain["tokens"], plain["lengths"], strict=True)] == [
      text for text in texts_of for _ in range(2)
    ]


def test_impossible_lengths_and_batches_are_refused(roberta, tmp_path):
  store = store_of(Tokenizer(roberta), ["the cat sat"], tmp_path / "store")
  with pytest.raises(InputError, match="spans are too short: 9. Set pretrain.span_tokens to 10 or more"):
    batches_of([store], lengths=SpanLengths(9))
  with pytest.raises(
    InputError, match="two pairs of spans at least.*: 7. Set pretrain.spans to 4 or more, a multiple of 2"
  ):
    batches_of([store], batch_size=7)
  empty = store_of(Tokenizer(roberta), [""], tmp_path / "empty")
  with pytest.raises(InputError, match="no passage has a token"):
    batches_of([empty])


def test_missing_mask_token_is_an_error(tmp_path):
  tiny.backbone(tmp_path)
  content = json.loads((tmp_path / "tokenizer.json").read_text())
  content["model"]["vocab"] = {k: v for k, v in content["model"]["vocab"].items() if k != "[MASK]"}
  content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "[MASK]"]
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  (tmp_path / "tokenizer_config.json").unlink()
  with pytest.raises(InputError, match="no mask token"):
    Masking.of(Tokenizer(tmp_path))


@pytest.mark.parametrize(("count", "neighbours"), [(1, 4), (3, 4), (40, 4), (41, 4), (43, 7), (64, 64)])
def test_neighbours_stay_together(count, neighbours):
  orders = [shuffled(count, neighbours, np.random.default_rng(seed)) for seed in range(9)]
  for order in orders:
    assert sorted(order) == list(range(count))
    begun = np.flatnonzero(np.diff(order, prepend=-2) != 1)  # where a row of neighbours begins
    whole = np.diff([*begun, count]) >= neighbours
    assert np.sum(~whole) <= 2  # what is left at the corpus' two ends
  if count > 2 * neighbours:
    assert len({tuple(order) for order in orders}) == 9
    borders = {row % neighbours for order in orders for row in order[np.flatnonzero(np.diff(order, prepend=-2) != 1)]}
    assert len(borders) > 1  # not the same rows in every epoch


def test_batches_of_neighbours_are_those_of_the_corpus_order(roberta, tmp_path):
  store = store_of(Tokenizer(roberta), texts(200, (20, 40)), tmp_path / "store")
  rows = batches_of([store], neighbours=4).draw(1).rows
  assert len(rows) == 16 and np.sum(np.diff(rows) == 1) >= 9
