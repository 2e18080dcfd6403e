"""The benchmark: its imports, its random arrays, its timed programs. Figures are not tested."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfv_jax import config
from sfv_jax.models.clip import CLIPConfig
from sfv_jax.models.unet import UNetConfig
from sfv_jax.models.vae import VAEConfig
from sfv_jax.performance import measurement, random_arrays, timing
from sfv_jax.performance.programs import Program, SampleOptions, Sizes
from sfv_jax.runtime import plain_config, sharding

ROOT = Path(__file__).parents[2]
BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in %r:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
"""
ABSENT = {"ml_collections", "PIL", "av", "grain", "array_record", "tensorflow_datasets", "tensorboardX", "safetensors"}
ABSENT |= {"diffusers", "transformers", "torch", "huggingface_hub", "cv2"}
SIZES = Sizes(
    UNetConfig.tiny(block_out_channels=(32,), num_attention_heads=(2,), layers_per_block=1, num_frames=2),
    VAEConfig.tiny(block_out_channels=(32, 32), layers_per_block=1),
    CLIPConfig.tiny(projection_dim=32),
)


def test_it_starts_where_only_jax_and_its_kin_are():
    code = BLOCK % ABSENT + (
        "import sfv_jax.benchmark, sfv_jax.performance.measurement as b\n"
        "c = b.configs.sfv(); print(c.sfv.p_mean, type(c).__module__)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["-1.0", "sfv_jax.runtime.plain_config"], done.stderr[-2000:]


def test_the_stand_in_for_config_dicts_holds_the_same_fields(monkeypatch):
    expected = {name: getattr(config, name)().to_dict() for name in ("sfv", "teacher", "ladd", "ufogen", "animatelcm")}
    monkeypatch.setattr(config, "ConfigDict", plain_config.ConfigDict)
    for name, fields in expected.items():
        assert getattr(config, name)().to_dict() == fields
    changed = config.sfv()
    changed.sfv.r1_weight = 0.5
    changed.update({"unet": {"remat": True}})
    copy = changed.copy_and_resolve_references()
    copy.unet.remat = False
    assert changed.unet.remat and changed.sfv.r1_weight == copy.sfv["r1_weight"] == 0.5
    with pytest.raises(AttributeError, match="no such config field: stepps"):
        changed.stepps  # noqa: B018


def test_random_weights_are_those_of_a_fresh_network():
    shapes = {"kernel": (3, 3, 8, 4096), "bias": (8,), "scale": (8,), "mix_factor": (1,)}
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    mesh = sharding.make_mesh(1, 8, 1)
    state = {"unet": {"conv_in": shapes}, "opt_g": {"conv_in": shapes}}
    place = sharding.param_shardings(mesh, state)
    made = random_arrays.random_arrays(sharding.with_shardings(state, place))
    jax.tree.map(lambda x, s, like: (x.sharding, x.dtype) == (s, like.dtype) or pytest.fail(str(x)), made, place, state)
    assert "fsdp" in made["unet"]["conv_in"]["kernel"].sharding.spec
    assert not any(np.any(x) for x in jax.tree.leaves(made["opt_g"]))
    found = jax.tree.map(lambda x: np.asarray(x, np.float32), made["unet"]["conv_in"])
    np.testing.assert_allclose(np.std(found["kernel"]), 72**-0.5, rtol=0.05)
    assert np.all(found["scale"] == 1) and not np.any(found["bias"]) and np.any(found["mix_factor"])
    pixels = jax.ShapeDtypeStruct((9, 9), jnp.uint8, sharding=place["unet"]["conv_in"]["bias"])
    images = random_arrays.random_arrays(pixels)
    assert images.dtype == np.uint8 and len(np.unique(images)) > 40


def test_a_program_is_compiled_once_timed_and_counted(monkeypatch):
    mesh, size, traced = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]), 64, []

    def step(state, x):
        traced.append(None)
        return state + 1, x @ x

    x = jnp.ones((size, size))
    program = Program(
        "train step", jax.jit(step, donate_argnums=0), (jnp.zeros(()), x), {}, lambda state, x: x @ x, donates=True
    )
    built = measurement.build(program, mesh)
    row, compiled = measurement.measure(program, (jnp.zeros(()), x), built, 3), built.compiled
    assert len(traced) == 1 and len(row.timing.seconds) == 3 and row.flops == 2 * size**3
    assert float(compiled(jnp.zeros(()), x)[0]) == 1
    ticks = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
    assert timing.warm(lambda: None, 3).seconds == (1.0, 1.0, 1.0)
    order = []
    times = timing.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] + ["a", "a", "b", "b"] * 2 and times["b"].median == 1.0
    assert timing.matmul_limit("float32", 16) == 2 * 16**3 * 8


