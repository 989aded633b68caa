"""Writing a token store, compared with bare `tokenizers` batches over the same texts.

  python benchmarks/tokenization.py --tokenizer=DIR [--corpus=corpus.jsonl.gz] [--texts=20000] [--rounds=5]

Prints texts a second of both and their ratio: the median over rounds in which both take turns; 1 is the bare library's
speed. The bare run calls encode_batch on lists of the same size and keeps nothing.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import statistics
import tempfile
import time

import numpy as np

from dptdr_jax.data.formats.lines import read_json_lines
from dptdr_jax.data.store import write_token_store
from dptdr_jax.data.tokenizer import Tokenizer

BATCH = 4096


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--tokenizer", required=True, help="directory with tokenizer.json")
  parser.add_argument("--corpus", help="BEIR corpus.jsonl; random words by default")
  parser.add_argument("--texts", type=int, default=20_000)
  parser.add_argument("--max_tokens", type=int, default=128)
  parser.add_argument("--rounds", type=int, default=5)
  options = parser.parse_args()
  tokenizer = Tokenizer(options.tokenizer)
  texts = _corpus(options.corpus, options.texts) if options.corpus else _random_texts(tokenizer, options.texts)
  backend = Tokenizer(options.tokenizer).backend
  backend.enable_truncation(max_length=options.max_tokens)
  bare, store = [], []
  with tempfile.TemporaryDirectory() as directory:
    for round_ in range(options.rounds + 1):  # the first one warms up
      start = time.perf_counter()
      for first in range(0, len(texts), BATCH):
        backend.encode_batch(texts[first : first + BATCH], add_special_tokens=False)
      middle = time.perf_counter()
      path = pathlib.Path(directory, str(round_))
      write_token_store(lambda row: iter(texts[row:]), len(texts), tokenizer, path, max_tokens=options.max_tokens)
      end = time.perf_counter()
      if round_:
        bare.append(middle - start)
        store.append(end - middle)
  ratio = statistics.median(one / other for one, other in zip(bare, store, strict=True))
  print(f"bare encode_batch  {len(texts) / statistics.median(bare):10.0f} texts/s")
  print(f"token store        {len(texts) / statistics.median(store):10.0f} texts/s")
  print(f"ratio              {ratio:10.2f}")


def _corpus(path: str, count: int) -> list[str]:
  return [value["text"] for _, value in itertools.islice(read_json_lines(path), count)]


def _random_texts(tokenizer: Tokenizer, count: int) -> list[str]:
  """Texts of 20 to 110 tokens drawn from the vocabulary, about as long as MS MARCO's passages."""
  random = np.random.default_rng(0)
  words = [word for word in sorted(tokenizer.backend.get_vocab()) if word.isalpha()]
  return [" ".join(random.choice(words, random.integers(20, 110))) for _ in range(count)]


if __name__ == "__main__":
  main()
