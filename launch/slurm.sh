#!/usr/bin/env bash
# GPU nodes under SLURM: one process per GPU, found by JAX from SLURM's variables.
#
#     sbatch --nodes=4 launch/slurm.sh --config configs/sfv.py --workdir /shared/runs/sfv --config.init=/shared/svd ...
#
# The workdir, the model and the data must be on a disk that all nodes see. SLURM sends SIGTERM five minutes before the
# time limit: the run saves and stops; submit the same command again to continue. `launch/slurm.sh --dry-run ...` prints
# what each task would run.
#SBATCH --job-name=sfv
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
set -euo pipefail
dry=
if [ "${1:-}" = --dry-run ]; then dry=--dry-run; shift; fi

# Under sbatch this file is a copy elsewhere; submit from the repository.
here=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}
# Proxies would catch the connection to process 0.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY
# JAX takes GPU number SLURM_LOCALID of its node, so every task must see all of them: no binding.
command=(srun --kill-on-bad-exit=1 --gpu-bind=none "$here/launch/gpu.sh" "$@")
if [ -n "$dry" ]; then
  printf '%s\n' "${command[*]}"
  exec "$here/launch/gpu.sh" --dry-run "$@"
fi
exec "${command[@]}"
