"""The table that a run ends with and the report page, of the same results."""

import re
import types
from xml.etree import ElementTree

import numpy as np
import pytest

from dptdr_jax.reporting import examples, page, tables

RESULTS = {
  "bm25": {"dev": {"RR@10": 0.25, "R@100": 0.5}},
  "train1": {"dev": {"RR@10": 0.5}, "test": {"RR(rel=2)@10": 0.75}},
}
SUMMARY = {
  "passages": 12_345,
  "queries": {"dev": 1_000, "test": 43},
  "labels": {"bm25": "BM25", "train1": "trained retriever"},
  "intervals": {
    system: {split: {name: (mean - 0.1, mean + 0.1) for name, mean in means.items()} for split, means in of.items()}
    for system, of in RESULTS.items()
  },
  "trained_parameters": 50,
  "backbone_parameters": 20_000,
}
RECORDS = [{"step": 10, "loss": 2.0, "positive_score": 0.5}, {"step": 20, "loss": None, "dev/RR@10": 0.25}]


def test_table_has_a_row_for_each_system_and_ends_as_told():
  lines = tables.results(RESULTS, SUMMARY, {"train1": 1234.4}, ["report: here"]).splitlines()
  head, bm25, trained = lines[1:4]
  assert lines[0] == "dev (1,000 queries, 12,345 passages)" and lines[4] == "test (43 queries, 12,345 passages)"
  assert head.split() == ["RR@10", "R@100"] and bm25.split() == ["BM25", "0.2500", "0.5000"]
  assert trained.split() == ["trained", "retriever", "0.5000", "–"] and len(head) == len(bm25) == len(trained)
  assert lines[7:] == ["trained: 50 parameters, 0.25% of the backbone's 20,000", "time: train1 1,234 s", "report: here"]
  same = tables.results(RESULTS, SUMMARY | {"labels": {"bm25": "B" * 60, "train1": "B" * 60}}, {}, []).splitlines()
  assert len({len(line) for line in same[1:4]}) == 1 and same[2] != same[3], "labels may be long, or the same"
  assert tables.results(None, None, {"pretrain": 2.0}, ["backbone: b"]) == "time: pretrain 2 s\nbackbone: b"


def check(text: str) -> None:
  """Fails for an element that is not closed, or closed in the wrong order."""
  text = text.removeprefix("<!doctype html>\n").replace("<details open", "<details")
  ElementTree.fromstring(re.sub("<(meta|br)([^>]*)>", r"<\1\2/>", text))


@pytest.fixture(scope="module")
def rendered(about, passages, split_of):
  run = types.SimpleNamespace(rows=np.array([[5, 0], [0, 1], [0, 1]]), scores=np.ones((3, 2)))
  arguments = {
    "facts": ["backbone <b>"], "results": RESULTS, "summary": SUMMARY, "pools": [("Negatives of round 1", about)],
    "curves": [("Training, round 1", RECORDS), ("Cross-encoder", [])],
    "refreshed": [("round 1", {1000: about, 2000: about, 3000: about}), ("round 2", {5: about})],
    "examples": examples.choose(split_of([5, 6], [], [7]), passages, run),
  }  # fmt: skip
  text = page.render("run & <i>", **arguments)
  assert text == page.render("run & <i>", **arguments), "the same bytes"
  return text


def test_page_is_well_formed_escaped_and_needs_no_other_file(rendered):
  check(rendered)
  assert not re.search(r'<script|<link|@import|url\((?!#)|(src|href)="(?!#)', rendered)
  assert "<title>run &amp; &lt;i&gt;</title>" in rendered and "backbone &lt;b&gt;" in rendered
  assert "&lt;odd&gt;" in rendered and "<i>" not in rendered and "<b>?" not in rendered


def test_page_shows_measures_negatives_and_queries(rendered):
  assert re.findall("<h2>(.*?)</h2>", rendered) == [
    "Measures", "Training, round 1", "Cross-encoder", "Negatives mined during round 1", "Negatives of round 1",
    "Negatives of round 1 from step 1,000", "Negatives of round 1 from step 3,000", "Negatives of round 2 from step 5",
    "Queries and their top passages",
  ]  # fmt: skip
  for part in (
    '<td class="best">0.5000<br><small>[0.400, 0.600]</small></td>', "<td>0.2500<br>", "<td>–</td>",
    "<th>RR(rel=2)@10</th>", "trained: 50 par", "No step was logged", "bm25: score over", "first relevant at rank 1",
  ):  # fmt: skip
    assert part in rendered
  assert [rendered.count(f'<details open class="{verdict}">') for verdict in ("right", "wrong")] == [1, 2]
  assert rendered.count("wanted: <b>") == 1, "the second query has no judgement"


def test_page_of_a_run_without_queries_has_facts_and_the_curves_of_known_metrics():
  text = page.render("run", facts=["backbone b"], curves=[("Pretraining", RECORDS)])
  check(text)
  assert re.findall("<h2>(.*?)</h2>", text) == ["Pretraining"] and "<li>backbone b</li>" in text
  assert re.findall("<figcaption>(.*?)</figcaption>", text) == ["Loss", "dev/RR@10"] and text.count("<svg") == 2
