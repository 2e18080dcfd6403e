"""The notebook of the docs: its form, and all its cells with a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sfv_jax.reproduction.experiments import SCENES
from tests.support.notebook import code_cells, run, run_cell, source_of
from tests.support.small_model import save_world_model

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs/quickstart.ipynb"
MOST_BYTES = 300_000


def test_form():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5) and NOTEBOOK.stat().st_size < MOST_BYTES
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len({*ids})
    for cell in code_cells(notebook):
        compile(source_of(cell), "<cell>", "exec")
        assert all(output["output_type"] != "error" for output in cell["outputs"])
    assert str(Path.home()) not in NOTEBOOK.read_text(encoding="utf-8")


def test_cells_run_as_in_jupyter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [
        "WORD, NUMBER = 'a', 1",
        "if NUMBER == 2:\n    !echo {WORD} > {WORD}.txt\nprint(WORD)\nNUMBER + 1",
        "x = 3",
    ]
    notebook = {"cells": [{"cell_type": "code", "source": [text]} for text in cells]}
    run(notebook, {"WORD": "b", "NUMBER": "2"})
    first, second, third = notebook["cells"]
    assert (tmp_path / "b.txt").read_text() == "b\n"
    assert [output.get("text", output.get("data")) for output in second["outputs"]] == [["b\n"], {"text/plain": ["3"]}]
    assert first["outputs"] == third["outputs"] == [] and third["execution_count"] == 3
    with pytest.raises(ValueError, match="the first cell does not set WORLD"):
        run(notebook, {"WORLD": "b"})
    with pytest.raises(ZeroDivisionError):
        run_cell("1 / 0", {})
    assert source_of({"source": ["%pip install x"]}) == "_shell(f'{sys.executable} -m pip install x')"


@pytest.mark.slow
def test_all_cells(smallest_pipeline_folder, tmp_path):
    """With a tiny model of random weights in place of those of the package, and another in place of SVD."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    trained = {"method": "sfv", "data": {"source": "world", "world": SCENES | {"num_frames": 3}}}
    model = save_world_model(tmp_path / "model", config=trained, size=SCENES["size"])
    settings = dict(MODEL=model, TEACHER=model, SVD=smallest_pipeline_folder, SVD_STEPS=2, SVD_SIZE=(64, 64))
    settings |= dict(STEPS=1, BATCH=1, TRAINABLE="conv_out", INSTALL=False)
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    program = [sys.executable, "-m", "tests.support.notebook", NOTEBOOK, *words, "--out", tmp_path / "made.ipynb"]
    quick = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, cwd=tmp_path, env=quick, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads((tmp_path / "made.ipynb").read_text(encoding="utf-8"))
    shown = [output["data"] for cell in code_cells(made) for output in cell["outputs"] if "data" in output]
    assert ["image/png" in data for data in shown] == [True] * 4  # first, longer, SVD's, and the comparison
    assert (tmp_path / "made.ipynb").stat().st_size < MOST_BYTES
    for name in ("first.mp4", "longer.mp4", "svd.mp4", "svd/model.json", "sfv/config.json"):
        assert (tmp_path / "runs/notebook" / name).is_file(), name
