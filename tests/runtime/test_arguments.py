"""Impossible values of flags: one line and a non-zero exit code before JAX is imported, for every command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
RUNNER = """
import json, os, runpy, sys, tempfile, traceback
from ml_collections import config_flags

for name in ("jax", "flax", "orbax"):
    sys.modules[name] = None  # importing them fails

import sfv_jax.data.settings, sfv_jax.evaluation.protocol, sfv_jax.sampling.files, sfv_jax.weights.writer  # once

def code_of(argv):
    sys.argv = argv
    try:
        runpy.run_module("sfv_jax." + argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

found = []
for argv in json.load(sys.stdin):
    with tempfile.TemporaryFile() as file:
        if not (child := os.fork()):
            os.dup2(file.fileno(), 2)
            os.dup2(file.fileno(), 1)
            code = code_of(argv)
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        file.seek(0)
        found.append([os.waitstatus_to_exitcode(status), file.read().decode()])
print(json.dumps(found))
"""


def run(cases: list[list[str]]) -> list[tuple[int, str]]:
    """Returns (exit code, output) of commands, each in a fork of one process without JAX."""
    command = [sys.executable, "-c", RUNNER]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a file, a folder, an image and a folder of one image."""
    place = tmp_path_factory.mktemp("place")
    (place / "file").touch()
    (place / "folder").mkdir()
    (place / "images").mkdir()
    (place / "pair").mkdir()
    (place / "clips").mkdir()
    (place / "clips" / "a.mp4").touch()
    (place / "broken").mkdir()
    (place / "broken" / "a.png").write_text("no image")
    for name in ("image.png", "images/a.png", "pair/a.png", "pair/b.png"):
        Image.new("RGB", (16, 16)).save(place / name)
    return place


# A command with flags that are possible, {} being the folder; each wrong flag is appended and stands.
GOOD = {
    "train": ["--config=configs/sfv.py", "--workdir={}/new"],
    "sample": ["--checkpoint={}/folder", "--image={}/image.png", "--out={}/out.mp4"],
    "convert": ["--src={}/folder", "--dst={}/new"],
    "prepare": ["--videos={}/clips", "--svd={}/folder", "--out={}/new"],
    "evaluate": ["--videos={}/clips", "--out={}/new"],
    "plan": ["--config=configs/sfv.py", "--target=cpu:1"],
    "benchmark": [],
    "reproduce": ["--workdir={}/new"],
    "quickstart": ["--workdir={}/new"],
}
FPS = ["--fps=0", "--fps=-7", "--fps=nan", "--fps=inf", "--fps=1e9", "--fps=1e400", "--fps=seven"]
SEED = ["--seed=-1", "--seed=4294967296", "--seed=1.5"]
MICRO = [f"--{name}={x}" for name in ("motion_bucket_id", "noise_aug_strength") for x in ("nan", "-1", "inf", "1e30")]
SIDES = [f"--{name}={x}" for name in ("height", "width") for x in (0, -8, 10**9, "nan")]
LONG = "9" * 5000  # digits that Python refuses to convert
EFFORT = [f"--{name}={x}" for name in ("compile_effort", "compile_memory_effort") for x in ("nan", "2", "-1.5")]
SIZE = ["--size=0x0", "--size=huge", "--size=576", "--size=576x1024 --height=576", "--size=99999x8", "--size="]
MESH = ["--mesh=0,1", "--mesh=1", "--mesh=-1,1", "--mesh=1,1,1,1", "--mesh=a,b", "--mesh=1.5,1"]
GUIDANCE = ["--guidance=nan,3", "--guidance=1", "--guidance=1,inf", "--guidance=-1,3", "--guidance=1,2,3"]
DECODER = ["--decoder=", "--decoder=huge", "--decoder={}/absent"]
PLACES = ["={}/file", "={}/file/below/it", "=", "= "]
SAMPLING = ["--steps=0", "--sampler=ddim", "--dtype=int8", "--vae_dtype=x", "--decode_chunk_size=0", "--batch_size=0"]
WRONG = {
    "train": [*(f"--workdir{x}" for x in PLACES), *EFFORT, "--num_processes=0", "--process_id=-1", "--config=none.py"],
    "sample": [
        *(*FPS, *SEED, *MICRO, *SIDES, *EFFORT, *MESH, *GUIDANCE, *SAMPLING),
        *("--num_frames=0", "--decode_pixels=-1", "--format=mov", "--checkpoint=", "--image=", "--out="),
        *("--out={}/x.mov", "--out={}/x", "--out={}/folder", "--out={}/file/x.mp4", "--out={}/image.png"),
        *("--out={}/out.gif --fps=60", "--image={}/absent.png", "--image={}/file", "--image={}/folder"),
        *("--image={}/images", "--image={}/images --out={}/images --format=png", "--checkpoint={}/absent"),
        "--image={}/pair --out={}/new --seed=4294967295",  # two images
        *(*SIZE, *DECODER, "--fit=zoom", "--fit=", "--image={}/broken --out={}/new"),
    ],
    "convert": [
        *("--src=", "--src={}/absent", "--base={}/absent", *(f"--dst{x}" for x in PLACES), "--dst={}/folder"),
        *("--dst={}/file --overwrite", "--num_frames=0", "--dtype=int8", "--what=onnx"),
        *("--max_shard_size=0GB", "--max_shard_size=nanGB", "--max_shard_size=big"),
        *("--export --what=comfyui", "--export --what=comfyui --dst={}/folder.safetensors/x"),
        "--export --what=comfyui --dst={}/folder --overwrite",
    ],
    "prepare": [
        *(*FPS, *SEED, *MICRO, *SIDES, *EFFORT, *(f"--out{x}" for x in PLACES), "--height=50"),
        *(*SIZE, "--fit=zoom", "--fit=", "--videos={}/folder"),
        *("--videos=", "--videos={}/absent", "--svd=", "--svd={}/absent", "--batch_size=0", "--threads=0"),
        *("--worker=-1", "--worker=1", "--workers=0", "--num_frames=0", "--clips_per_video=0", "--shard_size=0"),
        *("--heldout_fraction=nan", "--heldout_fraction=1", "--heldout_fraction=-0.1"),
    ],
    "evaluate": [
        *(*FPS, *SEED, *MICRO, *SIDES, *EFFORT, *MESH, *GUIDANCE, *SAMPLING, *(f"--out{x}" for x in PLACES)),
        *(*SIZE, *DECODER, "--videos={}/folder", "--reference={}/folder"),
        *("--videos={}/absent", "--reference={}/absent", "--i3d={}/absent", "--images={}/absent", "--svd={}/absent"),
        *("--checkpoint={}/absent", "--data={}/absent", "--statistics={}/folder", "--statistics={}/file/x.npz"),
        *("--n=-1", "--n=7", "--num_frames=1", "--score_height=0", "--score_width=nan", "--crop=center"),
        *("--filter=nearest", "--ddof=-1", "--ddof=2", "--shown=-1", "--dataset=kinetics", "--split=val"),
        *("--batch_norm_eps=nan", "--batch_norm_eps=0", "--batch_norm_eps=-1"),
    ],
    "plan": [
        *(
            *SIDES,
            *SIZE,
            *DECODER,
            *EFFORT,
            "--efficiency=0",
            "--efficiency=nan",
            "--efficiency=1.5",
            "--memory_gib=nan",
        ),
        *("--memory_gib=0", "--memory_gib=-1", "--batch_size=0", "--steps=0", "--what=dream", "--dtype=int8"),
        *("--json={}/folder", "--json={}/file/x.json", "--picture={}/folder", "--picture={}/x.svg", "--hlo={}/file"),
        *("--decode_pixels=-1", "--decode_chunk_size=0", "--config=none.py"),
    ],
    "benchmark": [
        *(*SIDES, "--num_frames=0", "--batch_size=0", "--repeats=0", "--networks=huge", "--dtype=int8"),
        *("--decoder=huge", "--compare=decoders", "--compare=torch", "--json={}/folder", "--json={}/file/x.json"),
    ],
    "reproduce": [
        *(*SIDES, *EFFORT, *(f"--workdir{x}" for x in PLACES), "--height=100", "--seeds=a", "--seeds=-1", "--seeds="),
        *("--seeds=4294967296", f"--seeds={LONG}", "--only=table9", "--share=2", "--share=a/b", f"--share={LONG}/1"),
        *("--jobs=0", "--batch_size=0", *DECODER, "--decoder=tiny", *(f"--scale=svd {x}" for x in DECODER)),
        *("--scale=x", "--svd={}/absent", "--data={}/absent", "--real={}/absent", "--i3d={}/absent"),
    ],
    "quickstart": [*(f"--workdir{x}" for x in PLACES), *EFFORT],
}


@pytest.mark.parametrize("command", WRONG)
def test_each_wrong_value_is_one_line_before_jax(command, place):
    before = sorted(place.rglob("*"))
    words = [[*GOOD[command], *re.split(" (?=--)", wrong)] for wrong in WRONG[command]]
    cases = [[command, *(word.format(place) for word in line)] for line in words]
    failures = [
        f"{' '.join(case)}: exit code {code}, {said!r}"
        for case, (code, said) in zip(cases, run(cases), strict=True)
        if code == 0 or not said.startswith(f"{command}: ") or said.count("\n") != 1
    ]
    assert not failures, "\n".join(failures)
    assert sorted(place.rglob("*")) == before


def test_possible_values_reach_jax(place):
    """The flags to which the wrong ones are appended are right: the commands go on to import JAX."""
    cases = [[command, *(word.format(place) for word in words)] for command, words in GOOD.items()]
    for case, (code, said) in zip(cases, run(cases), strict=True):
        assert code == 1 and "import of jax halted" in said, (case, said)
