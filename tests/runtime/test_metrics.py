"""metrics.jsonl ends the same whether a run was interrupted or not."""

import json

import pytest

from dptdr_jax.runtime.metrics import MetricWriter, read_metrics


def run(directory, steps, resume_step=0, again=""):
  writer = MetricWriter(directory, resume_step, again)
  for step in steps:
    writer.write(step, {"loss": 1 / step, "accuracy": 0.5})
  return writer


def test_resuming_removes_later_records_and_a_cut_line(tmp_path):
  run(tmp_path / "undisturbed", range(1, 9)).close()
  run(tmp_path / "killed", range(1, 7))  # not closed
  with open(tmp_path / "killed" / "metrics.jsonl", "a") as stream:
    stream.write('{"step": 7, "lo')
  run(tmp_path / "killed", range(5, 9), resume_step=4).close()
  expected = (tmp_path / "undisturbed" / "metrics.jsonl").read_bytes()
  assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == expected
  assert [record["step"] for record in read_metrics(tmp_path / "killed" / "metrics.jsonl")] == list(range(1, 9))


def test_only_records_of_the_last_step_that_will_be_written_again_are_removed(tmp_path):
  writer = run(tmp_path, [1, 2])
  for step in (0, 1, 2):
    writer.write(step, {"dev/RR@10": 0.5})
  run(tmp_path, [], resume_step=2, again="dev/").close()
  kept = [(record["step"], "loss" in record) for record in read_metrics(tmp_path / "metrics.jsonl")]
  assert kept == [(1, True), (2, True), (0, False), (1, False)]


def test_a_fresh_start_replaces_the_file_and_nan_becomes_null(tmp_path):
  run(tmp_path, [1, 2]).close()
  writer = run(tmp_path, [])
  writer.write(1, {"loss": float("nan")})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [{"step": 1, "loss": None}]
