"""Denoising: hand-made traps for the text rules, margins and thresholds against loops, reasons and counts."""

import hashlib

import numpy as np
import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval import candidates
from dptdr_jax.retrieval import texts as retrieval_texts
from dptdr_jax.retrieval.candidates import Pool, Reason
from dptdr_jax.retrieval.denoise import CrossEncoderRule, MarginRule, denoise
from dptdr_jax.retrieval.merge import Source, pool_from_runs
from dptdr_jax.retrieval.qrels import Qrels
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retrieval.texts import TextRule, normalise, shingles, similarity

POSITIVE = "The liver breaks down alcohol at about one unit an hour."
PASSAGES = [
  ("Alcohol", POSITIVE),  # 0, the positive
  ("Alcohol", POSITIVE),  # 1, a duplicate under another id
  ("", POSITIVE),  # 2, without its title
  ("Drinking", POSITIVE),  # 3, under another title
  ("", "  the LIVER breaks\tdown\n\nalcohol at about\u00a0one unit an hour. "),  # 4, white space and case
  ("", "Ｔｈｅ liver breaks down alcohol at about one unit an hour."),  # 5, full-width letters
  ("", f"Alcohol {POSITIVE}"),  # 6, the title in the text
  ("Q&A", f"How fast? {POSITIVE} Coffee does not help."),  # 7, the positive inside a longer passage
  ("", "The liver breaks down alcohol at roughly one unit an hour."),  # 8, a word changed
  ("Alcohol", "The kidneys clear very little of it."),  # 9, another passage of the page
  ("", "Yes."),  # 10, a short positive (of query 1)
  ("", "Yes. Take it with food, twice a day."),  # 11, which contains it
  ("", "YES."),  # 12, which equals it
  ("", f"In short - {POSITIVE.rstrip('.')}, - as a rule; one «unit» is 10 ml."),  # 13, within other signs
]
TRAPS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13]


def texts(rows):
  return [PASSAGES[row] for row in rows]


def make(path, rows, scores=None, positives=((0, 0),), **options) -> Pool:
  """A pool of one source 'a' that ranks `rows` [Q, K] in this order."""
  rows = np.array(rows, np.int32)
  if scores is None:
    scores = np.where(rows < 0, -np.inf, -np.arange(rows.shape[1]))
  queries, passages = np.array(positives, np.int64).reshape(-1, 2).T
  qrels = Qrels.from_triples(queries, passages, np.ones(len(queries)), len(rows))
  run = Run(rows, np.asarray(scores, np.float32))
  return pool_from_runs(path, {"a": Source(run, rows.shape[1], **options)}, qrels), qrels


def reasons_of(pool: Pool, query: int = 0) -> dict[int, str]:
  found = zip(pool.rows[query].tolist(), pool.reasons[query].tolist(), strict=True)
  return {row: Reason(reason).name for row, reason in found if row >= 0 and reason}


def test_traps_of_text(tmp_path):
  pool, qrels = make(tmp_path / "p", [[0, *TRAPS]])
  assert 0 not in pool.candidates(0)  # the judged one goes when runs are merged
  clean = denoise(tmp_path / "c", tmp_path / "p", [TextRule(qrels, texts)])
  expected = dict.fromkeys([1, 2, 3, 4, 5, 6], "SAME_TEXT") | {7: "CONTAINS", 13: "CONTAINS"}
  assert reasons_of(clean) == expected
  assert clean.candidates(0).tolist() == [8, 9]
  assert clean.manifest["denoising"] == [
    {
      "rule": "text", "contains_from": 40, "near_duplicate": None, "shingle": 3, "unjudged": 0,
      "removed": {
        "SAME_TEXT": {"all": 6, "a": 6}, "CONTAINS": {"all": 2, "a": 2}, "NEAR_DUPLICATE": {"all": 0, "a": 0}
      },
    }
  ]  # fmt: skip
  assert clean.manifest["kept"] == 2 and clean.manifest["emptied"] == 0
  near = denoise(tmp_path / "n", tmp_path / "p", [TextRule(qrels, texts, near_duplicate=0.4)])
  assert reasons_of(near) == expected | {8: "NEAR_DUPLICATE"}
  never = denoise(tmp_path / "x", tmp_path / "p", [TextRule(qrels, texts, contains_from=None)])
  assert 7 in never.candidates(0)


