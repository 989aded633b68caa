"""Counts positives that are left among the negatives of a run's pools, from the texts, without the rules of mining.

  python benchmarks/positives_in_pools.py --workdir runs/medquad

For each pool (mineN, and those mined during training): negatives, and how many of them are judged relevant for their
query, have the text of a positive, or contain a positive's text of 40 characters or more. Case, white space and
punctuation are ignored. Shorter positives ("Yes.") may occur in passages that do not answer; passages with one are
counted apart. Exit status 1: one of the first three counts is not 0; 2: there is no pool. Texts are held in memory.
"""

from __future__ import annotations

import argparse
import sys
import unicodedata

import regex

from dptdr_jax.core import files, progress
from dptdr_jax.data.prepare import Corpus, Split
from dptdr_jax.pipeline import run
from dptdr_jax.retrieval.candidates import Pool

LONG = 40  # shortest positive, in characters, that counts inside a candidate
COUNTED = ("judged relevant", "of a positive's text", f"with a positive's text of {LONG} characters or more inside")


def normalised(text: str) -> str:
  """Letters, marks and digits in lower case; one space for anything else."""
  return regex.sub(r"[^\p{L}\p{M}\p{N}]+", " ", unicodedata.normalize("NFKC", text).lower()).strip()


def count(pool: Pool, texts: list[str], whole: list[str], split: Split) -> tuple[int, list[int], int]:
  """Negatives of a pool, those of each kind in COUNTED, and those with a shorter positive inside."""
  negatives, wrong, short = 0, [0] * len(COUNTED), 0
  with progress.bar("check", len(pool), "query") as shown:
    for query in range(len(pool)):
      judged = set(split.positives(query).tolist())
      said = ({texts[row] for row in judged} | {whole[row] for row in judged}) - {""}
      inside = {texts[row] for row in judged if texts[row]}
      for row in pool.candidates(query).tolist():
        held = [text for text in inside if text in whole[row]]
        negatives += 1
        wrong[0] += row in judged
        wrong[1] += texts[row] in said or whole[row] in said
        wrong[2] += any(len(text) >= LONG for text in held)
        short += any(len(text) < LONG for text in held)
      shown.advance()
  return negatives, wrong, short


def main() -> int:
  """Prints a line for each pool."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, help="of a run that has mined")
  _, workdir = run.opened(parser.parse_args().workdir)
  corpus = Corpus(workdir / "prepare" / "corpus")
  passages = [(normalised(passage.title), normalised(passage.text)) for passage in corpus.passages.read()]
  texts, whole = [text for _, text in passages], [" ".join(filter(None, parts)) for parts in passages]
  mined = sorted((*workdir.glob("mine*/mining.json"), *workdir.glob("train*/generations/*/mining.json")))
  if not mined:
    print(f"{workdir}: nothing is mined here")
    return 2
  bad = 0
  for path in mined:
    name = files.read_json(path)["split"]
    split = Split(workdir / "prepare" / "splits" / name, name)
    negatives, wrong, short = count(Pool.open(path.parent / "pool"), texts, whole, split)
    listed = ", ".join(f"{number:,} {kind}" for number, kind in zip(wrong, COUNTED, strict=True))
    print(f"{path.parent.relative_to(workdir)}: {negatives:,} negatives; {listed}; {short:,} with a shorter one inside")
    bad += sum(wrong)
  return 1 if bad else 0


if __name__ == "__main__":
  sys.exit(main())
