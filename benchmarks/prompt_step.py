"""A prompt step, compared with a fine-tuning step of equal shapes, batch, dropout and chunks: time, operations, memory.

  python benchmarks/prompt_step.py
  python benchmarks/prompt_step.py --shapes roberta-large --queries 64 --group 4 --dtype bfloat16   (an accelerator)

Weights are random and seeded. Both steps take turns in one process, so that a busy machine slows both; ratios are of
medians. Operations are the matrix products of the traced step, with what it computes a second time.
Memory is the compiler's figure for temporaries and arguments.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from accelerators import share_of_peak

from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.convert import init_params
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.runtime import programs
from dptdr_jax.runtime.mesh import make_mesh, put_batch, replicated
from dptdr_jax.training.contrastive import make_train_step
from dptdr_jax.training.encoders import BiEncoder
from dptdr_jax.training.optimizer import make_optimizer, make_schedule
from dptdr_jax.training.state import init_state

SHAPES = {
  "minilm": EncoderConfig("bert", 30522, 384, 6, 12, 1536, 512),
  "roberta-base": EncoderConfig("roberta", 50265, 768, 12, 12, 3072, 514, type_vocab_size=1, pad_id=1),
  "roberta-large": EncoderConfig("roberta", 50265, 1024, 24, 16, 4096, 514, type_vocab_size=1, pad_id=1),
}


def parse_arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["minilm", "roberta-base"])
  parser.add_argument("--queries", type=int, default=4)
  parser.add_argument("--group", type=int, default=2, help="passages a query")
  parser.add_argument("--query-tokens", type=int, default=32)
  parser.add_argument("--passage-tokens", type=int, default=128)
  parser.add_argument("--prompt", type=int, default=32, help="prompt length")
  parser.add_argument("--query-chunk", type=int, default=0)
  parser.add_argument("--passage-chunk", type=int, default=0)
  parser.add_argument("--remat", choices=["none", "attention", "layer"], default="none")
  parser.add_argument("--pooling", choices=["first", "mean"], default="first")
  parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
  parser.add_argument("--rounds", type=int, default=3)
  return parser.parse_args()


def make_batch(config: EncoderConfig, args: argparse.Namespace) -> dict[str, np.ndarray]:
  """Random tokens, all rows of full length."""
  rng, passages = np.random.default_rng(0), args.queries * args.group
  return {
    "query_tokens": rng.integers(5, config.vocab_size, (args.queries, args.query_tokens), dtype=np.int32),
    "query_lengths": np.full(args.queries, args.query_tokens, np.int32),
    "passage_tokens": rng.integers(5, config.vocab_size, (passages, args.passage_tokens), dtype=np.int32),
    "passage_lengths": np.full(passages, args.passage_tokens, np.int32),
    "targets": np.arange(0, passages, args.group, dtype=np.int32),
    "blocked": np.zeros((args.queries, passages), bool),
    "repeated": np.zeros(passages, bool),
  }


def prepare(config: EncoderConfig, spec: PromptSpec, args: argparse.Namespace):
  """The compiled step, its operations over all devices, and a function that runs it once and returns seconds."""
  mesh = make_mesh()
  model = BiEncoder(config, spec, args.pooling, compute_dtype=jnp.dtype(args.dtype), remat=args.remat)
  optimizer = make_optimizer(make_schedule(1e-3, 1000))
  step = make_train_step(
    model, optimizer, query_chunk=args.query_chunk, passage_chunk=args.passage_chunk,
    temperature=1.0, both_directions=False, mesh=mesh,
  )  # fmt: skip
  weights = init_params(jax.random.key(0), config)
  state = jax.device_put(init_state(model.init_trainable(jax.random.key(1), weights), optimizer), replicated(mesh))
  frozen = jax.tree.map(lambda leaf: leaf.astype(args.dtype), weights) if spec.kind != "none" else {}
  frozen, batch = jax.device_put(frozen, replicated(mesh)), put_batch(make_batch(config, args), mesh)
  traced = step.trace(np.uint32(0), state, frozen, batch)
  compiled = traced.lower().compile()

  def run() -> float:
    nonlocal state
    start = time.perf_counter()
    state, metrics = compiled(np.uint32(0), state, frozen, batch)
    float(metrics["loss"])
    jax.block_until_ready(state)
    return time.perf_counter() - start

  return compiled, programs.operations(traced), run


def main() -> None:
  args = parse_arguments()
  device = jax.devices()[0].device_kind
  print(f"{device} × {jax.device_count()}, {vars(args)}")
  tokens = args.queries * (args.query_tokens + args.group * args.passage_tokens)
  columns = ["shape", "step", "ms (median)", "tokens/s", "GFLOP", "of the peak", "temporaries MiB", "arguments MiB"]
  print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
  for name in args.shapes:
    config = SHAPES[name]
    specs = {
      "prompt": PromptSpec("deep", args.prompt, position_shift=args.prompt),
      "fine-tuning": PromptSpec("none"),
    }
    prepared = {kind: prepare(config, spec, args) for kind, spec in specs.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in specs}
    for number in range(args.rounds + 1):
      for kind, (_, _, run) in prepared.items():
        taken = run()
        if number:  # the first is a warm-up
          seconds[kind].append(taken)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    counts = {kind: operations for kind, (_, operations, _) in prepared.items()}
    memory = {kind: compiled.memory_analysis() for kind, (compiled, _, _) in prepared.items()}
    for way, taken in medians.items():
      sizes = [getattr(memory[way], f"{what}_size_in_bytes") / 2**20 for what in ("temp", "argument")]
      share = share_of_peak(device, counts[way] / jax.device_count(), taken)
      print(
        f"| {name} | {way} | {1e3 * taken:.1f} | {tokens / taken:,.0f} | {counts[way] / 1e9:.1f} | {share} "
        f"| {sizes[0]:.0f} | {sizes[1]:.0f} |"
      )
    time_ratio = medians["prompt"] / medians["fine-tuning"]
    flop_ratio = counts["prompt"] / counts["fine-tuning"]
    temporary = memory["prompt"].temp_size_in_bytes / memory["fine-tuning"].temp_size_in_bytes
    print(
      f"{name}: prompt / fine-tuning: time {time_ratio:.3f}, operations {flop_ratio:.3f} "
      f"(time ratio = {time_ratio / flop_ratio:.2f} × operation ratio), temporaries {temporary:.3f}"
    )


if __name__ == "__main__":
  main()
