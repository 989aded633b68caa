"""Hard negatives for other trainers, and for vectors that others have made.

  python -m dptdr_jax.negatives export --workdir=DIR --round=1 --out=train.jsonl [--format=ntuples --count=8] \\
      [--separator='</s>']
  python -m dptdr_jax.negatives mine --passages=P.npy --queries=Q.npy --qrels=train.tsv --out=DIR \\
      [--passage_ids=P.txt --query_ids=Q.txt --depth=200 --relative_margin=0.95]

`export` writes the negatives of round N of mining (or --generation=G of those mined during round N), with texts: as the
original's JSONL (query, positives, negatives) or as sentence-transformers' n-tuples (anchor, positive, negative_1 …). A
passage is one string: title, separator and text. Queries without a positive or a negative are left out, because these
trainers cannot read them. `mine` searches vectors [Q, H] in vectors [C, H], drops the judged positives and what scores
too near to them, and writes OUT/pool and OUT/negatives.jsonl (query, negatives and their scores, by id; queries without
a positive are left out). Ids are lines of text files, by row; default: the row numbers. All paths but --workdir may be
URLs.
"""

from __future__ import annotations

from absl import flags

from dptdr_jax.core import commands, preemption, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.pipeline import export_negatives


def main(argv: list[str]) -> int:
  """Runs one of the two commands; exit status as of `dptdr_jax.main`."""
  preemption.install()
  return commands.status_of(_export if argv[1] == "export" else _mine)


def _export() -> None:
  given = flags.FLAGS
  _need("workdir", "out")
  _say(export_negatives.export(given.workdir, given.round, given.out, given.format, given.count,
                               generation=given.generation, separator=given.separator))  # fmt: skip


def _mine() -> None:
  given = flags.FLAGS
  _need("passages", "queries", "qrels", "out")
  passages = export_negatives.Vectors(given.passages, given.passage_ids)
  queries = export_negatives.Vectors(given.queries, given.query_ids)
  options = {"depth": given.depth, "first": given.first, "margin": given.relative_margin}
  _say(export_negatives.mine(passages, queries, given.qrels, given.out, **options))


def _say(counts: dict[str, int]) -> None:
  progress.say(", ".join(f"{name}: {number:,}" for name, number in counts.items()))


def _need(*names: str) -> None:
  missing = [name for name in names if not flags.FLAGS[name].value]
  if missing:
    raise InputError(f"--{missing[0]} is missing", fix="See python -m dptdr_jax.negatives --help")


def define() -> None:
  """Defines the flags: not on import, where two commands in one process would clash."""
  flags.DEFINE_string("workdir", None, "export: directory of the run.")
  flags.DEFINE_integer("round", 1, "export: round of mining.")
  flags.DEFINE_integer("generation", None, "export: of the pools that were mined during that round.")
  flags.DEFINE_enum("format", "original", ["original", "ntuples"], "export: layout of the lines.")
  flags.DEFINE_integer("count", 8, "export: negatives of an n-tuple; 'original' writes all.")
  flags.DEFINE_string("separator", None, "export: between title and text; default: the run's own, in n-tuples a space.")
  flags.DEFINE_string("out", None, "File or directory to write.")
  flags.DEFINE_string("passages", None, "mine: .npy, float [C, H].")
  flags.DEFINE_string("queries", None, "mine: .npy, float [Q, H].")
  flags.DEFINE_string("passage_ids", "", "mine: text file, an id a line, by row.")
  flags.DEFINE_string("query_ids", "", "mine: text file, an id a line, by row.")
  flags.DEFINE_string("qrels", None, "mine: judged positives, BEIR's or TREC's qrels by these ids.")
  flags.DEFINE_integer("depth", 200, "mine: ranks that are candidates.")
  flags.DEFINE_integer("first", 0, "mine: ranks skipped on top.")
  flags.DEFINE_float("relative_margin", 0.95, "mine: drop what scores above this share of its positive; 0: off.")


if __name__ == "__main__":
  define()
  commands.start(main, words=("export", "mine"))