def test_a_measurement_says_how_it_was_made(monkeypatch):
    """The command line is recorded without folders of the machine."""
    monkeypatch.setattr(sys, "argv", ["/home/me/sfv_jax/benchmark.py", "--train", "--repeats=3"])
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert (
        measurement.command_line()
        == "GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m sfv_jax.benchmark --train --repeats=3"
    )
    about = measurement.surroundings()
    assert about["cores"] == os.cpu_count() and about["device"] == "cpu" and len(about["date"]) == 10


def test_parts_of_a_step_are_differences():
    names = ["G forward", "G forward and backward", "gradients without R1", "gradients", "train step"]
    rows = [
        measurement.Row(name, timing.Timing((seconds, seconds / 2, 2 * seconds)), 1e12, 1.0, 2**30)
        for name, seconds in zip(names, (1.0, 3.0, 4.5, 5.0, 6.0), strict=True)
    ]
    assert list(measurement.split(rows).values()) == [1.0, 2.0, 1.5, 0.5, 1.0]
    assert "| G forward | 1000.0 (500.0 to 2000.0) | 1 | 1 | 50% | 1.00 | 1.0 |" in measurement.table(rows, 2e12)
    assert measurement.BUSY not in measurement.table(rows, max(row.flops / row.timing.median for row in rows))
    assert measurement.BUSY in measurement.table(rows, 0.9e12)


def test_sizes_that_cannot_be(tmp_path):
    command = [sys.executable, "-m", "sfv_jax.benchmark", "--networks=tiny", "--height=60", f"--json={tmp_path / 'x'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and not (tmp_path / "x").exists()
    assert "benchmark: --height 60 --width 1024: both must be multiples of 8" in done.stderr


@pytest.mark.slow
def test_diffusers_computes_the_same_gradient(reference, capsys):
    """The calls timed in turns return equal results; those of sampling are in the test of the accelerator check."""
    from sfv_jax.performance import against_diffusers

    found = against_diffusers.against_diffusers(SIZES, (16, 24), 2, "float32", 1, True)
    assert list(found) == ["UNet", "UNet, forward and backward"]
    for name, times in found.items():
        assert list(times) == ["sfv_jax", "diffusers", "difference"]
        assert times["difference"] < 1e-4, name
    assert capsys.readouterr().out.count("times ours") == 2


@pytest.mark.slow
def test_sampling_from_end_to_end():
    """The stages are those of the sampler, and the whole passes the result of each stage on to the next."""
    sizes = dataclasses.replace(SIZES, unet=dataclasses.replace(SIZES.unet, temporal_conv="matmul"))
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    options = SampleOptions(dtype="float32", vae_dtype="float32")
    rows = [row for row, *_ in measurement.sampling(mesh, sizes, (64, 64), 1, options, 1)]
    assert [row.name for row in rows] == ["clip", "encode", "denoise", "decode", "image to frames"]
    assert rows[-1].flops == sum(row.flops for row in rows[:-1]) > 0
    assert all(row.compile_seconds > 0 and row.temporary_bytes > 0 for row in rows[:-1])
    json.dumps([measurement.record(row) for row in rows])
