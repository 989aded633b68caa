"""Two processes by launch/local_cluster.sh, one SIGKILLed, the script alone starts both again: the same bytes at the
end as undisturbed. By hand and at length: `python tests/faults/long_form.py`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import random

from support import pair, tiny

# Two runs' lives: (stage, between a write and its rename?) of each kill.
LIVES = ((("train1", False), ("encode", True)), (("train1", True), ("evaluate", False)))


def test_one_of_two_killed_anywhere_ends_the_same(tmp_path):
  flags = tiny.run_flags(tmp_path)
  found = pair.undisturbed(tmp_path / "undisturbed", flags)
  expected = pair.hashes(tmp_path / "undisturbed")
  generator = random.Random(3)
  lives = [[pair.draw(found, *point, generator) for point in life] for life in LIVES]
  lives[0][0] = dataclasses.replace(lives[0][0], victim=1)  # in the middle of training, while process 0 depends on it

  with concurrent.futures.ThreadPoolExecutor(len(lives)) as pool:
    made = list(pool.map(lambda number: pair.run(tmp_path / f"run{number}", flags, lives[number]), range(len(lives))))
  assert [len(kills) for kills in made] == [2, 2]
  for number, life in enumerate(lives):
    assert pair.hashes(tmp_path / f"run{number}") == expected, life
    log = (tmp_path / f"run{number}/logs/process-1.log").read_text()
    assert log.count("process 1 of 2") >= 3, "both start again after each kill"
