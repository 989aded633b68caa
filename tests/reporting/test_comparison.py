"""Arms of an ablation: statistics against measures.py, and what the tables say."""

import numpy as np
import pytest

from dptdr_jax.reporting import comparison, tables
from dptdr_jax.retrieval import measures

QUERIES = [f"q{row}" for row in range(40)]
NAMED = {"dev": "RR@10"}


def values(seed: int) -> dict[str, np.ndarray]:
  generator = np.random.default_rng(seed)
  return {name: generator.random(len(QUERIES)) for name in ("R@100", "RR@10")}


ARMS = {
  "plain": comparison.Arm({0: values(0), 1: values(1)}, 1_000, QUERIES),
  "unm": comparison.Arm({0: values(2), 1: values(3)}, 1_000, QUERIES),
  "$P$ | 2": comparison.Arm({1: values(4), 7: values(5)}, 500_000, QUERIES),
  "others": comparison.Arm({0: values(6)}, 2_000, QUERIES[::-1]),
  "late": comparison.Arm({9: values(7)}, 2_000, QUERIES),
}


@pytest.fixture(scope="module")
def systems():
  return comparison.compare({"BM25": values(8)}, ARMS, "RR@10", "plain")


def test_means_spread_and_interval_are_over_seeds(systems):
  assert list(systems) == ["BM25", *ARMS] and systems["BM25"]["parameters"] == 0 and systems["BM25"]["seeds"] == 1
  by_seed = [run["RR@10"] for run in ARMS["unm"].values.values()]
  assert systems["unm"]["means"]["RR@10"] == pytest.approx(np.mean(by_seed)) and systems["unm"]["seeds"] == 2
  assert systems["unm"]["spread"] == pytest.approx(sorted(each.mean() for each in by_seed))
  assert systems["unm"]["interval"] == measures.bootstrap_interval(np.mean(by_seed, axis=0))


def test_differences_are_over_common_seeds_and_queries(systems):
  assert [name for name in systems if "difference" in systems[name]] == ["unm", "$P$ | 2"]
  here, there = (np.mean([ARMS[arm].values[seed]["RR@10"] for seed in (0, 1)], axis=0) for arm in ("unm", "plain"))
  assert systems["unm"]["difference"] == comparison.difference(here, there) | {"seeds": 2}
  assert systems["unm"]["difference"]["p"] == measures.randomisation_test(here, there)
  alone = comparison.difference(values(4)["RR@10"], values(1)["RR@10"])
  assert systems["$P$ | 2"]["difference"] == alone | {"seeds": 1}


def test_markdown_has_a_row_for_each_system_and_says_if_the_reference_is_missing(systems):
  text = comparison.markdown({"dev": systems}, NAMED, "plain")
  rows = [line for line in text.splitlines() if line.startswith("|")]
  assert rows[0].startswith("|  | parameters | seeds | RR@10 [95 %] | R@100 | over seeds |") and len(rows) == 8
  assert "| $P$ \\| 2 | 500,000 | 2 |" in text and "are against plain, query by query" in text
  alone = {"dev": comparison.compare({}, {"unm": ARMS["unm"]}, "RR@10", "plain")}
  assert "No differences: the first arm, plain, has no" in comparison.markdown(alone, NAMED, "plain")


def test_html_has_the_plot_and_the_table(systems):
  text = comparison.html({"dev": systems}, NAMED, "plain")
  assert text.count("<svg") == 1 and ">500k<" in text and "<td>500,000</td>" in text
  assert text.count("$P$ | 2") == 2, "as it is written, in the plot and in the table"


def test_paired_table_escapes_names():
  about = {"mean": -0.125, "interval": [-0.5, 0.25], "p": 0.04}
  head, _, row = tables.paired("dev, against a|b", [("runs/c", "RR@10", 0.5, 0.375, about)]).splitlines()
  assert head == "| dev, against a\\|b | measure | reference | system | difference [95 %] | p |"
  assert row == "| runs/c | RR@10 | 0.5000 | 0.3750 | -0.1250 [-0.5000, +0.2500] | 0.0400 |"
