"""Several servers behind one address, by Ray Serve; they share a PostgreSQL database.

  pip install -e '.[serve,postgres,ray]'
  python launch/serve_ray.py --backbone=PATH --state=postgresql://USER@HOST/DATABASE --replicas=2 [--most=8]

Joins the Ray cluster of RAY_ADDRESS, or starts one on this machine. Ray replaces a replica that dies, and with --most
starts more of them under load. Started again with other flags, it replaces all replicas one after the other; tasks and
documents are changed by the interface, and every replica follows. On SIGTERM or Ctrl-C it ends them, unless --detach.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading

from dptdr_jax.core import commands
from dptdr_jax.serving.server import Options


def parse_arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--backbone", required=True, help="as of dptdr_jax.serve; every node reads it from there")
  parser.add_argument("--state", required=True, help="postgresql://USER@HOST/DATABASE")
  parser.add_argument("--replicas", type=int, default=2)
  parser.add_argument("--most", type=int, default=0, help="replicas under load; default: as many as --replicas")
  parser.add_argument("--cpus", type=float, default=1.0, help="that Ray reserves for a replica")
  parser.add_argument("--gpus", type=float, default=0.0, help="that Ray reserves for a replica")
  parser.add_argument("--host", default="127.0.0.1", help="another one needs --api-key-file")
  parser.add_argument("--port", type=int, default=8000)
  parser.add_argument("--api-key-file", default="", help="on every node")
  parser.add_argument("--slots", type=int, default=64)
  parser.add_argument("--prompt-length", type=int, default=64)
  parser.add_argument("--max-tokens", type=int, default=512)
  parser.add_argument("--batch-tokens", type=int, default=0)
  parser.add_argument("--detach", action="store_true", help="leave the replicas running")
  return parser.parse_args()


def main() -> None:
  args = parse_arguments()
  options = Options(
    backbone=args.backbone, state=args.state, host=args.host, port=args.port, keys=args.api_key_file,
    slots=args.slots, prompt_length=args.prompt_length, max_tokens=args.max_tokens, batch_tokens=args.batch_tokens,
  )  # fmt: skip
  from ray import serve

  from dptdr_jax.serving import replicas

  replicas.deploy(options, replicas=(args.replicas, max(args.most, args.replicas)), cpus=args.cpus, gpus=args.gpus)
  stopped = threading.Event()
  for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which sets its own
    signal.signal(number, lambda *_: stopped.set())
  sys.stdout.write(f"ready: http://{args.host}:{args.port}\n")
  sys.stdout.flush()
  if not args.detach:
    stopped.wait()
    serve.shutdown()


if __name__ == "__main__":
  sys.exit(commands.status_of(main))
