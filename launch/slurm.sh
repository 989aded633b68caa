#!/usr/bin/env bash
# sbatch [--nodes=N --gpus-per-node=G --ntasks-per-node=G ...] launch/slurm.sh --config=FILE --workdir=DIR [...]
# The main job on SLURM's GPUs, one task a GPU: so jax.distributed takes it, which gives a task the GPU of its local id.
# From the project's root, on a file system that all nodes share: the environment is made there once, DIR lies there too.
#
# A crash in any task starts all again in the same allocation; a lost node requeues the job. Five minutes before the
# time limit all save and the job requeues itself. scancel stops it for good; what is saved stays.
#   EXTRA (cuda) what to install jax with: cuda (CUDA 13), or cuda12 where the driver is too old for it
#SBATCH --job-name=dptdr
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail
if [ -z "${SLURM_JOB_ID:-}" ] || [ $# -eq 0 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
cd "$SLURM_SUBMIT_DIR" # SLURM runs a copy of this file from elsewhere
source launch/environment.sh
source launch/restart.sh
use_environment "[${EXTRA:-cuda}]"
export JAX_PLATFORMS=cuda,cpu

# srun ends with its tasks' highest status, and one that failed has the others killed (137): 2 must not drown in that.
# shellcheck disable=SC2016
task='trap : TERM; status=0; "$@" || status=$?; [ "$status" -ne 2 ] || status=255; exit "$status"'

# shellcheck disable=SC2329
attempt() {
  local status=0
  # To the tasks and not to srun, which would kill them.
  trap 'interrupted=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --label \
    bash -c "$task" task python -m dptdr_jax.main "$@" &
  follow $!
  [ "$status" -ne 255 ] || status=2
  return "$status"
}

# The time limit comes as USR1, so that scancel's TERM does not requeue.
requeue='' status=0
trap 'requeue=yes; pass_on' USR1
restart attempt "$@" || status=$?
if [ -n "$requeue" ] && [ "$status" -ne 0 ] && [ "$status" -ne 2 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
