"""The tiny corpus in the file formats of MS MARCO and DPR's Natural Questions."""

from __future__ import annotations

import gzip
import json
import pathlib
from collections.abc import Iterable

import numpy as np
from support import tiny

PASSAGES, TRAIN, HELD_OUT = 64, 32, 12


def write(path: pathlib.Path, lines: Iterable[str]) -> None:
  """Writes lines; gzipped if the name ends in .gz."""
  path.parent.mkdir(parents=True, exist_ok=True)
  text = "".join(f"{line}\n" for line in lines).encode()
  path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def asked(count: int, seed: int) -> list[tuple[int, str]]:
  """Draws (passage, query): each query is five words of its passage."""
  generator = np.random.default_rng(seed)
  corpus = tiny.sentences(PASSAGES, 14, seed=0)
  rows = generator.permutation(PASSAGES)[:count].tolist()
  return [(row, " ".join(generator.permutation(corpus[row][1].split())[:5])) for row in rows]


def msmarco(directory: pathlib.Path) -> pathlib.Path:
  """Writes all files that configs/msmarco.py reads; every seventh passage has no title, some queries no judgement."""
  corpus = tiny.sentences(PASSAGES, 14, seed=0)
  write(directory / "collection.tsv", (f"{row}\t{text}" for row, (_, text) in enumerate(corpus)))
  titles = (f"{row}\t{topic}" for row, (topic, _) in enumerate(corpus) if row % 7)
  write(directory / "para.title.txt", titles)
  train, dev, dl19, dl20 = (asked(*drawn) for drawn in ((TRAIN, 1), (HELD_OUT, 2), (8, 3), (8, 4)))
  for name, first, queries in (("train", 1000, train), ("dev.small", 2000, dev)):
    numbered = [*enumerate(queries, first), (first + 999, (0, "never judged"))]
    write(directory / f"queries.{name}.tsv", (f"{number}\t{text}" for number, (_, text) in numbered))
    write(directory / f"qrels.{name}.tsv", (f"{number}\t0\t{row}\t1" for number, (row, _) in numbered[:-1]))
  triples = (
    f"{number}\t{row}\t{(row + 8 * step) % PASSAGES}"
    for number, (row, _) in enumerate(train, 1000)
    for step in (1, 2, 3)
  )  # of the same topic, like BM25's
  write(directory / "qidpidtriples.train.full.2.tsv.gz", triples)
  for year, queries in (("2019", dl19), ("2020", dl20)):
    numbered = [*enumerate(queries, int(year) * 10), (int(year) * 10 + 9, (0, "never judged"))]
    write(directory / f"msmarco-test{year}-queries.tsv.gz", (f"{number}\t{text}" for number, (_, text) in numbered))
    grades = ((0, 3), (8, 2), (16, 1), (24, 0), (1, 0))
    lines = (f"{n} Q0 {(row + off) % PASSAGES} {grade}" for n, (row, _) in numbered[:-1] for off, grade in grades)
    write(directory / f"{year}qrels-pass.txt", lines)
  return directory


def nq(directory: pathlib.Path) -> pathlib.Path:
  """Writes all files that configs/nq.py reads; passage ids count from 1, one question in five has no positive."""
  corpus = tiny.sentences(PASSAGES, 14, seed=0)
  rows = (f'{row}\t"{text}"\t{topic}' for row, (topic, text) in enumerate(corpus, 1))
  write(directory / "psgs_w100.tsv.gz", ["id\ttext\ttitle", *rows])

  def context(row: int) -> dict:
    topic, text = corpus[row % PASSAGES]
    return {"title": topic, "text": text, "score": 1.0, "title_score": 0, "passage_id": str(row % PASSAGES + 1)}

  for split, queries in (("train", asked(TRAIN, 1)), ("dev", asked(HELD_OUT, 2))):
    entries = [
      {
        "dataset": f"nq_{split}_psgs_w100", "question": text, "answers": text.split()[:1],
        "positive_ctxs": [context(row), context(row + 16)] if number % 5 else [],
        "negative_ctxs": [], "hard_negative_ctxs": [context(row + 8)],
      }
      for number, (row, text) in enumerate(queries)
    ]  # fmt: skip
    write(directory / f"biencoder-nq-{split}.json.gz", [json.dumps(entries, indent=4)])
  tested = (f"{text}\t{[' '.join(corpus[row][1].split()[:2]), 'no such words']}" for row, text in asked(HELD_OUT, 3))
  write(directory / "nq-test.qa.csv", tested)
  return directory
