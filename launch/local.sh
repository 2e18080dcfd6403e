#!/usr/bin/env bash
# Trains in several processes on this machine, connected over loopback: a rehearsal for a cluster.
#
#     launch/local.sh [--dry-run] [-n PROCESSES] [-d DEVICES] -- --config configs/sfv.py:tiny --workdir runs/local ...
#
# Each process has DEVICES fake CPU devices. The output of process 0 is shown; that of the others goes to
# $LOGS/process-I.log (default: a new temporary folder). If one process fails, all are stopped and the logs are shown.
# PYTHON names the interpreter; the default is that of .venv in this repository, or of the active environment.
# --dry-run prints the command instead of running it.
set -euo pipefail
processes=2 devices=4 dry=
while [ $# -gt 0 ]; do
  case $1 in
    --help) sed -nE '2,/^[^#]/s/^#( |$)//p' "$0"; exit ;;
    --dry-run) dry=1; shift ;;
    -n) processes=$2; shift 2 ;;
    -d) devices=$2; shift 2 ;;
    --) shift; break ;;
    *) echo "local.sh: $1? arguments of train come after --; see --help" >&2; exit 2 ;;
  esac
done
here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/launch/python.sh"
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices
export JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo  # exchanges data between processes over TCP
train=("$python" -m sfv_jax.train "--coordinator=127.0.0.1:$port" "--num_processes=$processes" "$@")
if [ -n "$dry" ]; then
  printf 'JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=%q JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo' "$devices"
  printf ' %q' "${train[@]}"
  echo " --process_id={0..$((processes - 1))}"
  exit
fi

logs=${LOGS:-$(mktemp -d)} pids=() stopping=
finish() {  # TERM alone leaves a process that waits for one that is gone: JAX waits on for minutes
  kill -TERM "${pids[@]}" 2>/dev/null || return 0
  for _ in {1..50}; do
    kill -0 "${pids[@]}" 2>/dev/null || break  # fails only if all are gone
    sleep 0.1
  done
  kill -KILL "${pids[@]}" 2>/dev/null || true
}
trap finish EXIT
# To every process, as a scheduler does; they save and end by themselves.
trap 'stopping=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM HUP INT
for ((i = processes - 1; i > 0; i--)); do
  "${train[@]}" "--process_id=$i" >"$logs/process-$i.log" 2>&1 &
  pids+=($!)
done
"${train[@]}" --process_id=0 &
pids+=($!)
status=0 left=$processes
while [ "$left" -gt 0 ]; do
  code=0
  wait -n || code=$?
  if [ -n "$stopping" ] && [ "$code" -gt 128 ]; then  # a signal, not the end of a process
    stopping=
    continue
  fi
  left=$((left - 1))
  [ "$code" = 0 ] || { status=$code; break; }
done
[ "$status" = 0 ] || tail -n 20 "$logs"/process-*.log >&2 || true
exit "$status"
