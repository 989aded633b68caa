"""`python -m dptdr_jax.main --config=configs/NAME.py --workdir=DIR`: flags, hosts, and over to the pipeline."""

from __future__ import annotations

import logging
import sys
import traceback

from absl import app, flags
from ml_collections import config_flags

from dptdr_jax.core import preemption
from dptdr_jax.core.errors import DptdrError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; --config.a.b=v overrides a field.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run. A rerun goes on where the last one ended.")
_REMOTE = flags.DEFINE_string(
  "remote", None, "URL (gs://…, s3://…) of the run's safe copy: a machine whose --workdir is gone goes on from it."
)
_STAGES = flags.DEFINE_list("stages", [], "Stages to run, by name ('train' means all rounds); default: all.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "Several processes: host:port of the first (SLURM, GKE: found; Cloud TPU VMs: 'auto')."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "Several processes: how many there are.")
_PROCESS = flags.DEFINE_integer("process", None, "Several processes: which one this is, from 0.")
_VERIFY = flags.DEFINE_bool("verify", False, "Hash the input files again instead of trusting their size and time.")


def main(argv: list[str]) -> int:
  """Runs what is not yet done; returns the exit status.

  0: done; 2: an error of input; 75: stopped by SIGTERM, all saved; 1: a crash, or the other processes are lost.
  """
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  from dptdr_jax.runtime import hosts

  try:
    hosts.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    preemption.install()  # after jax.distributed, which takes SIGTERM for itself
    from dptdr_jax import pipeline  # after the processes have met: nothing may touch a device before

    pipeline.run(_CONFIG.value, _WORKDIR.value, _STAGES.value, _VERIFY.value, _REMOTE.value)
  except preemption.Preempted as stop:
    if not stop.agreed:
      hosts.tell_stop()
    sys.stderr.write(f"stopped by SIGTERM: {stop}; the same command goes on from there\n")
    status = preemption.EXIT_STATUS
  except DptdrError as error:
    sys.stderr.write(f"error: {error}\n")
    status = 1 if isinstance(error, hosts.LostError) else 2
  except Exception:
    traceback.print_exc()
    status = 1
  else:
    return 0
  hosts.leave(status)
  return status


def run() -> None:
  """Entry point: parses the flags and runs `main`."""
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
  """Flags as absl parses them; an unknown or ill-typed config field is one line like every other error of input."""
  try:
    rest = app.parse_flags_with_usage(argv)
    if flags.FLAGS["verbosity"].using_default_value:
      flags.FLAGS.verbosity = -1  # warnings; at INFO, app.run's own choice, orbax and others have much to tell
    logging.getLogger("dptdr_jax").setLevel(logging.INFO)
    _CONFIG.value.to_dict()  # a file that could not be loaded says so here
    return rest
  except (AttributeError, ImportError, KeyError, TypeError, ValueError, OSError) as error:
    sys.stderr.write("error: config: {}\n".format(" ".join(str(error).replace("\\n", " ").split())))
    raise SystemExit(2) from None


if __name__ == "__main__":
  run()