def test_a_short_positive_contains_nothing_but_equals(tmp_path):
  pool, qrels = make(tmp_path / "p", [[11, 12, 9]], positives=[(0, 10)])
  assert denoise(tmp_path / "c", tmp_path / "p", [TextRule(qrels, texts)]).candidates(0).tolist() == [11, 9]
  bold = denoise(tmp_path / "b", tmp_path / "p", [TextRule(qrels, texts, contains_from=3)])
  assert reasons_of(bold) == {11: "CONTAINS", 12: "SAME_TEXT"}
  assert len(pool.candidates(0)) == 3


@pytest.mark.parametrize(("kept", "at_once"), [(10_000, 1), (1, 1), (1, 100)])
def test_every_positive_counts_and_passages_met_lately_are_not_read_again(tmp_path, monkeypatch, kept, at_once):
  monkeypatch.setattr(retrieval_texts, "_KEPT", kept)
  monkeypatch.setattr(retrieval_texts, "_AT_ONCE", at_once)
  read = []

  def reading(rows):
    read.append(rows.tolist())
    return texts(rows)

  rows = [[1, 12, 9, 11], [12, 9, 1, -1], [-1, -1, -1, -1], [9, 12, -1, -1]]
  _, qrels = make(tmp_path / "p", rows, positives=[(0, 0), (0, 10), (1, 10), (2, 0)])
  clean = denoise(tmp_path / "c", tmp_path / "p", [TextRule(qrels, reading)])
  assert [clean.candidates(query).tolist() for query in range(4)] == [[9, 11], [9, 1], [], [9, 12]]
  assert read == [[0, 1, 9, 10, 11, 12], *([[1, 9, 10, 12]] if kept == at_once else [])]
  assert clean.manifest["denoising"][0]["unjudged"] == 2  # query 3 has no positive to compare with


def test_normalised_text():
  assert normalise(" A\u00a0 ﬁne\n\tSTRASSE Straße ") == "a fine strasse strasse"
  assert normalise("e\u0301") == normalise("É") == "é"
  assert normalise("plain  ASCII\x1ftext") == "plain ascii text"
  assert normalise("- A man's «re-reading», 3.5_x!") == normalise("a Man s re reading 3 5 x")
  assert normalise("हिन्दी।") == "हिन्दी", "marks are parts of letters"
  assert normalise(" + !") == "+ !" and normalise("«» …") == "«» ..."


