#!/usr/bin/env bash
# Trains on a TPU VM, or on every host of a pod slice.
#
#     launch/tpu.sh [--dry-run] --config configs/sfv.py --workdir /shared/runs/sfv ...           (on a TPU VM)
#     TPU=NAME ZONE=ZONE launch/tpu.sh [--dry-run] --config configs/sfv.py --workdir ... (from anywhere: on all hosts)
#
# With TPU set, the command runs on every host in the folder REPO (default: sfv_jax in the home folder), a clone of this
# repository with its own .venv. The hosts find each other through JAX. The workdir must be on a disk all hosts share.
# PYTHON names the interpreter; the default is that of .venv in this repository, or of the active environment.
# --dry-run prints the command instead of running it.
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -nE '2,/^[^#]/s/^#( |$)//p' "$0"; exit; fi
dry=
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi

if [ -n "${TPU:-}" ]; then
  remote="cd ${REPO:-sfv_jax} && PYTHON=.venv/bin/python launch/tpu.sh$(printf ' %q' "$@")"
  command=(gcloud compute tpus tpu-vm ssh "$TPU" --zone="${ZONE:?name the zone}" --worker=all "--command=$remote")
else
  here=$(cd "$(dirname "$0")/.." && pwd)
  . "$here/launch/python.sh"
  # The TPU compiler overlaps collectives without flags.
  command=("$python" -m sfv_jax.train --coordinator=auto "$@")
fi
if [ -n "$dry" ]; then
  printf '%q' "${command[0]}"
  printf ' %q' "${command[@]:1}"
  echo
  exit
fi
exec "${command[@]}"
