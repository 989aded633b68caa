"""Denoising: traps for the text rule, margins and thresholds against loops, reasons and counts."""

from __future__ import annotations

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
from dptdr_jax.retrieval.texts import TextRule, normalise

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
  ("", f"In short - {POSITIVE.rstrip('.')}, - as a rule; one «unit» is 10 ml."),  # 13, with other punctuation
]
TRAPS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13]


def texts(rows):
  return [PASSAGES[row] for row in rows]


def make(path, rows, scores=None, positives=((0, 0),), rules=(), **options) -> tuple[Pool, Qrels]:
  """A pool of one source 'a' that ranks `rows` [Q, K] in this order, and its judgements."""
  rows = np.array(rows, np.int32)
  if scores is None:
    scores = np.where(rows < 0, -np.inf, -np.arange(rows.shape[1]))
  queries, passages = np.array(positives, np.int64).reshape(-1, 2).T
  qrels = Qrels.from_triples(queries, passages, np.ones(len(queries)), len(rows))
  run = Run(rows, np.asarray(scores, np.float32))
  return pool_from_runs(path, {"a": Source(run, rows.shape[1], **options)}, qrels, rules), qrels


def reasons_of(pool: Pool, query: int = 0) -> dict[int, str]:
  pairs = zip(pool.rows[query].tolist(), pool.reasons[query].tolist(), strict=True)
  return {row: Reason(reason).name for row, reason in pairs if row >= 0 and reason}


def test_candidates_with_a_positive_s_text_are_removed(tmp_path):
  pool, qrels = make(tmp_path / "p", [[0, *TRAPS]])
  assert 0 not in pool.candidates(0)  # the judged one is left out when runs are merged
  clean = denoise(tmp_path / "c", tmp_path / "p", [TextRule(qrels, texts)])
  assert reasons_of(clean) == dict.fromkeys([1, 2, 3, 4, 5, 6], "SAME_TEXT") | {7: "CONTAINS", 13: "CONTAINS"}
  assert clean.candidates(0).tolist() == [8, 9]
  removed = {"SAME_TEXT": {"all": 6, "a": 6}, "CONTAINS": {"all": 2, "a": 2}}
  assert clean.manifest["denoising"] == [{"rule": "text", "contains_from": 40, "unjudged": 0, "removed": removed}]
  assert clean.manifest["kept"] == 2 and clean.manifest["emptied"] == 0


def test_rules_while_merging_are_rules_afterwards(tmp_path, monkeypatch):
  monkeypatch.setattr(candidates, "BLOCK_ENTRIES", 20)
  rows, scores = [[1, 9, 7], [9, 12, -1], [13, 8, 9]], [[9, 8, 7], [5, 4, -np.inf], [3, 2, 1]]
  known = np.array([8.5, 4.5, np.nan], np.float32)
  options = {"positives": [(0, 0), (1, 10), (2, 0)], "positive_scores": known}
  _, qrels = make(tmp_path / "p", rows, scores, **options)
  rules = [TextRule(qrels, texts), MarginRule("a", 0.9)]
  after = denoise(tmp_path / "after", tmp_path / "p", rules)
  make(tmp_path / "while", rows, scores, rules=rules, **options)
  for path in (tmp_path / "after").iterdir():
    assert path.read_bytes() == (tmp_path / "while" / path.name).read_bytes(), path.name
  assert [after.candidates(query).tolist() for query in range(3)] == [[], [], [8, 9]]


def test_short_positive_can_be_equal_but_not_contained(tmp_path):
  _, qrels = make(tmp_path / "p", [[11, 12, 9]], positives=[(0, 10)])
  assert denoise(tmp_path / "c", tmp_path / "p", [TextRule(qrels, texts)]).candidates(0).tolist() == [11, 9]


@pytest.mark.parametrize(("cached", "at_once"), [(10_000, 1), (1, 1), (1, 100)])
def test_every_positive_counts_and_cached_passages_are_not_read_again(tmp_path, monkeypatch, cached, at_once):
  monkeypatch.setattr(retrieval_texts, "_CACHED", cached)
  monkeypatch.setattr(retrieval_texts, "_QUERIES", at_once)
  read = []

  def reading(rows):
    read.append(rows.tolist())
    return texts(rows)

  rows = [[1, 12, 9, 11], [12, 9, 1, -1], [-1, -1, -1, -1], [9, 12, -1, -1]]
  _, qrels = make(tmp_path / "p", rows, positives=[(0, 0), (0, 10), (1, 10), (2, 0)])
  clean = denoise(tmp_path / "c", tmp_path / "p", [TextRule(qrels, reading)])
  assert [clean.candidates(query).tolist() for query in range(4)] == [[9, 11], [9, 1], [], [9, 12]]
  assert read == [[0, 1, 9, 10, 11, 12], *([[1, 9, 10, 12]] if cached == at_once else [])]
  assert clean.manifest["denoising"][0]["unjudged"] == 2  # query 3 has no positive to compare with


