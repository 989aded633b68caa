"""`python -m dptdr_jax.serve --workdir=DIR` or `--backbone=PATH --state=STATE [--task=NAME=RETRIEVER_DIR …]`.

Serves many retrieval tasks on one backbone over HTTP: what a run has trained, with its corpus, at once; or any
retrievers of one backbone, which can also be added while it runs. STATE is a directory of one server, or the URL of a
PostgreSQL database that several share. See docs/guides/serving.md. On SIGTERM it answers what it has accepted and exits
with status 0.
"""

from __future__ import annotations

from absl import flags

from dptdr_jax.core import commands
from dptdr_jax.core.errors import InputError
from dptdr_jax.serving import server


def main(_: list[str]) -> int:
  """Serves; exit status 0 after SIGTERM or Ctrl-C, 2 after an error of input."""
  return commands.status_of(lambda: server.run(_options()))


def _options() -> server.Options:
  given = flags.FLAGS
  tasks = [one.partition("=") for one in given.task]
  if wrong := ["".join(one) for one in tasks if not all(one)]:
    raise InputError("--task is NAME=RETRIEVER_DIR", value=wrong[0])
  numbers = {name: given[name.replace("_", "-")].value
             for name in ("slots", "prompt_length", "max_tokens", "batch_tokens", "queued_tokens")}  # fmt: skip
  return server.Options(
    workdir=given.workdir, backbone=given.backbone, state=given.state, cache=given.cache,
    tasks=tuple((one[0], one[2]) for one in tasks), host=given.host, port=given.port, keys=given["api-key-file"].value,
    allow=tuple(given.allow), compute_dtype=given["compute-dtype"].value, **numbers,
  )  # fmt: skip


def define() -> None:
  """Defines the flags: not on import, where two commands in one process would clash."""
  flags.DEFINE_string("workdir", "", "Directory of a finished run: its last retriever and its corpus are served.")
  flags.DEFINE_string("backbone", "", "Directory, hub id or package:NAME; needs --state.")
  flags.DEFINE_string("state", "", "Directory of tasks and documents, or postgresql://USER@HOST/DATABASE, which "
                      "several servers may share. Default: WORKDIR/serve.")  # fmt: skip
  flags.DEFINE_string("cache", "", "With a database: where copies and compiled programs are kept. Default: temporary.")
  flags.DEFINE_multi_string("task", [], "NAME=RETRIEVER_DIR: added or replaced at the start. May be repeated.")
  flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; another one needs --api-key-file.")
  flags.DEFINE_integer("port", 8000, "Port.", lower_bound=1, upper_bound=65535)
  flags.DEFINE_string("api-key-file", "", "Lines 'read: KEY' and 'admin: KEY'.")
  flags.DEFINE_list("allow", [], "Directories and URLs below which clients may name retrievers (PUT /tasks/NAME).")
  flags.DEFINE_integer("slots", 64, "Prompts on the device; a tied task takes one, another two.", lower_bound=1)
  flags.DEFINE_integer("prompt-length", 64, "Of the longest prompt that can be added.", lower_bound=1)
  flags.DEFINE_integer("max-tokens", 512, "Of the longest text that a task can read.", lower_bound=4)
  flags.DEFINE_integer("batch-tokens", 0, "Of a device's batch. 0: 2,048 on CPU, 32,768 on others.", lower_bound=0)
  flags.DEFINE_integer("queued-tokens", 524_288, "That may wait; beyond them 429.", lower_bound=1024)
  flags.DEFINE_enum("compute-dtype", "auto", ["auto", "float32", "bfloat16"], "Of matrix products.")


if __name__ == "__main__":
  define()
  commands.start(main)
