#!/usr/bin/env bash
# Runs the whole workflow on real videos: convert, prepare, train (killed, resumed), sample, export, load in diffusers.
#
#     launch/real_input.sh VIDEOS OUT [SVD]
#
# VIDEOS is a folder of video files, OUT a new folder. SVD is a diffusers folder of Stable Video Diffusion; without it
# the script writes one of the same structure with small random networks, in fp32 and fp16 (needs the [test] extra).
# PYTHON names the interpreter; the default is that of .venv in this repository, or of the active environment.
set -euo pipefail
if [ "${1:-}" = --help ]; then sed -nE '2,/^[^#]/s/^#( |$)//p' "$0"; exit; fi
videos=${1:?give VIDEOS, a folder of videos; see --help} out=${2:?give OUT, a new folder; see --help}
svd=${3:-}
here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/launch/python.sh"
size=(--height=64 --width=128)
mkdir -p "$out"
run() { printf '\n$ %s\n' "$*"; "$@"; }

if [ -z "$svd" ]; then
  svd=$out/svd-small
  for variant in "" fp16; do run env PYTHONPATH="$here" "$python" -m tests.support.reference "$svd${variant:+-$variant}" $variant; done
  run "$python" -m sfv_jax.convert --src "$svd-fp16" --dst "$out/model-fp16"
fi
run "$python" -m sfv_jax.convert --src "$svd" --dst "$out/model"
run "$python" -m sfv_jax.prepare --videos "$videos" --svd "$out/model" --out "$out/cache" "${size[@]}" --batch_size=4

train=("$python" -m sfv_jax.train --config "$here/configs/sfv.py:printed" --workdir "$out/run" --config.init="$out/model"
  --config.data.path="$out/cache" --config.steps=60 --config.batch_size=2 --config.accumulation_steps=2
  --config.log_every=10 --config.checkpoint_every=10 --config.sample_every=30)
printf '\n$ %s   (killed by SIGKILL after step 20 is saved)\n' "${train[*]}"
"${train[@]}" & pid=$!
until [ -d "$out/run/checkpoints/20" ]; do sleep 1; kill -0 $pid; done
kill -KILL $pid; wait $pid || echo "killed: exit status $?"
run "${train[@]}"

image=$out/frame.png
"$python" - "$videos" "$image" <<'PY'
import sys
from sfv_jax.data.listing import list_videos
from sfv_jax.data.video import read_clip, write_video
write_video(sys.argv[2], read_clip(list_videos(sys.argv[1])[0], num_frames=1))
PY
run "$python" -m sfv_jax.sample --checkpoint "$out/run" --image "$image" --out "$out/video.mp4" "${size[@]}"
run "$python" -m sfv_jax.convert --export --src "$out/run" --dst "$out/exported"
printf '\n$ StableVideoDiffusionPipeline.from_pretrained("%s")\n' "$out/exported"
"$python" - "$out/exported" "$image" <<'PY'
import sys
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
pipe = StableVideoDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
frames = pipe(Image.open(sys.argv[2]), height=64, width=128, num_frames=14, num_inference_steps=1,
              min_guidance_scale=1, max_guidance_scale=1).frames[0]
print(f"diffusers made {len(frames)} frames of {frames[0].size} in one step")
PY