def test_normalised_text_has_no_punctuation_case_or_compatibility_forms():
  assert normalise(" A\u00a0 ﬁne\n\tSTRASSE Straße ") == "a fine strasse strasse"
  assert normalise("e\u0301") == normalise("É") == "é"
  assert normalise("plain  ASCII\x1ftext") == "plain ascii text"
  assert normalise("- A man's «re-reading», 3.5_x!") == normalise("a Man s re reading 3 5 x")
  assert normalise("हिन्दी।") == "हिन्दी", "marks are parts of letters"
  assert normalise(" + !") == "+ !" and normalise("«» …") == "«» ..."


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
  rule = MarginRule("dense", relative=0.9)
  pool = denoise(tmp_path / "c", tmp_path / "p", [rule])
  assert before == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "p").iterdir()}
  counted, unjudged = np.zeros(3, int), 0
  for query in range(queries):
    for place in np.flatnonzero(pool.rows[query] >= 0):
      score, positive = pool.scores[query, place, 1], known[query]
      expected = Reason.RELATIVE_MARGIN if score > positive - np.float32(0.1) * abs(positive) else 0
      unjudged += np.isnan(positive) or score == -np.inf
      assert pool.reasons[query, place] == expected
      if expected:
        bits = int(pool.sources[query, place])
        counted += [1, bits & 1, bits >> 1]
  applied = pool.manifest["denoising"][0]
  assert applied["rule"] == "margins" and applied["relative"] == 0.9 and applied["source"] == "dense"
  assert list(applied["removed"]["RELATIVE_MARGIN"].values()) == counted.tolist()
  assert counted[0] > 5 and applied["unjudged"] == unjudged > 20


@pytest.mark.parametrize(("positive", "share", "threshold"), [(-2.0, 0.75, -2.5), (-2.0, 1.0, -2.0), (0.0, 0.75, 0.0)])
def test_margin_of_a_negative_score_is_as_wide(tmp_path, positive, share, threshold):
  scores = [1.0, -1.9, -2.1, -2.4, -2.6]
  make(tmp_path / "p", [range(7, 12)], [scores], positive_scores=np.array([positive], np.float32))
  pool = denoise(tmp_path / "r", tmp_path / "p", [MarginRule("a", relative=share)])
  above = [row for row, score in zip(range(7, 12), scores, strict=True) if score > threshold]
  assert reasons_of(pool) == dict.fromkeys(above, "RELATIVE_MARGIN")


def test_margin_uses_the_best_positive_of_the_run(tmp_path):
  # the best of two positives, rows 0 and 3, scores 4; 9 and 6 are above half of it, 5 is not; query 1 has no positive
  rows, scores = [[9, 0, 6, 3, 5], [9, 6, -1, -1, -1]], [[5, 4, 3, 2, 1], [9, 8, -np.inf, -np.inf, -np.inf]]
  make(tmp_path / "p", rows, scores, positives=[(0, 0), (0, 3), (1, 7)])
  pool = denoise(tmp_path / "c", tmp_path / "p", [MarginRule("a", relative=0.5)])
  assert reasons_of(pool) == dict.fromkeys([9, 6], "RELATIVE_MARGIN") and not reasons_of(pool, 1)


def test_cross_encoder_keeps_only_what_it_finds_irrelevant(tmp_path):
  make(tmp_path / "p", [[1, 2, 3, 4, 5, 6, -1]])
  scores = np.array([[0.05, 0.1, 0.5, 0.9, 0.95, np.nan, 7]], np.float32)  # the number at a fill is not looked at
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
  with pytest.raises(InputError, match=r"manifest.json: no such file"):  # an unfinished pool is none
    Pool.open(tmp_path / "s")


def test_first_rule_that_hits_wins_and_pools_are_denoised_again(tmp_path):
  _, qrels = make(tmp_path / "p", [[1, 7, 9, 11]], [[9, 8, 7, 1]], positive_scores=np.array([6], np.float32))
  rules = [TextRule(qrels, texts), MarginRule("a", relative=0.95), MarginRule("a", relative=0.1)]
  pool = denoise(tmp_path / "c", tmp_path / "p", rules)
  removed = {1: "SAME_TEXT", 7: "CONTAINS", 9: "RELATIVE_MARGIN", 11: "RELATIVE_MARGIN"}
  assert reasons_of(pool) == removed and pool.manifest["emptied"] == 1
  first = denoise(tmp_path / "f", tmp_path / "p", rules[:1])
  assert first.candidates(0).tolist() == [9, 11]
  second = denoise(tmp_path / "d", tmp_path / "f", rules[1:])
  np.testing.assert_array_equal(second.reasons, pool.reasons)
  assert second.manifest["denoising"] == pool.manifest["denoising"] and second.manifest["kept"] == 0
  assert second.manifest["emptied"] == 1


def test_bad_margins_are_named(tmp_path):
  make(tmp_path / "p", [[1, 2]])
  with pytest.raises(InputError, match="a share above 0"):
    MarginRule("a", relative=0)
  with pytest.raises(InputError, match="no such source"):
    denoise(tmp_path / "c", tmp_path / "p", [MarginRule("b", relative=0.9)])
