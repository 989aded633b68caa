"""`python -m dptdr_jax.main --config=configs/NAME.py --workdir=DIR`: flags, hosts, and over to the pipeline."""

from __future__ import annotations

import sys
import traceback

from absl import flags
from ml_collections import config_flags

from dptdr_jax.core import commands, preemption
from dptdr_jax.core.errors import DptdrError, PassingError

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


def main(_: list[str]) -> int:
  """Runs what is not yet done; returns the exit status.

  0: done; 2: an error of input; 75: stopped by SIGTERM, all saved; 1: a crash, or the other processes are lost, or the
  remote is away.
  """
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
    status = 1 if isinstance(error, PassingError) else 2
  except Exception:
    traceback.print_exc()
    status = 1
  else:
    return 0
  hosts.leave(status)
  return status


def run() -> None:
  """Entry point: parses the flags and runs `main`."""
  commands.start(main, ["config", "workdir"])


if __name__ == "__main__":
  run()
