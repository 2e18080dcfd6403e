#!/usr/bin/env bash
# Measures a new accelerator in a few minutes: limits, parity, sampling, diffusers beside it, a train step.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: launch/accelerator_check.sh [--minutes 8] [--wheels DIR] [--tiny] [--only STAGE,...] --out DIR

Runs every stage of sfv_jax.performance.accelerator_check within the given minutes, on the first device that JAX finds.
DIR gets a JSON file and a log for each stage, results.json and results.md (the table of docs/benchmarks.md). What was
measured before a cut stays.

  --minutes N    time for everything; default 8
  --wheels DIR   folder of wheels that the machine lacks (diffusers, ...); installed without a network into DIR/site of
                 --out, not into the environment
  --tiny         tiny networks: a rehearsal on a CPU in about three minutes
  --only LIST    stages to run: device,parity,sampling,diffusers,train,extras

Needs Python with jax, flax, optax, orbax, einops, numpy, and for the stage diffusers torch and diffusers.
PYTHON names the interpreter; default: .venv/bin/python of the repository, else python3.
EOF
}

here="$(cd "$(dirname "$0")/.." && pwd)"
out="" wheels="" arguments=()
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) usage; exit 0 ;;
        --out) out="${2:?--out needs a folder}"; shift 2 ;;
        --out=*) out="${1#*=}"; shift ;;
        --wheels) wheels="${2:?--wheels needs a folder}"; shift 2 ;;
        --wheels=*) wheels="${1#*=}"; shift ;;
        --minutes) arguments+=("--minutes=${2:?--minutes needs a number}"); shift 2 ;;
        --only) arguments+=("--only=${2:?--only needs stages}"); shift 2 ;;
        --minutes=* | --only=* | --tiny) arguments+=("$1"); shift ;;
        *) echo "accelerator_check.sh: unknown argument $1; see --help" >&2; exit 2 ;;
    esac
done
[ -n "$out" ] || { usage >&2; exit 2; }

python="${PYTHON:-}"
if [ -z "$python" ]; then
    python=python3
    [ ! -x "$here/.venv/bin/python" ] || python="$here/.venv/bin/python"
fi
mkdir -p "$out"
out="$(cd "$out" && pwd)"
if [ -n "$wheels" ]; then  # without their dependencies: the image has its own torch, numpy and the like
    "$python" -m pip install --quiet --no-index --no-deps --target "$out/site" "$wheels"/*.whl ||
        echo "accelerator_check.sh: some wheels of $wheels could not be installed; going on without them" >&2
    export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
fi
cd "$here"
exec "$python" -m sfv_jax.performance.accelerator_check --out="$out" "${arguments[@]}"
