"""The accelerator check: each stage's end and figures, whatever happens to the other stages. Figures are not tested."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from sfv_jax.performance import accelerator_check

ROOT = Path(__file__).parents[2]
STAGES = list(accelerator_check.LIMITS)
# Runs before a stage's own code: breaks the stages that the variable BREAK names, each in its way.
BREAKING = """
import importlib.abc, os, resource, sys, time

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "flax":
            raise ModuleNotFoundError("No module named 'flax'")

ways = dict(pair.split("=") for pair in os.environ["BREAK"].split(","))
for stage, way in ways.items():
    if f"--stage={stage}" in sys.orig_argv:
        if way == "missing":
            sys.meta_path.insert(0, Missing())
        elif way == "memory":
            resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
        else:
            time.sleep(1000)
"""
# Stands for the stages: each writes a figure, then ends in another way.
STAND_IN = """
import json, os, signal, sys, time
stage, out = sys.argv[1:]
if stage == "parity":
    import a_package_that_is_missing
open(f"{out}/{stage}.json", "w").write(json.dumps({"figure of " + stage: {"sfv_jax": [1.0]}}))
if stage == "sampling":
    time.sleep(1000)
if stage == "diffusers":
    os.kill(os.getpid(), signal.SIGKILL)
if stage == "train":
    raise MemoryError("RESOURCE_EXHAUSTED: out of memory allocating 81 GB")
"""


def test_a_broken_stage_leaves_the_figures_of_the_others(tmp_path, monkeypatch):
    script, out = tmp_path / "stand_in.py", tmp_path / "out"
    script.write_text(STAND_IN)
    monkeypatch.setattr(
        accelerator_check, "stage_command", lambda out, stage, *_: [sys.executable, str(script), stage, str(out)]
    )
    monkeypatch.setitem(accelerator_check.LIMITS, "sampling", 1.0)
    monkeypatch.setattr(accelerator_check, "LEAST", 0.1)
    ended = accelerator_check.run(out, 0.2, tiny=True)
    assert {stage: outcome.status for stage, outcome in ended.items()} == {
        "device": "done",
        "parity": "failed",
        "sampling": "cut",
        "diffusers": "failed",
        "train": "failed",
        "extras": "done",
    }
    assert "a_package_that_is_missing" in ended["parity"].reason
    assert ended["sampling"].reason == "after 2 s"
    assert "exit code -9" in ended["diffusers"].reason
    assert "RESOURCE_EXHAUSTED" in ended["train"].reason
    found = json.loads((out / "results.json").read_text())["figures"]
    for stage in STAGES:
        assert found[stage] == ({} if stage == "parity" else {f"figure of {stage}": {"sfv_jax": [1.0]}})
    assert "| sampling | cut | 2 | after 2 s |" in (out / "results.md").read_text()


def test_stages_without_time_are_skipped_and_old_figures_are_not_theirs(tmp_path, monkeypatch):
    (tmp_path / "device.json").write_text('{"of an earlier run": 1}')
    monkeypatch.setattr(accelerator_check, "LEAST", 1e9)
    ended = accelerator_check.run(tmp_path, 1.0, tiny=True)
    assert {outcome.status for outcome in ended.values()} == {"skipped"}
    assert json.loads((tmp_path / "results.json").read_text())["figures"] == {stage: {} for stage in STAGES}


def test_the_table_has_a_dash_for_each_missing_figure():
    text = accelerator_check.markdown({}, {"sampling": {"denoise": {"seconds": [0.1, 0.2, 0.4], "tflops": 224.0}}})
    assert "| UNet, one call, 14 x 576 x 1024, bf16 | 200.0 (100.0 to 400.0) | 224 | - | - | goal: at most 95" in text
    assert "| VAE decoder, 14 frames | - | - | - | - |  |" in text


def check(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `launch/accelerator_check.sh --tiny` in this Python."""
    return subprocess.run(
        [str(ROOT / "launch" / "accelerator_check.sh"), "--tiny", "--minutes=8", f"--out={out}", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable, "JAX_NUM_CPU_DEVICES": "1"} | environment,
    )


@pytest.mark.slow
def test_a_rehearsal_fills_every_row(tmp_path):
    done = check(tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    peers = find_spec("torch") is not None
    for stage, outcome in found["stages"].items():
        expected = "done" if peers or stage != "diffusers" else "failed"
        assert outcome["status"] == expected, (stage, outcome, done.stdout, done.stderr)
    assert done.returncode == (0 if peers else 1)
    for label, (stage, name), _ in accelerator_check.ROWS:
        assert min(found["figures"][stage][name]["seconds"]) > 0, label
    assert all(figures["sound"] for figures in found["figures"]["parity"].values())
    for stage, times in found["figures"]["diffusers"].items():  # half a gray level is 1 % of a picture's deviation
        assert times["difference"] < (0.02 if stage == "image to frames" else 1e-4), stage
    assert found["figures"]["train"]["train step"]["plan"]["needed_bytes"] > 0
    assert (tmp_path / "results.md").read_text() in done.stdout


@pytest.mark.slow
def test_real_stages_broken_on_purpose(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BREAKING)

    def broken(ways: str, *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
        out = tmp_path / ways.partition("=")[0]
        done = check(out, *arguments, BREAK=ways, PYTHONPATH=str(tmp_path))
        return done, json.loads((out / "results.json").read_text())

    with ThreadPoolExecutor() as beside:  # the second only waits
        hanging = beside.submit(broken, "diffusers=hang", "--only=diffusers", "--minutes=0.2")
        done, found = broken("parity=missing,sampling=memory", "--only=device,parity,sampling")
    ended = {stage: outcome["status"] for stage, outcome in found["stages"].items()}
    assert ended == {"device": "done", "parity": "failed", "sampling": "failed"}, done.stdout
    assert "No module named 'flax'" in found["stages"]["parity"]["reason"]
    assert done.returncode == 1 and found["figures"]["device"]["matmul_flops_float32"] > 0
    done, found = hanging.result()
    assert done.returncode == 1 and found["stages"]["diffusers"]["status"] == "cut", done.stdout