def test_similarity_of_shingles():
  first, second = shingles("a b c d e", 3), shingles("a b c d x", 3)
  assert first == {("a", "b", "c"), ("b", "c", "d"), ("c", "d", "e")}
  assert similarity(first, second) == 2 / 4 and similarity(first, first) == 1
  assert shingles("a b", 3) == {("a", "b")}


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.6, 1.0])
def test_near_duplicates_are_those_of_their_similarity(tmp_path, threshold):
  random = np.random.default_rng(1)
  words = np.array(list("abcdef"))
  positive = " ".join(random.choice(words, 30))
  passages = [positive]
  for changes in range(30):  # from nearly the same to nearly random
    copy = np.array(positive.split())
    copy[random.choice(30, changes, replace=False)] = random.choice([*words, "x", "y"], changes)
    passages.append(" ".join(copy[: 30 - changes // 3]) + " z")
  pool, qrels = make(tmp_path / "p", [list(range(1, 31))])
  rule = TextRule(qrels, lambda rows: [("", passages[row]) for row in rows], None, threshold, shingle=2)
  pool = denoise(tmp_path / "c", tmp_path / "p", [rule])
  values = {row: similarity(shingles(passages[row], 2), shingles(positive, 2)) for row in range(1, 31)}
  assert set(reasons_of(pool)) == {row for row, value in values.items() if value >= threshold}
  assert min(values.values()) < 0.3 and max(values.values()) > 0.9


def test_margins_against_a_loop(tmp_path, monkeypatch):
  monkeypatch.setattr(candidates, "BLOCK_ENTRIES", 40)
  random = np.random.default_rng(0)
  queries, depth = 30, 8
  rows = np.stack([random.permutation(50)[:depth] for _ in range(queries)])
  rows[random.random(rows.shape) < 0.2] = -1
  run = Run.ranked(rows, random.normal(size=rows.shape))
  known = random.normal(size=queries).astype(np.float32)
  known[::5] = np.nan
  other = Run.ranked(random.permuted(rows, axis=1)[:, :4], random.normal(size=(queries, 4)))
  nothing = np.zeros(0, np.int64)
  sources = {"bm25": Source(other, 4), "dense": Source(run, 5, positive_scores=known)}
  pool_from_runs(tmp_path / "p", sources, Qrels.from_triples(nothing, nothing, nothing, queries))
  before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "p").iterdir()}
  rule = MarginRule("dense", relative=0.9, absolute=0.25)
  pool = denoise(tmp_path / "c", tmp_path / "p", [rule])
  assert before == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "p").iterdir()}
  counted = {"RELATIVE_MARGIN": np.zeros(3, int), "ABSOLUTE_MARGIN": np.zeros(3, int)}
  unjudged = 0
  for query in range(queries):
    for place in np.flatnonzero(pool.rows[query] >= 0):
      score, positive = pool.scores[query, place, 1], known[query]
      expected = 0
      if score > positive - np.float32(0.1) * abs(positive):
        expected = Reason.RELATIVE_MARGIN
      elif not np.isnan(positive) and score > positive - np.float32(0.25):
        expected = Reason.ABSOLUTE_MARGIN
      unjudged += np.isnan(positive) or score == -np.inf
      assert pool.reasons[query, place] == expected
      if expected:
        bits = int(pool.sources[query, place])
        counted[expected.name] += [1, bits & 1, bits >> 1]
  applied = pool.manifest["denoising"][0]
  assert applied["rule"] == "margins" and applied["relative"] == 0.9 and applied["source"] == "dense"
  assert {name: list(taken.values()) for name, taken in applied["removed"].items()} == {
    name: taken.tolist() for name, taken in counted.items()
  }
  assert all(counted[name][0] > 5 for name in counted) and applied["unjudged"] == unjudged > 20


@pytest.mark.parametrize(("positive", "share", "threshold"), [(-2.0, 0.75, -2.5), (-2.0, 1.0, -2.0), (0.0, 0.75, 0.0)])
def test_a_share_of_a_score_that_is_not_positive(tmp_path, positive, share, threshold):
  scores = [1.0, -1.9, -2.1, -2.4, -2.6]
  make(tmp_path / "p", [range(7, 12)], [scores], positive_scores=np.array([positive], np.float32))
  pool = denoise(tmp_path / "r", tmp_path / "p", [MarginRule("a", relative=share)])
  above = [row for row, score in zip(range(7, 12), scores, strict=True) if score > threshold]
  assert reasons_of(pool) == dict.fromkeys(above, "RELATIVE_MARGIN")


def test_positives_in_the_run_give_the_score_that_margins_want(tmp_path):
  # the best of two positives, rows 0 and 3, scores 4; 9 and 6 are above a half of it, 5 is not; 1 knows nothing
  rows, scores = [[9, 0, 6, 3, 5], [9, 6, -1, -1, -1]], [[5, 4, 3, 2, 1], [9, 8, -np.inf, -np.inf, -np.inf]]
  make(tmp_path / "p", rows, scores, positives=[(0, 0), (0, 3), (1, 7)])
  pool = denoise(tmp_path / "c", tmp_path / "p", [MarginRule("a", relative=0.5)])
  assert reasons_of(pool) == dict.fromkeys([9, 6], "RELATIVE_MARGIN") and not reasons_of(pool, 1)


