#!/usr/bin/env bash
# Trains on all GPUs of one machine, in one process.
#
#     launch/gpu.sh [--dry-run] --config configs/sfv.py --workdir runs/sfv --config.init=models/svd ...
#
# Add --config.mesh.fsdp=8 to store an eighth of the parameters, optimizer state and EMA on each of eight GPUs.
# PYTHON names the interpreter; the default is that of .venv in this repository, or of the active environment.
# --dry-run prints the command instead of running it.
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -nE '2,/^[^#]/s/^#( |$)//p' "$0"; exit; fi
dry=
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi
here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/launch/python.sh"

flags=(
  --xla_gpu_enable_latency_hiding_scheduler=true  # gathers the next layers' weights while the current layers compute
  --xla_gpu_all_gather_combine_threshold_bytes=67108864  # a few layers per gather: gathered weights take memory
  --xla_gpu_reduce_scatter_combine_threshold_bytes=67108864  # the same for their gradients
)
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }${flags[*]}"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}  # leaves room for cuDNN and NCCL
command=("$python" -m sfv_jax.train "$@")
if [ -n "$dry" ]; then
  printf "XLA_FLAGS='%s' XLA_PYTHON_CLIENT_MEM_FRACTION=%q" "$XLA_FLAGS" "$XLA_PYTHON_CLIENT_MEM_FRACTION"
  printf ' %q' "${command[@]}"
  echo
  exit
fi
exec "${command[@]}"
