#!/usr/bin/env bash
# launch/local_cluster.sh PROCESSES [DEVICES] -- --config=FILE --workdir=DIR [--config.a.b=v ...]
# The main job as PROCESSES processes on this machine's CPU, each with DEVICES (1) simulated devices: a pod in small.
#
# Process K writes to DIR/logs/process-K.log, process 0 also to the terminal. When one fails the others are stopped and
# all are started again (launch/restart.sh says how often). SIGTERM or Ctrl-C: all save and end, status 75.
#   GRACE (20) seconds that the others have to end after the first has ended
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n '2,7s/^# \{0,1\}//p' launch/local_cluster.sh >&2
  exit 2
}

processes=${1:-} devices=1
shift || usage
if [ "${1:-}" != -- ]; then
  devices=${1:-}
  shift || usage
fi
[[ $processes =~ ^[1-9][0-9]*$ && $devices =~ ^[1-9][0-9]*$ && ${1:-} == -- ]] || usage
shift
workdir=''
for flag in "$@"; do
  case $flag in --workdir=?*) workdir=${flag#*=} ;; esac
done
[ -n "$workdir" ] || usage

source launch/environment.sh
source launch/restart.sh
use_environment
export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
# jax lets only process 0 write to it: the others would compile while it waits, and gloo waits no longer than 30 s.
unset JAX_COMPILATION_CACHE_DIR
free_port='import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
mkdir -p "$workdir/logs"

# One attempt: all processes from start to end. 0 if all ended so, 2 if one did, 75 if told to stop, else the first failure's.
attempt() {
  local first='' told='' deadline='' index pids=() statuses=() place=()
  trap 'told=yes; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM
  [ "$processes" -eq 1 ] || place=("--coordinator=localhost:$(python -c "$free_port")" "--processes=$processes")
  for ((index = 0; index < processes; index++)); do
    [ "$processes" -eq 1 ] || place[2]=--process=$index
    start "$index" "$@" "${place[@]}"
    pids+=($!)
  done
  [ -z "$told" ] || kill -TERM "${pids[@]}" 2>/dev/null || true # told before all were there
  while [ "${#statuses[@]}" -lt "$processes" ]; do
    sleep 0.2
    for index in "${!pids[@]}"; do
      if [ -z "${statuses[index]:-}" ] && ! kill -0 "${pids[index]}" 2>/dev/null; then
        statuses[index]=0
        wait "${pids[index]}" || statuses[index]=$?
        if [ "${statuses[index]}" -ne 0 ] && [ -z "$first" ]; then
          first=${statuses[index]} deadline=$((SECONDS + ${GRACE:-20}))
          [ -n "$told" ] || echo "local_cluster: process $index ended with status $first; stopping the others" >&2
          kill -TERM "${pids[@]}" 2>/dev/null || true
        fi
      fi
    done
    [ -z "$deadline" ] || [ $SECONDS -lt "$deadline" ] || kill -KILL "${pids[@]}" 2>/dev/null || true
  done
  [[ " ${statuses[*]} " != *' 2 '* ]] || return 2
  [ -z "$first" ] || [ -z "$told" ] || return 75
  return "${first:-0}"
}

start() {
  local log=$workdir/logs/process-$1.log
  echo "--- $(date '+%F %T'): process $1 of $processes" >>"$log"
  if [ "$1" -eq 0 ]; then
    python -m dptdr_jax.main "${@:2}" > >(tee -a "$log") 2>&1 &
  else
    python -m dptdr_jax.main "${@:2}" >>"$log" 2>&1 &
  fi
}

restart attempt "$@"
