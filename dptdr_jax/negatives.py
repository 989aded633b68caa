"""Hard negatives for other trainers, and for other people's embeddings.

  python -m dptdr_jax.negatives export --workdir=DIR --round=1 --out=train.jsonl [--format=ntuples --count=8]
  python -m dptdr_jax.negatives mine --passages=P.npy --queries=Q.npy --qrels=train.tsv --out=DIR \\
      [--passage_ids=P.txt --query_ids=Q.txt --depth=200 --relative_margin=0.95]

`export` writes what round N of mining left, with texts: as the original's JSONL (query, positives, negatives) or as
sentence-transformers' n-tuples (anchor, positive, negative_1 …). `mine` searches vectors [Q, H] in vectors [C, H],
takes the judged positives and what scores too near to them out, and writes OUT/pool and OUT/negatives.jsonl (query,
negatives and their scores, by id). Ids are lines of text files, by row; without them the row numbers are the ids.
"""

from __future__ import annotations

import sys

from absl import app, flags

from dptdr_jax.core import preemption, progress
from dptdr_jax.core.errors import DptdrError, InputError
from dptdr_jax.stages import handover

_WORKDIR = flags.DEFINE_string("workdir", None, "export: directory of the run.")
_ROUND = flags.DEFINE_integer("round", 1, "export: round of mining.")
_FORMAT = flags.DEFINE_enum("format", "original", ["original", "ntuples"], "export: layout of the lines.")
_COUNT = flags.DEFINE_integer(
  "count", 8, "export: negatives of an n-tuple; of 'original' all that are left are written."
)
_OUT = flags.DEFINE_string("out", None, "File or directory to write.")
_PASSAGES = flags.DEFINE_string("passages", None, "mine: .npy, float [C, H].")
_QUERIES = flags.DEFINE_string("queries", None, "mine: .npy, float [Q, H].")
_PASSAGE_IDS = flags.DEFINE_string("passage_ids", "", "mine: text file, an id a line, by row.")
_QUERY_IDS = flags.DEFINE_string("query_ids", "", "mine: text file, an id a line, by row.")
_QRELS = flags.DEFINE_string("qrels", None, "mine: judged positives, BEIR's or TREC's qrels by these ids.")
_DEPTH = flags.DEFINE_integer("depth", 200, "mine: ranks that are candidates.")
_FIRST = flags.DEFINE_integer("first", 0, "mine: ranks skipped on top.")
_RELATIVE = flags.DEFINE_float(
  "relative_margin", 0.95, "mine: take out what scores above this share of its positive; 0: off."
)
_ABSOLUTE = flags.DEFINE_float("absolute_margin", 0.0, "mine: or above its positive's score less this; 0: off.")


def main(argv: list[str]) -> int:
  """Runs one of the two commands; exit status 0, or 2 after an error of input."""
  preemption.install()
  try:
    if argv[1:] == ["export"]:
      _need("workdir", "out")
      counts = handover.export(_WORKDIR.value, _ROUND.value, _OUT.value, _FORMAT.value, _COUNT.value)
    elif argv[1:] == ["mine"]:
      _need("passages", "queries", "qrels", "out")
      counts = handover.mine(
        handover.Vectors(_PASSAGES.value, _PASSAGE_IDS.value), handover.Vectors(_QUERIES.value, _QUERY_IDS.value),
        _QRELS.value, _OUT.value, depth=_DEPTH.value, first=_FIRST.value,
        relative=_RELATIVE.value or None, absolute=_ABSOLUTE.value or None,
      )  # fmt: skip
    else:
      raise app.UsageError("say export or mine")
  except DptdrError as error:
    sys.stderr.write(f"error: {error}\n")
    return 2
  progress.say(", ".join(f"{name}: {number:,}" for name, number in counts.items()))
  return 0


def _need(*names: str) -> None:
  missing = [name for name in names if not flags.FLAGS[name].value]
  if missing:
    raise InputError(f"--{missing[0]} is missing", fix="See python -m dptdr_jax.negatives --help")


if __name__ == "__main__":
  app.run(main)
