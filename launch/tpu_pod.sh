#!/usr/bin/env bash
# TPU=NAME ZONE=Z [...] launch/tpu_pod.sh --config=FILE --workdir=DIR [--config.a.b=v ...]
# From your machine with gcloud: the main job on all workers of a TPU VM, a slice of any size, started again after a
# crash or a preemption. DIR, and the data, lie on a file system that all workers mount. Ctrl-C: all save and end.
# A --config=FILE outside configs/ is copied to the workers, that file alone; one that is not here is looked for there.
#   TYPE, VERSION  v5litepod-16, v2-alpha-tpuv5-lite, ...: a TPU that is not there is ordered as a queued resource of this
#                  accelerator type and runtime version, again after each preemption; without them it must be there
#   SPOT=1         as a spot VM
#   SETUP          a command for each worker before the installation, in a shell of its own: to mount the file system, to
#                  install a Python ('sudo apt-get install -y python3.11-venv'), ...; where it fails all is tried again
#   PYTHON         (python3) the workers' Python, 3.11 or newer and with venv; Ubuntu 22.04 images have 3.10 without it.
#                  An installation that fails is final, as an error of input is: status 2
#   TOPOLOGY       v5e:4x4, ...: first compile the run's steps for it, here, and stop where they do not fit
#   POLL (30)      seconds between two looks at a TPU that is not ready
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -eq 0 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then
  sed -n '2,15s/^# \{0,1\}//p' launch/tpu_pod.sh >&2
  exit 2
fi
source launch/restart.sh
log=$(mktemp -d)
mkdir "$log/given" # what the workers get besides the project
trap 'rm -r "$log"; echo "tpu_pod: $TPU is left as it is; while it is there it is paid for" >&2' EXIT

arguments=("$@") config=()
for index in "${!arguments[@]}"; do
  case $1 in --config*) config+=("$1") ;; esac
  case $1 in
    --config=?*)
      named=${1#*=}
      file=${named%%:*} # what follows goes to its get_config
      if [ -f "$file" ] && [[ $file != configs/* ]]; then
        cp "$file" "$log/given/"
        arguments[index]=--config=given/$(basename "$file")${named#"$file"}
      elif [ ! -f "$file" ] && [[ $file != /* ]]; then
        echo "error: no such file: $file" >&2
        exit 2
      fi
      ;;
  esac
  shift
done

if [ -n "${TOPOLOGY:-}" ]; then
  source launch/environment.sh
  use_environment "[plan]"
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
install="rm -rf dptdr_jax/dptdr_jax; mkdir -p dptdr_jax; tar -xzf dptdr_jax.tar.gz -C dptdr_jax; cd dptdr_jax
  source launch/environment.sh; PYTHON=$(printf %q "${PYTHON:-python3}"); make_environment .venv '[tpu]'"
# 128 and more: killed, as the machine goes away.
prepare="$kill_left; ( ${SETUP:-true}
) && { bash -euc $(printf %q "$install") || { [ \$? -ge 128 ] || echo 'installation: failed'; exit 1; }; }"
job="cd dptdr_jax && { JAX_PLATFORMS=tpu,cpu .venv/bin/python -m dptdr_jax.main --coordinator=auto \
  $(printf '%q ' "${arguments[@]}")& echo \$! >pid; wait \$!; status=\$?; } &&
  echo \"main job: status \$status\" && exit \$status"

# ssh has one status for all workers: what each says at its end counts.
on_all_told() { on_all "$1" 2>&1 | tee "$log/output"; }
said() { grep -q "$1\$" "$log/output"; }

# shellcheck disable=SC2329
attempt() {
  local status=0
  trap 'exit 75' TERM # as long as nothing runs
  wait_for_tpu || return
  tar -czf "$log/dptdr_jax.tar.gz" configs dptdr_jax launch LICENSE README.md pyproject.toml requirements.txt \
    -C "$log" given
  vm scp "$log/dptdr_jax.tar.gz" "$TPU:" --worker=all || return 1
  on_all_told "$prepare" || status=$?
  ! said 'installation: failed' || return 2
  [ "$status" -eq 0 ] || return 1
  trap 'interrupted=yes; on_all "pkill -TERM -F dptdr_jax/pid -f dptdr_jax.main"' TERM
  on_all_told "$job" &
  follow $!
  ! said 'main job: status 2' || status=2
  return "$status"
}

restart attempt "$@"
