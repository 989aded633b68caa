#!/usr/bin/env bash
# launch/restart.sh COMMAND ...: runs a command and starts it again after a crash or a preemption.
# Sourced, it gives the other scripts `restart COMMAND ...`, where COMMAND may be a function that handles SIGTERM.
#
# Never again: status 0 (done) and 2 (an error of input). Again: everything else, as a rerun goes on where it ended; also
# 75 (saved after SIGTERM) unless it was us who were told to stop.
# SIGTERM, SIGINT or SIGHUP to us: SIGTERM to the command, then its status is ours; a second one kills it.
#   RESTARTS    (10)   how many restarts in a row; an attempt of FREE_AFTER seconds or more ends the row
#   FREE_AFTER  (600)
#   PAUSE       (5)    seconds before the first restart of a row; twice as many before each further one, 300 at most
set -euo pipefail

restart() {
  local count=0 pause=${PAUSE:-5} began status interrupted told='' child=''
  set -m # a process group for the command, so that all of it can be killed
  trap pass_on TERM INT HUP
  while true; do
    began=$SECONDS
    "$@" &
    follow $!
    case $status in 0 | 2) return "$status" ;; esac
    [ -z "$told" ] || return "$status"
    [ $((SECONDS - began)) -lt "${FREE_AFTER:-600}" ] || count=0 pause=${PAUSE:-5}
    if [ "$count" -ge "${RESTARTS:-10}" ]; then
      echo "restart: status $status, after $count restarts in a row: giving up" >&2
      return "$status"
    fi
    count=$((count + 1))
    echo "restart: status $status; restart $count of ${RESTARTS:-10} in $pause s" >&2
    sleep "$pause" &
    follow $!
    [ -z "$told" ] || return 75
    pause=$((pause * 2 < 300 ? pause * 2 : 300))
  done
}

# Waits for a child, whatever signals come; its status is in `status`.
follow() {
  child=$1
  [ -z "$told" ] || kill -TERM "$child" 2>/dev/null || true # told while there was no child
  while true; do
    interrupted='' status=0
    wait "$child" || status=$?
    [ -n "$interrupted" ] || break # else it was the signal that ended `wait`
  done
  child=''
}

pass_on() {
  interrupted=yes
  if [ -n "$child" ]; then
    if [ -z "$told" ]; then kill -TERM "$child"; else kill -KILL -- "-$child"; fi 2>/dev/null || true
  fi
  told=yes
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  if [ $# -eq 0 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
  fi
  restart "$@"
fi
