"""Hard negatives for other trainers, and for other people's embeddings.

  python -m dptdr_jax.negatives export --workdir=DIR --round=1 --out=train.jsonl [--format=ntuples --count=8] \\
      [--separator='</s>']
  python -m dptdr_jax.negatives mine --passages=P.npy --queries=Q.npy --qrels=train.tsv --out=DIR \\
      [--passage_ids=P.txt --query_ids=Q.txt --depth=200 --relative_margin=0.95]

`export` writes what round N of mining left (or --generation=G of what was mined while round N trained), with texts: as
the original's JSONL (query, positives, negatives) or as sentence-transformers' n-tuples (anchor, positive,
negative_1 …). A passage is one string there, title, separator and text; a query without a positive or a negative is
left out, as these trainers cannot read it. `mine` searches vectors [Q, H] in vectors [C, H], takes the judged positives
and what scores too near to them out, and writes OUT/pool and OUT/negatives.jsonl (query, negatives and their scores, by
id; a query without a positive is left out). Ids are lines of text files, by row; without them the row numbers are the
ids. All paths but --workdir may be URLs.
"""

from __future__ import annotations

import sys

from absl import flags

from dptdr_jax.core import commands, preemption, progress
from dptdr_jax.core.errors import DptdrError, InputError, PassingError
from dptdr_jax.stages import handover


def main(argv: list[str]) -> int:
  """Runs one of the two commands; exit status 0; 2: an error of input; 75: stopped by SIGTERM; 1: as `main`."""
  preemption.install()
  given = flags.FLAGS
  try:
    if argv[1] == "export":
      _need("workdir", "out")
      counts = handover.export(given.workdir, given.round, given.out, given.format, given.count,
                               generation=given.generation, separator=given.separator)  # fmt: skip
    else:
      _need("passages", "queries", "qrels", "out")
      passages = handover.Vectors(given.passages, given.passage_ids)
      queries = handover.Vectors(given.queries, given.query_ids)
      margins = {"relative": given.relative_margin or None, "absolute": given.absolute_margin or None}
      options = {"depth": given.depth, "first": given.first, **margins}
      counts = handover.mine(passages, queries, given.qrels, given.out, **options)
  except preemption.Preempted as stop:
    sys.stderr.write(f"stopped by SIGTERM: {stop}; run the same command again\n")
    return preemption.EXIT_STATUS
  except DptdrError as error:
    sys.stderr.write(f"error: {error}\n")
    return 1 if isinstance(error, PassingError) else 2
  progress.say(", ".join(f"{name}: {number:,}" for name, number in counts.items()))
  return 0


def _need(*names: str) -> None:
  missing = [name for name in names if not flags.FLAGS[name].value]
  if missing:
    raise InputError(f"--{missing[0]} is missing", fix="See python -m dptdr_jax.negatives --help")


def define() -> None:
  """Defines the flags: not on import, where two commands in one process would clash."""
  flags.DEFINE_string("workdir", None, "export: directory of the run.")
  flags.DEFINE_integer("round", 1, "export: round of mining.")
  flags.DEFINE_integer("generation", None, "export: of the pools that were mined while that round trained.")
  flags.DEFINE_enum("format", "original", ["original", "ntuples"], "export: layout of the lines.")
  flags.DEFINE_integer("count", 8, "export: negatives of an n-tuple; of 'original' all that are left are written.")
  flags.DEFINE_string("separator", None, "export: between title and text; default: the run's own, in n-tuples a space.")
  flags.DEFINE_string("out", None, "File or directory to write.")
  flags.DEFINE_string("passages", None, "mine: .npy, float [C, H].")
  flags.DEFINE_string("queries", None, "mine: .npy, float [Q, H].")
  flags.DEFINE_string("passage_ids", "", "mine: text file, an id a line, by row.")
  flags.DEFINE_string("query_ids", "", "mine: text file, an id a line, by row.")
  flags.DEFINE_string("qrels", None, "mine: judged positives, BEIR's or TREC's qrels by these ids.")
  flags.DEFINE_integer("depth", 200, "mine: ranks that are candidates.")
  flags.DEFINE_integer("first", 0, "mine: ranks skipped on top.")
  flags.DEFINE_float("relative_margin", 0.95, "mine: take out what scores above this share of its positive; 0: off.")
  flags.DEFINE_float("absolute_margin", 0.0, "mine: or above its positive's score less this; 0: off.")


if __name__ == "__main__":
  define()
  commands.start(main, words=("export", "mine"))
