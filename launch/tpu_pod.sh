#!/usr/bin/env bash
# TPU=NAME ZONE=Z [...] launch/tpu_pod.sh --config=FILE --workdir=DIR [--config.a.b=v ...]
# From your machine with gcloud: the main job on all workers of a TPU VM, a slice of any size, started again after a
# crash or a preemption. DIR, and the data, lie on a file system that all workers mount. Ctrl-C: all save and end.
#   TYPE, VERSION  v5litepod-16, v2-alpha-tpuv5-lite, ...: a TPU that is not there is ordered as a queued resource of this
#                  accelerator type and runtime version, again after each preemption; without them it must be there
#   SPOT=1         as a spot VM
#   SETUP          a command for each worker before the job, to mount the file system for example
#   TOPOLOGY       v5e:4x4, ...: first compile the run's steps for it, here, and stop where they do not fit
#   POLL (30)      seconds between two looks at a TPU that is not ready
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -eq 0 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then
  sed -n '2,10s/^# \{0,1\}//p' launch/tpu_pod.sh >&2
  exit 2
fi
source launch/restart.sh
log=$(mktemp -d)
trap 'rm -r "$log"; echo "tpu_pod: $TPU is left as it is; while it is there it is paid for" >&2' EXIT

if [ -n "${TOPOLOGY:-}" ]; then
  source launch/environment.sh
  use_environment "[plan]"
  config=()
  for flag in "$@"; do
    case $flag in --config*) config+=("$flag") ;; esac
  done
  python -m dptdr_jax.plan --topology="$TOPOLOGY" "${config[@]}" || exit 2
fi

vm() { gcloud compute tpus tpu-vm "$1" "${@:2}" --zone="$ZONE"; }
queue() { gcloud compute tpus queued-resources "$1" "$TPU" "${@:2}" --zone="$ZONE"; }
on_all() { vm ssh "$TPU" --worker=all --command="$1"; }

# Returns when the TPU is ready; orders it where it is absent, or was and is taken away.
wait_for_tpu() {
  local state
  while true; do
    [ "$(vm describe "$TPU" --format='value(state)' 2>/dev/null)" != READY ] || return 0
    [ -n "${TYPE:-}" ] && [ -n "${VERSION:-}" ] || {
      echo "error: TPU $TPU is not ready in $ZONE; set TYPE and VERSION to have it ordered" >&2
      return 2
    }
    state=$(queue describe --format='value(state.state)' 2>/dev/null) || state=ABSENT
    echo "tpu_pod: $TPU is $state" >&2
    case $state in
      ABSENT) queue create --node-id="$TPU" --accelerator-type="$TYPE" --runtime-version="$VERSION" ${SPOT:+--spot} || return 1 ;;
      SUSPENDED | FAILED) queue delete --force --quiet || return 1 ;;
      *) sleep "${POLL:-30}" ;;
    esac
  done
}

# What a lost connection has left running ends first; -F and -f: by its number, if that is still the main job's.
kill_left="pkill -KILL -F dptdr_jax/pid -f dptdr_jax.main"
install="rm -rf dptdr_jax/dptdr_jax && mkdir -p dptdr_jax && tar -xzf dptdr_jax.tar.gz -C dptdr_jax && cd dptdr_jax &&
  source launch/environment.sh && make_environment .venv '[tpu]'"
job="cd dptdr_jax && { JAX_PLATFORMS=tpu,cpu .venv/bin/python -m dptdr_jax.main --coordinator=auto \
  $(printf '%q ' "$@")& echo \$! >pid; wait \$!; status=\$?; } &&
  echo \"main job: status \$status\" && exit \$status"

# shellcheck disable=SC2329
attempt() {
  local status=0
  trap 'exit 75' TERM # as long as nothing runs
  wait_for_tpu || return
  tar -czf "$log/dptdr_jax.tar.gz" configs dptdr_jax launch LICENSE README.md pyproject.toml requirements.txt
  vm scp "$log/dptdr_jax.tar.gz" "$TPU:" --worker=all || return 1
  on_all "$kill_left; $install && ${SETUP:-true}" || return 1
  trap 'interrupted=yes; on_all "pkill -TERM -F dptdr_jax/pid -f dptdr_jax.main"' TERM
  { on_all "$job" 2>&1 | tee "$log/output"; } &
  follow $!
  ! grep -q 'main job: status 2$' "$log/output" || status=2 # ssh has one status for all workers
  return "$status"
}

restart attempt "$@"
