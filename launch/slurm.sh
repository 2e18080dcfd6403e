#!/usr/bin/env bash
# Trains on GPU nodes under SLURM: one process per GPU; JAX reads their number and places from SLURM's variables.
#
#     sbatch --nodes=4 launch/slurm.sh --config configs/sfv.py --workdir /shared/runs/sfv --config.init=/shared/svd ...
#
# The workdir, the model and the data must be on a disk that all nodes share. SLURM sends SIGTERM five minutes before
# the time limit: the run saves and stops; submit the same command again to continue. Submit from the repository: the
# interpreter is that of its .venv, or of the active environment, unless PYTHON names another.
# `launch/slurm.sh --dry-run ...` prints the command of each task.
#SBATCH --job-name=sfv
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -nE '2,/^[^#]/s/^#( |$)//p' "$0"; exit; fi
dry=
if [ "${1:-}" = --dry-run ]; then dry=--dry-run; shift; fi

# sbatch runs a copy of this file from another folder.
here=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}
# Proxies would intercept the connection to process 0.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY
# JAX takes the GPU whose number is SLURM_LOCALID, so every task must see all GPUs of its node: no binding.
command=(srun --kill-on-bad-exit=1 --gpu-bind=none "$here/launch/gpu.sh" "$@")
if [ -n "$dry" ]; then
  printf '%q' "${command[0]}"
  printf ' %q' "${command[@]:1}"
  echo
  exec "$here/launch/gpu.sh" --dry-run "$@"
fi
exec "${command[@]}"
