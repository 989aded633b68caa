"""What is said of the pool of conftest.py."""

import json

import numpy as np

from dptdr_jax.reporting import negatives


def test_histograms_count_scores_over_the_positives_score(about):
  def counted(*ratios):
    return np.histogram(np.clip(np.float32(ratios), 0, 1.5), negatives.EDGES)[0].tolist()

  assert json.loads(json.dumps(about)) == about, "plain data"
  # bm25 has no positive score above 0 for queries 1 and 2; dense has candidates of queries 0 and 2 alone.
  assert about["histograms"]["bm25"] == {"kept": counted(0.5), "removed": counted(0.95, 0.8)}
  assert about["histograms"]["dense"] == {"kept": counted(0.5, 0.5, 0.75), "removed": counted(0.99, 0.99, 0.99, 0.25)}
  assert about["without_ratio"] == {"bm25": 2, "dense": 0}


def test_examples_show_trainable_queries_with_reasons_and_scores(about):
  first, last = about["examples"]
  assert [first["query"], last["query"]] == ["query 0 <b>?", "query 2 <b>?"]
  assert first["positive"]["id"] == "p5" and first["positive"]["scores"] == {"bm25": 10.0, "dense": 1.0}
  assert len(first["positive"]["text"]) == 300 and first["positive"]["text"].endswith("…")
  assert [passage["id"] for passage in first["removed"]] == ["p0", "p1", "p2"]
  reasons = [passage["reason"] for passage in first["removed"] + last["removed"]]
  assert reasons == ["bm25: relative margin", "dense: relative margin", "dense: relative margin", "same text"]
  assert first["removed"][2]["scores"] == {"dense": 0.99}, "unknown scores are left out"
  assert (first["num_negatives"], first["num_removed"]) == (1, 3) and len(first["negatives"]) == 1


def test_tables_say_where_candidates_come_from_and_why_some_go(about):
  (_, counts), (head, removed) = negatives.tables(about)
  assert (counts := dict(counts))["candidates"] == "9,000" and counts["from bm25 + dense"] == "7"
  assert counts["queries that dense does not answer"] == "1" and "queries that bm25 does not answer" not in counts
  assert counts["queries not in bm25's histogram: no positive scores above 0"] == "2"
  assert head == ["removed by", "all", "bm25", "dense"]
  assert removed == [
    ["text: same text", "1", "1", "1"],
    ["text: not judged, kept", "2", "", ""],
    ["margins of bm25: relative margin", "1", "1", "1"],
    ["margins of dense: relative margin", "2", "1", "2"],
  ]
  assert len(negatives.tables(about | {"denoising": []})) == 1
  _, rows = negatives.overview({20: about | {"kept": 1}, 4: about})
  assert rows == [["4", "9,000", "3", "5", "0"], ["20", "9,000", "3", "1", "0"]]