def test_cross_encoder_keeps_only_what_it_is_sure_of(tmp_path):
  make(tmp_path / "p", [[1, 2, 3, 4, 5, 6, -1]])
  scores = np.array([[0.05, 0.1, 0.5, 0.9, 0.95, np.nan, 7]], np.float32)  # what stands at fills is not looked at
  pool = denoise(tmp_path / "c", tmp_path / "p", [CrossEncoderRule(scores)])
  assert pool.candidates(0).tolist() == [1] and pool.pseudo_positives(0).tolist() == [5]
  assert reasons_of(pool) == dict.fromkeys([2, 3, 4], "CROSS_ENCODER") | {5: "PSEUDO_POSITIVE", 6: "NOT_SCORED"}
  applied = pool.manifest["denoising"][0]
  assert applied["removed"]["NOT_SCORED"] == {"all": 1, "a": 1} and applied["unjudged"] == 0
  strict = denoise(tmp_path / "s", tmp_path / "p", [CrossEncoderRule(scores, 0.05, 0.5)])
  assert strict.candidates(0).tolist() == [] and strict.pseudo_positives(0).tolist() == [4, 5]
  assert strict.manifest["emptied"] == 1
  scores[0, 2] = 1.5
  with pytest.raises(InputError, match="no probability: 1.5"):
    denoise(tmp_path / "s", tmp_path / "p", [CrossEncoderRule(scores)])
  assert Pool.open(tmp_path / "s").reasons.tolist() == strict.reasons.tolist()


def test_the_first_rule_that_hits_wins_and_pools_are_denoised_again(tmp_path):
  _, qrels = make(tmp_path / "p", [[1, 7, 9, 11]], [[9, 8, 7, 1]], positive_scores=np.array([6], np.float32))
  rules = [TextRule(qrels, texts), MarginRule("a", relative=0.95), MarginRule("a", absolute=5.5)]
  pool = denoise(tmp_path / "c", tmp_path / "p", rules)
  removed = {1: "SAME_TEXT", 7: "CONTAINS", 9: "RELATIVE_MARGIN", 11: "ABSOLUTE_MARGIN"}
  assert reasons_of(pool) == removed and pool.manifest["emptied"] == 1
  first = denoise(tmp_path / "c", tmp_path / "p", rules[:1])
  assert first.candidates(0).tolist() == [9, 11]
  second = denoise(tmp_path / "d", tmp_path / "c", rules[1:])
  np.testing.assert_array_equal(second.reasons, pool.reasons)
  assert second.manifest["denoising"] == pool.manifest["denoising"] and second.manifest["kept"] == 0
  assert second.manifest["emptied"] == 1


def test_bad_rules_are_named(tmp_path):
  _, qrels = make(tmp_path / "p", [[1, 2]])
  for arguments, what in (
    ({}, "without a relative or an absolute"),
    ({"relative": 0}, "a share above 0"),
    ({"absolute": np.inf}, "a finite number"),
  ):
    with pytest.raises(InputError, match=what):
      MarginRule("a", **arguments)
  with pytest.raises(InputError, match="0 ≤ negative_below"):
    CrossEncoderRule(np.zeros((1, 2)), 0.5, 0.4)
  for arguments, what in (({"contains_from": 0}, "from 1"), ({"near_duplicate": 1.1}, "at most 1"),
                          ({"shingle": 0}, "at least 1 word")):  # fmt: skip
    with pytest.raises(InputError, match=what):
      TextRule(qrels, texts, **arguments)
  for rule, error, what in (
    (MarginRule("b", relative=0.9), InputError, "no such source"),
    (CrossEncoderRule(np.zeros((1, 3))), ValueError, "for candidates"),
    (TextRule(qrels, lambda rows: []), ValueError, "0 texts for 3 passage rows"),
    (TextRule(Qrels.from_triples([], [], [], 3), texts), ValueError, "judgements of 3"),
  ):
    with pytest.raises(error, match=what):
      denoise(tmp_path / "c", tmp_path / "p", [rule])
  with pytest.raises(ValueError, match="onto itself"):
    denoise(tmp_path / "p", tmp_path / "p", [])
  (tmp_path / "p" / "positive_scores.npy").unlink()
  with pytest.raises(InputError, match="no scores of positives"):
    denoise(tmp_path / "c", tmp_path / "p", [MarginRule("a", relative=0.9)])
  assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]
