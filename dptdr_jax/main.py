"""`python -m dptdr_jax.main --config=configs/NAME.py --workdir=DIR`: flags, then one call of the pipeline."""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from dptdr_jax.core import commands, preemption

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file; --config.a.b=v overrides a setting.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run. A rerun resumes.")
_STORE = flags.DEFINE_string("store", None, "Directory of artefacts that several runs share; default: WORKDIR/store.")
_REMOTE = flags.DEFINE_string("remote", None, "URL (gs://…, s3://…) of a copy of the store, to resume from if the "
                              "local disk is lost.")  # fmt: skip
_STAGES = flags.DEFINE_list("stages", [], "Stages to run, by name ('train' means all rounds); default: all.")
_VERIFY = flags.DEFINE_bool("verify", False, "Compare checksums of input files and artefacts, not only their sizes.")
_PRUNE = flags.DEFINE_bool("prune", False, "Afterwards remove the artefacts that no run of the store needs.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "Several processes: host:port of the first (SLURM, GKE: detected; Cloud TPU VMs: 'auto')."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "Several processes: how many there are.")
_PROCESS = flags.DEFINE_integer("process", None, "Several processes: which one this is, from 0.")


def main(_: list[str]) -> int:
  """Runs what is not yet done; returns the exit status.

  0: done; 2: an error of input; 75: stopped by SIGTERM or Ctrl-C, all saved; 1: a restart may help.
  """
  from dptdr_jax.runtime import hosts

  def work() -> None:
    hosts.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    preemption.install()  # after jax.distributed, which takes SIGTERM for itself
    from dptdr_jax.pipeline.run import run  # after the processes have met: nothing may touch a device before

    options = {"store": _STORE.value, "verify": _VERIFY.value, "url": _REMOTE.value, "prune": _PRUNE.value}
    run(_CONFIG.value, _WORKDIR.value, _STAGES.value, **options)

  status = commands.status_of(work, on_stop=hosts.TEAM.tell_stop)
  hosts.leave(status)
  return status


def run() -> None:
  """Entry point: parses the flags and runs `main`."""
  commands.start(main, ["config", "workdir"])


if __name__ == "__main__":
  run()
