#!/usr/bin/env bash
# launch/gpus.sh --config=FILE --workdir=DIR [--config.a.b=v ...]
# The main job on this machine's NVIDIA GPUs, all of them in one process (CUDA_VISIBLE_DEVICES chooses), with restarts.
#   EXTRA (cuda) what to install jax with: cuda (CUDA 13), or cuda12 where the driver is too old for it
#   JAX_COMPILATION_CACHE_DIR (~/.cache/dptdr_jax) compiled programs, so that restarts and other runs compile nothing anew
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
  sed -n '2,5s/^# \{0,1\}//p' launch/gpus.sh >&2
  exit 2
fi
source launch/environment.sh
source launch/restart.sh
use_environment "[${EXTRA:-cuda}]"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/dptdr_jax}"
export JAX_PLATFORMS=cuda,cpu # without a GPU: an error, not a slow run on the CPU
python -c 'import jax; print("GPUs:", *jax.devices())' || {
  echo "error: jax finds no GPU here; look at nvidia-smi, set EXTRA=cuda12 for an older driver" >&2
  exit 2
}
restart python -m dptdr_jax.main "$@"
