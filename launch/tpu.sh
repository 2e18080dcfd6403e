#!/usr/bin/env bash
# A TPU VM, or every host of a pod slice.
#
#     launch/tpu.sh [--dry-run] --config configs/sfv.py --workdir /shared/runs/sfv ...           (on a TPU VM)
#     TPU=NAME ZONE=ZONE launch/tpu.sh [--dry-run] --config configs/sfv.py --workdir ... (from anywhere: on all hosts)
#
# With TPU set, the command runs on every host in REPO (default: sfv_jax in the home folder), a clone of this repository
# with .venv made there. On the hosts JAX finds the others by itself. The workdir must be on a disk all hosts see.
set -euo pipefail
dry=
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi

if [ -n "${TPU:-}" ]; then
  remote="cd ${REPO:-sfv_jax} && PYTHON=.venv/bin/python launch/tpu.sh$(printf ' %q' "$@")"
  command=(gcloud compute tpus tpu-vm ssh "$TPU" --zone="${ZONE:?name the zone}" --worker=all "--command=$remote")
else
  # The TPU compiler overlaps collectives without flags.
  command=("${PYTHON:-python3}" -m sfv_jax.train --coordinator=auto "$@")
fi
if [ -n "$dry" ]; then
  printf '%s\n' "${command[*]}"
  exit
fi
exec "${command[@]}"
