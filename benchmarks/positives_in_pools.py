"""Whether any positive is left in the pools of a run: counted anew from the texts, without the rules that made them.

  python benchmarks/positives_in_pools.py --workdir runs/medquad

For each pool (mineN, and what was mined while training): candidates that may be negatives, and how many of them are
judged relevant for their query, have the text of a positive, or hold a positive's text of 40 characters or more in one
piece; case, white space and signs do not count. Shorter positives ("Yes.") may stand in passages that do not answer:
those that hold one are counted beside. Ends with status 1 where one of the first three is not 0, and with 2 where there
is no pool. Texts are held in memory.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import unicodedata

import regex

from dptdr_jax.core import files, progress
from dptdr_jax.data.prepare import PreparedData
from dptdr_jax.retrieval.candidates import Pool
from dptdr_jax.stages.layout import Layout

LONG = 40  # characters from which on a positive inside a candidate counts
COUNTED = ("judged relevant", "of a positive's text", f"with a positive's text of {LONG} characters or more inside")


def normalised(text: str) -> str:
  """Letters, marks and digits in lower case, one space for whatever else."""
  return regex.sub(r"[^\p{L}\p{M}\p{N}]+", " ", unicodedata.normalize("NFKC", text).lower()).strip()


def count(pool: Pool, texts: list[str], whole: list[str], split) -> tuple[int, list[int], int]:
  """Negatives of a pool, those of each kind in COUNTED, and those with a shorter positive inside."""
  negatives, found, short = 0, [0] * len(COUNTED), 0
  with progress.bar("check", len(pool), "query") as shown:
    for query in range(len(pool)):
      judged = set(split.positives(query).tolist())
      said = ({texts[row] for row in judged} | {whole[row] for row in judged}) - {""}
      inside = {texts[row] for row in judged if texts[row]}
      for row in pool.candidates(query).tolist():
        held = [text for text in inside if text in whole[row]]
        negatives += 1
        found[0] += row in judged
        found[1] += texts[row] in said or whole[row] in said
        found[2] += any(len(text) >= LONG for text in held)
        short += any(len(text) < LONG for text in held)
      shown.advance()
  return negatives, found, short


def main() -> int:
  """Prints a line for each pool."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, help="of a run that has mined")
  layout = Layout.of(pathlib.Path(parser.parse_args().workdir))
  data = PreparedData(layout.prepared)
  passages = [(normalised(passage.title), normalised(passage.text)) for passage in data.passages.read()]
  texts, whole = [text for _, text in passages], [" ".join(filter(None, parts)) for parts in passages]
  mined = sorted((*layout.root.glob("mine*/mining.json"), *layout.root.glob("train*/generations/*/mining.json")))
  if not mined:
    print(f"{layout.root}: nothing is mined here")
    return 2
  bad = 0
  for path in mined:
    split = data.splits[files.read_json(path)["split"]]
    negatives, found, short = count(Pool.open(path.parent / "pool"), texts, whole, split)
    told = ", ".join(f"{number:,} {kind}" for number, kind in zip(found, COUNTED, strict=True))
    print(
      f"{path.parent.relative_to(layout.root)}: {negatives:,} negatives; {told}; {short:,} with a shorter one inside"
    )
    bad += sum(found)
  return 1 if bad else 0


if __name__ == "__main__":
  sys.exit(main())
