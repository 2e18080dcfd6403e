"""The README's road, command by command as printed, on a small SVD-shaped folder and two videos made here."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sfv_jax.data.video import read_clip, write_video
from sfv_jax.data.worlds import World

ROOT = Path(__file__).parent.parent
# What makes the commands small; everything else is taken from the README.
SMALL = {
    "prepare": ["--height=64", "--width=64"],
    "train": [
        "--config.steps=2",
        "--config.batch_size=1",
        "--config.accumulation_steps=1",
        "--config.dtype=float32",
        "--config.unet.temporal_conv=matmul",
        "--config.sample_every=0",
    ],
    "sample": ["--height=64", "--width=64"],
}

QUICK = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compile soon, run slowly


def readme_commands() -> list[list[str]]:
    """The `python -m sfv_jax.X` commands of the section on one's own videos."""
    section = (ROOT / "README.md").read_text().split("## On your own videos")[1]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].replace("\\\n", " ")
    return [shlex.split(line) for line in block.splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def place(tmp_path_factory, pipeline_folder):
    """A working directory that holds what the README's commands name."""
    place = tmp_path_factory.mktemp("readme")
    (place / "stable-video-diffusion-img2vid").symlink_to(pipeline_folder)
    (place / "configs").symlink_to(ROOT / "configs")
    world = World(size=64, num_frames=16, radii=(8.0, 16.0))
    for n in range(2):
        (place / "clips").mkdir(exist_ok=True)
        write_video(place / "clips" / f"{n}.mp4", world.clip(n)[0], fps=7)
    write_video(place / "in.png", world.clip(2)[0][:1])
    return place


def test_the_commands_of_the_readme(place, pipeline_folder):
    commands = readme_commands()
    assert [command[2].removeprefix("sfv_jax.") for command in commands] == [
        "convert",
        "prepare",
        "train",
        "sample",
        "convert",
    ]
    for python, *rest in commands:
        assert python == "python"
        small = SMALL.get(rest[1].removeprefix("sfv_jax."), [])
        done = subprocess.run([sys.executable, *rest, *small], cwd=place, env=QUICK, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    length = json.loads((pipeline_folder / "unet" / "config.json").read_text())["num_frames"]
    frames = read_clip(place / "out.mp4", num_frames=length)
    assert frames.shape == (length, 64, 64, 3)
    record = json.loads((place / "out.json").read_text())
    assert record["steps"] == 1 and record["step"] == 2 and record["seed"] == 0
    lines = [json.loads(line) for line in (place / "runs/sfv/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2] and np.isfinite(list(lines[0].values())).all()
    exported = place / "exported"
    assert json.loads((exported / "model_index.json").read_text())["_class_name"] == "StableVideoDiffusionPipeline"
    theirs, ours = (folder / "vae/diffusion_pytorch_model.safetensors" for folder in (pipeline_folder, exported))
    assert ours.read_bytes() == theirs.read_bytes()  # what was not trained comes out as it went in


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("sample", ["--checkpoint=nowhere", "--image=in.png", "--out=x.mp4"], "sample: nowhere does not exist"),
        ("convert", ["--src=nowhere", "--dst=x"], "convert: nowhere does not exist"),
        (
            "train",
            ["--config=configs/sfv.py", "--workdir=x", "--config.batchsize=1"],
            "train: no such config field: 'batchsize' Did you mean \"batch_size\"",
        ),
        ("train", ["--config=configs/sfv.py", "--workdir=x"], "train: config.init is empty"),
        ("prepare", ["--videos=clips", "--svd=nowhere", "--out=x"], "prepare: nowhere"),
        ("evaluate", ["--videos=clips", "--reference=clips", "--out=x"], "evaluate: FVD needs I3D weights"),
    ],
)
def test_bad_input_is_one_line(place, module, arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", f"sfv_jax.{module}", *arguments], cwd=place, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(message)
    assert not list(place.glob("x*"))
