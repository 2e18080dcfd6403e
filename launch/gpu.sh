#!/usr/bin/env bash
# All GPUs of one machine, one process.
#
#     launch/gpu.sh [--dry-run] --config configs/sfv.py --workdir runs/sfv --config.init=models/svd ...
#
# Add --config.mesh.fsdp=8 to keep parameters, optimiser state and EMA in eighths. PYTHON names the interpreter.
set -euo pipefail
dry=
if [ "${1:-}" = --dry-run ]; then dry=1; shift; fi

flags=(
  --xla_gpu_enable_latency_hiding_scheduler=true  # gathers of the next weights run beside the layers before them
  --xla_gpu_all_gather_combine_threshold_bytes=67108864  # some layers per gather, not all: gathered weights take memory
  --xla_gpu_reduce_scatter_combine_threshold_bytes=67108864  # the same for their gradients
)
export XLA_FLAGS="${XLA_FLAGS:-} ${flags[*]}"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}  # the rest is for cuDNN and NCCL
command=("${PYTHON:-python3}" -m sfv_jax.train "$@")
if [ -n "$dry" ]; then
  printf '%s\n' "XLA_FLAGS='$XLA_FLAGS'" "XLA_PYTHON_CLIENT_MEM_FRACTION=$XLA_PYTHON_CLIENT_MEM_FRACTION" "${command[*]}"
  exit
fi
exec "${command[@]}"
