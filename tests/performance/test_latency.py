"""Latencies of the stages of sampling."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from sfv_jax.config import patch_codec_of, unet_of
from sfv_jax.evaluation import request
from sfv_jax.evaluation.generation import Options
from sfv_jax.evaluation.protocol import Protocol
from sfv_jax.evaluation.report import Report
from sfv_jax.models import tree
from sfv_jax.models.unet import UNet
from sfv_jax.performance import latency
from sfv_jax.performance.timing import Timing
from sfv_jax.sampling.sampler import Sampler
from tests.support.small_run import get_config


@pytest.fixture(scope="module")
def small_sampler() -> Sampler:
    """A network of one level on patches of 4 pixels, all weights zero."""
    unet, codec = unet_of(get_config()), patch_codec_of(get_config())
    _, shapes = tree.abstract(UNet, unet)
    return Sampler(unet, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), codec)


@pytest.mark.slow
def test_latency_by_stage(small_sampler):
    image, report = np.zeros((16, 16, 3), np.uint8), Report("latency")
    request.add_latency(report, small_sampler, Options(steps=2), Protocol(height=16, width=16, num_frames=2))
    timed = report.record["latency"]
    assert set(timed) >= set(latency.STAGES) and all(timed[name]["seconds"] > 0 for name in latency.STAGES)
    parts = [timed[name]["flops"] for name in latency.STAGES if name != "end to end"]
    assert timed["end to end"]["flops"] == sum(parts)
    assert "<td>unet</td>" in report.page() and "multiply-add as two" in report.page()

    size = (16, 16)
    keys = jax.random.split(jax.random.key(0), 1)
    condition = small_sampler.condition([image], size, keys, (6, 127, 0))
    noise = np.zeros((1, *small_sampler.latent_shape(size)), np.float32)

    def counted(**changes) -> float:
        return latency.count_denoising(
            small_sampler, condition, noise, keys, {"steps": 1, "sampler": "euler"} | changes
        )

    assert timed["unet"]["flops"] == 2 * counted() and counted(steps=3, sampler="sfv") == 3 * counted()
    assert counted(guidance=(1.0, 3.0)) == pytest.approx(2 * counted(), rel=0.01)  # the frame embedding is shared


def test_timings_are_what_they_say():
    stage = latency.Stage("x", Timing((1.0, 2.0, 1.5), 3.0), flops=3e12, peak=4e12)
    assert (stage.timing.median, stage.timing.compilation, stage.tflops, stage.mfu) == (1.5, 1.5, 2.0, 0.5)
    columns, rows, _ = latency.table([stage])
    assert rows == [["x", 1500.0, 1000.0, 1.5, 3.0, 2.0, 0.5]] and len(columns) == 7


def test_latency_needs_the_array_libraries_only():
    code = "import sys, sfv_jax.performance.latency; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    others = ("PIL", "av", "orbax", "optax", "grain", "ml_collections", "tensorflow_datasets", "absl", "torch")
    assert not {name for name in others if f"'{name}'" in loaded}
