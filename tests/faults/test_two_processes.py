"""Two processes by launch/local_cluster.sh, one SIGKILLed, the script alone starts both again: the same bytes at the
end as undisturbed. By hand and at length: `python tests/faults/long_form.py`."""

from __future__ import annotations

import dataclasses
import random

from support import pair, tiny

# A run's life: (stage, between a write and its rename?) of each kill.
LIFE = (("train1", False), ("encode", True), ("evaluate", False))


def test_one_of_two_killed_anywhere_ends_the_same(tmp_path):
  flags = tiny.run_flags(tmp_path)
  found = pair.undisturbed(tmp_path / "undisturbed", flags)
  expected = pair.hashes(tmp_path / "undisturbed")
  generator = random.Random(3)
  life = [pair.draw(found, *point, generator) for point in LIFE]
  life[0] = dataclasses.replace(life[0], victim=1)  # in the middle of training, while process 0 depends on it

  assert len(pair.run(tmp_path / "run", flags, life)) == 3
  assert pair.hashes(tmp_path / "run") == expected, life
  log = (tmp_path / "run/logs/process-1.log").read_text()
  assert log.count("process 1 of 2") >= 4, "both start again after each kill"
