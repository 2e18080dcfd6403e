#!/usr/bin/env bash
# The tables at `--scale svd` from beginning to end with small random networks: what a pod will do, in minutes on CPU.
#
#     launch/tables_small.sh VIDEOS OUT [--only=table2]
#
# VIDEOS is a folder of 20 or more video files of 14 frames, which stand for the training data and for UCF-101; OUT a new
# folder. Networks and I3D are random (needs the [test] extra), so the numbers say nothing; that they come out does.
set -euo pipefail
videos=${1:?folder of videos} out=${2:?new folder}
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
size=(--height=64 --width=128)
shift 2
mkdir -p "$out"
run() { printf '\n$ %s\n' "$*"; "$@"; }

run env PYTHONPATH="$here" "$python" -m tests.reference "$out/svd-small"
run "$python" -m sfv_jax.convert --src "$out/svd-small" --dst "$out/model"
run "$python" -m sfv_jax.prepare --videos "$videos" --svd "$out/model" --out "$out/cache" "${size[@]}" --batch_size=4
"$python" - "$out/i3d.pt" <<'PY'
import sys
import numpy as np
import torch
from sfv_jax.models import i3d, tree
rng, content = np.random.default_rng(0), {}
leaves = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var", "bias": "bias"}
for path, x in tree.flatten(tree.abstract(i3d.I3D, i3d.I3DConfig())[1]).items():
    module, leaf = path.rsplit(".", 1)
    fan_in = np.prod(x.shape[:-1]) if leaf == "kernel" else 0
    value = np.float32(rng.standard_normal(x.shape) * np.sqrt(2 / fan_in) if fan_in else np.full(x.shape, leaf in ("scale", "var")))
    value = torch.from_numpy(value)
    content[f"{module}.{leaves[leaf]}"] = value.permute(4, 3, 0, 1, 2) if leaf == "kernel" else value
torch.save(content, sys.argv[1])
PY
tables=("$python" -m sfv_jax.reproduce --scale svd --svd "$out/model" --data "$out/cache" --real "$videos"
  --i3d "$out/i3d.pt" --workdir "$out/tables" "${size[@]}" --set steps=2 --set batch_size=2 --set accumulation_steps=1
  --set dtype=float32 --set log_every=1 --set sample_every=0 --set unet.temporal_conv=matmul)
run "${tables[@]}" "$@"
