"""What a run says before its first step, and what it does not load."""

import subprocess
import sys
from functools import partial

import jax
import pytest

from sfv_jax.runtime import sharding
from sfv_jax.training import loop
from tests.support import small_run

LINES = (  # in this order, each at once
    "devices: 1 x cpu",
    "teacher from a random start: ",
    "data: 64 clips of 2 frames, latents 4x4x48; 1 steps of 8 clips",
    "compiling the train step ...",
    "step 1 of 1 is done",
)


@pytest.mark.slow
def test_a_run_says_what_it_does_before_it_compiles(tmp_path, capsys, monkeypatch):
    """The program is that of tests/training/test_interruptions.py."""
    monkeypatch.setattr(loop, "make_mesh", partial(sharding.make_mesh, devices=jax.devices()[:1]))
    config = small_run.get_config()
    config.update(dict(steps=1, sample_every=0, dtype="auto", trainable="conv_out"))
    loop.train(config, tmp_path / "run")
    said = capsys.readouterr().out.splitlines()
    places = [next(n for n, line in enumerate(said) if line.startswith(text)) for text in LINES]
    assert places == sorted(places)
    assert "computing in float32" in said[places[0]] and "temporal convolutions as matrix products" in said[places[0]]
    assert '"dtype": "float32"' in (tmp_path / "run" / "config.json").read_text()


def test_metrics_are_written_without_torch(tmp_path):
    """TensorBoard's writer would load it where it is; it remains to be imported by others."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom sfv_jax.training.metrics import MetricWriter\n"
        "writer = MetricWriter(Path(sys.argv[1]))\nwriter.scalars(1, {'loss': 1.0})\nwriter.close()\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n" and list((tmp_path / "run" / "tensorboard").glob("events*"))
