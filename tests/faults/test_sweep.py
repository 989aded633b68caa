"""One file of each kind of artefact is damaged."""

from __future__ import annotations

import json

from support import damage, forks

# Kinds of which little is made; what is made of others takes longer.
CHEAP = ("bm25", "bm25_run", "vectors", "index", "dense_run", "pair_scores", "measures")


def test_damaged_file_changes_no_measure_and_shows_no_traceback(attacked, tmp_path):
  listed = damage.few(attacked.work, CHEAP)
  job = forks.Job(damage.try_all, attacked.config(), attacked.work, tmp_path / "work", listed, said=tmp_path / "said")
  status, said = job.end()
  assert status == 0, said[-3000:]
  wrong = json.loads((tmp_path / "work.json").read_text())
  assert not wrong and len({case.kind for case in listed}) > 15
