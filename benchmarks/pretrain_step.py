"""A step of RIP at its real shapes: tokens a second, share of the accelerator's peak, memory.

  python benchmarks/pretrain_step.py --shapes minilm --spans 16 --ways 0:none 8:none                     (a CPU)
  python benchmarks/pretrain_step.py --dtype bfloat16                                            (an accelerator)

Contrast and masked language modelling, all weights trained, dropout on; weights are random and seeded, spans of full
length. A way is `CHUNK:REMAT`, as pretrain.chunk and pretrain.remat: the gradient cache's spans at a time (0: all), and
what the backward pass computes again. Operations are counted in what was traced, with what is computed twice; memory is
the compiler's figure. A way that does not fit says so.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from accelerators import share_of_peak
from prompt_step import SHAPES

from dptdr_jax.data.masking import RATE, most_masked
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.models.convert import init_params
from dptdr_jax.runtime import programs, shardings
from dptdr_jax.runtime.mesh import make_mesh, put_batch
from dptdr_jax.training.optimizer import make_optimizer, make_schedule
from dptdr_jax.training.pretrain import PretrainModel, make_pretrain_step
from dptdr_jax.training.state import init_state


def parse_arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["roberta-base", "roberta-large"])
  parser.add_argument("--spans", type=int, default=2048)
  parser.add_argument("--tokens", type=int, default=128, help="of a span")
  parser.add_argument("--ways", nargs="+", default=["64:none", "256:none", "256:attention"], metavar="CHUNK:REMAT")
  parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
  parser.add_argument("--rounds", type=int, default=3)
  return parser.parse_args()


def make_batch(config: EncoderConfig, args: argparse.Namespace) -> dict[str, np.ndarray]:
  """Random tokens, of which a share of RATE is masked."""
  rng = np.random.default_rng(0)
  width, masked = most_masked(args.tokens), round(RATE * args.tokens)
  tokens = rng.integers(5, config.vocab_size, (args.spans, args.tokens), dtype=np.int32)
  positions = np.sort(rng.permuted(np.tile(np.arange(args.tokens, dtype=np.int32), (args.spans, 1)), axis=1)[:, :width])
  labels = np.where(np.arange(width) < masked, np.take_along_axis(tokens, positions, 1), -1).astype(np.int32)
  lengths, groups = np.full(args.spans, args.tokens, np.int32), np.arange(args.spans, dtype=np.int32) // 2
  return {"tokens": tokens, "lengths": lengths, "groups": groups, "positions": positions, "labels": labels}


def prepare(config: EncoderConfig, way: str, args: argparse.Namespace):
  """The compiled step, its operations over all devices, and a function that runs it once and returns seconds."""
  chunk, remat = way.split(":")
  mesh, optimizer = make_mesh(), make_optimizer(make_schedule(1e-4, 1000), weight_decay=0.01)
  model = PretrainModel(config, compute_dtype=jnp.dtype(args.dtype), remat=remat)

  def first_state(key):
    return init_state(model.init_trainable(key, init_params(key, config), None), optimizer)

  placed = shardings.of_state(jax.eval_shape(first_state, jax.random.key(0)), mesh)
  step = make_pretrain_step(model, optimizer, chunk=int(chunk), mesh=mesh, shardings=placed)
  state = jax.jit(first_state, out_shardings=placed)(jax.random.key(0))
  batch = put_batch(make_batch(config, args), mesh, whole=("groups",))
  traced = step.trace(np.uint32(0), state, batch)
  compiled = traced.lower().compile()

  def run() -> float:
    nonlocal state
    start = time.perf_counter()
    state, metrics = compiled(np.uint32(0), state, batch)
    float(metrics["loss"])
    jax.block_until_ready(state)
    return time.perf_counter() - start

  return compiled, programs.operations(traced), run


def main() -> None:
  args = parse_arguments()
  kind, devices = jax.devices()[0].device_kind, jax.device_count()
  print(f"{kind} × {devices}, {vars(args)}")
  columns = ["shape", "chunk:remat", "s (median)", "tokens/s", "of the first", "TFLOP", "of the peak", "memory GiB"]
  print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
  for name in args.shapes:
    first = None
    for way in args.ways:
      try:
        compiled, operations, run = prepare(SHAPES[name], way, args)
        seconds = statistics.median([run() for _ in range(args.rounds + 1)][1:])  # the first is a warm-up
      except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
          raise
        print(f"| {name} | {way} | does not fit |{' |' * (len(columns) - 3)}", flush=True)
        continue
      memory = compiled.memory_analysis()
      total = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30
      first = first or seconds
      print(
        f"| {name} | {way} | {seconds:.3f} | {args.spans * args.tokens / seconds:,.0f} | {first / seconds:.2f} "
        f"| {operations / 1e12:.1f} | {share_of_peak(kind, operations / devices, seconds)} | {total:.2f} |", flush=True,
      )  # fmt: skip
      del compiled, run  # and with it the state


if __name__ == "__main__":
  main()
