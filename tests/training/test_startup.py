"""What a run says before its first step."""

import pytest

from sfv_jax.training.loop import train
from tests.support import small_run

LINES = (  # in this order, each at once
    "devices: 8 x cpu",
    "teacher from a random start: ",
    "data: 64 clips of 2 frames, latents 4x4x48; 1 steps of 8 clips",
    "compiling the train step ...",
    "step 1 of 1 is done",
)


@pytest.mark.slow
def test_a_run_says_what_it_does_before_it_compiles(tmp_path, capsys):
    config = small_run.get_config()
    config.update(dict(steps=1, sample_every=0, dtype="auto"))
    train(config, tmp_path / "run")
    said = capsys.readouterr().out.splitlines()
    places = [next(n for n, line in enumerate(said) if line.startswith(text)) for text in LINES]
    assert places == sorted(places)
    assert "computing in float32" in said[places[0]] and "sums of products along time" in said[places[0]]
    assert '"dtype": "float32"' in (tmp_path / "run" / "config.json").read_text()
