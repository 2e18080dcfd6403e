#!/usr/bin/env bash
# Makes the tables of `--scale svd` with small random networks, start to finish: a rehearsal for a pod, minutes on CPU.
#
#     launch/tables_small.sh VIDEOS OUT [--only=table2]
#
# VIDEOS is a folder of 20 or more video files of 14 frames, which stand in for the training data and for UCF-101; OUT
# is a new folder. Networks and I3D are random (needs the [test] extra), so the numbers mean nothing; the run shows that
# every stage works. Further arguments go to `reproduce`.
# PYTHON names the interpreter; the default is that of .venv in this repository, or of the active environment.
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -nE '2,/^[^#]/s/^#( |$)//p' "$0"; exit; fi
videos=${1:?give VIDEOS, a folder of videos; see --help} out=${2:?give OUT, a new folder; see --help}
here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/launch/python.sh"
size=(--height=64 --width=128)
shift 2
mkdir -p "$out"
run() { printf '\n$ %s\n' "$*"; "$@"; }

run env PYTHONPATH="$here" "$python" -m tests.support.reference "$out/svd-small"
run "$python" -m sfv_jax.convert --src "$out/svd-small" --dst "$out/model"
run "$python" -m sfv_jax.prepare --videos "$videos" --svd "$out/model" --out "$out/cache" "${size[@]}" --batch_size=4
run env PYTHONPATH="$here" "$python" -m tests.support.random_i3d "$out/i3d.pt"
tables=("$python" -m sfv_jax.reproduce --scale svd --svd "$out/model" --data "$out/cache" --real "$videos"
  --i3d "$out/i3d.pt" --workdir "$out/tables" "${size[@]}" --set steps=2 --set batch_size=2 --set accumulation_steps=1
  --set log_every=1 --set sample_every=0)
run "${tables[@]}" "$@"
