"""Plans: memory compared with XLA's and with arrays on devices, the search for settings that fit, errors.

Compilation for TPUs and GPUs is tested if libtpu and JAX's CUDA plugin are installed.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sfv_jax import config as configs
from sfv_jax.performance import cost, plan_report, programs, targets
from sfv_jax.performance import job as planning
from sfv_jax.runtime import sharding
from sfv_jax.runtime.device import count_flops

ROOT = Path(__file__).parents[2]
SIZE = (8, 8)


def asked(what: str, **changes) -> planning.Request:
    """Returns a request for small videos in fp32; `changes` are fields of the request or of its sampling options."""
    sampling = {"dtype": "float32", "vae_dtype": "float32"}
    names = {field.name for field in dataclasses.fields(programs.SampleOptions)}
    sampling |= {name: changes.pop(name) for name in [*changes] if name in names}
    changes = {"efficiency": 0.5} | changes
    return planning.Request(what, SIZE, sampling=programs.SampleOptions(**sampling), **changes)


pytestmark = pytest.mark.usefixtures("small_things_in_parts")


def tiny(method_: str, **changes):
    """Returns a config of one-level networks on the procedural world, batch 4."""
    config = configs.tiny(getattr(configs, method_)())
    codec = dict(patch=1, embed_cell=4)
    unet = dict(configs.tiny_unet(codec, 8), block_out_channels=(16,), num_attention_heads=(2,), norm_groups=4)
    config.update(dict(batch_size=4, patch_codec=codec, unet=unet | dict(num_frames=2)))
    if method_ == "sfv":
        config.discriminator.update(temporal_kernel=3, projection_dim=8, sinusoid_dim=8)
    config.update_from_flattened_dict(changes)
    return config


CASES = [
    pytest.param(
        "train", "cpu:2", tiny("sfv", trainable="conv_out", **{"mesh.fsdp": 2}), id="sfv fsdp", marks=pytest.mark.slow
    ),
    pytest.param(
        "train",
        "cpu:1",
        tiny("teacher", accumulation_steps=2, trainable="conv_out"),
        id="teacher",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "sample", "cpu:4", tiny("teacher", **{"mesh.fsdp": 2, "mesh.data": 1, "mesh.spatial": 2}), id="sample"
    ),
]


@pytest.mark.parametrize(("what", "name", "config"), CASES)
def test_memory_is_what_xla_allocates_and_the_verdict_follows_it(what, name, config):
    target = targets.parse(name)
    mesh, jobs = planning.build(config, target, targets.devices(target), asked(what))
    job = next(job for job in jobs if job.name in ("train step", "denoise"))
    compiled = sharding.on_mesh(mesh, lambda: job.function.lower(*job.args).compile())()
    stats = compiled.memory_analysis()
    found = cost.read(job, compiled, target, mesh.size, limit=1e9)
    unused = on_device(job.args) - stats.argument_size_in_bytes  # dropped by the compiler, still in memory during a run
    assert unused >= 0 and (what == "sample" or unused == 0)
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes + outputs + stats.generated_code_size_in_bytes
    assert found.needed == total + unused
    assert cost.read(job, compiled, target, mesh.size, limit=found.needed).fits
    assert not cost.read(job, compiled, target, mesh.size, limit=found.needed - 1).fits

    # On a device during a run: the arguments, then the new state in place of the old one.
    args = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), job.args)
    assert sum(found.memory.get(part, 0) for part in job.parts) == on_device(args)
    result = compiled(*args)
    pointers = stats.output_size_in_bytes - on_device(result)
    assert 0 <= pointers <= 16 + 8 * len(jax.tree.leaves(result))
    if what == "train":
        assert found.alias == on_device(result[0]) == on_device(job.args[0])
        assert found.memory["EMA"] == on_device(result[0]["ema"])
    assert bool(found.collectives) == (mesh.size > 1)
    assert found.flops == pytest.approx(count_flops(job.plain, *job.args) / mesh.size, rel=0.2)


def on_device(tree) -> float:
    """Returns the bytes of sharded arrays or shapes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_a_plan_in_words_as_json_and_as_a_picture(tmp_path, monkeypatch):
    memory = {"parameters": 2.0 * 2**30, "temporaries": 1.0 * 2**30}
    collectives = {"all-gather": {"count": 3, "bytes": 2e9}}
    known = dict(alias=2.0**30, flops=4e12, model_flops=3e12, bytes=1e9, collectives=collectives)
    known |= dict(roofline=0.25, exchange=0.25, kernels={"__cudnn$fmhaSoftmax": 16}, flash=16)
    monkeypatch.setattr(
        planning,
        "measure",
        lambda job, target, mesh, limit, keep: cost.Cost(job.name, True, 3.0 * 2**30, limit, memory, **known),
    )
    target = targets.parse("cpu:1")
    found = planning.plan(tiny("teacher", steps=86400), target, asked("train", memory_gib=4), say=lambda _: None)
    assert (found["days"], found["chip_hours"], found["per_hour"]) == (1.0, 24.0, 3600)  # 0.5 s at half speed
    words = plan_report.text(found)
    assert "train step: fits: 3.00 of 4.00 GiB" in words and "all-gather 3 (2.000 GB)" in words
    assert json.loads(json.dumps(found)) == found
    found["planner"]["effort"] = planning.QUICK
    assert "compile effort -1" in plan_report.text(found) and "--compile_effort=0" in plan_report.text(found)
    plan_report.picture(found, tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as image:
        counts = {color: count for count, color in image.convert("RGB").getcolors(10_000)}
    parameters, temporaries = (tuple(bytes.fromhex(plan_report.COLORS[name][1:])) for name in memory)
    legend = 15 * 15
    assert (counts[parameters] - legend) / (counts[temporaries] - legend) == pytest.approx(2, rel=0.05)


def test_arguments_that_do_not_fit_are_not_compiled(monkeypatch):
    config = tiny("teacher")
    target = targets.parse("cpu:1")
    monkeypatch.setattr(cost, "on_mesh", None)
    found = planning.plan(config, target, asked("train", memory_gib=1e-5), say=lambda _: None)
    assert not found["fits"] and "the arguments alone do not fit" in plan_report.text(found)


def test_what_the_compiler_needs_is_read_from_its_refusal():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.58G of 15.75G hbm."
    assert cost._needed(message) == 22.58 * 2**30
    other = "RESOURCE_EXHAUSTED: HLO temporaries (320.00G) exceeds available HBM (15.25G)."
    assert cost._needed(other) == 320 * 2**30
    assert cost._needed("INTERNAL: something else") is None


def test_settings_are_tried_in_their_order_until_one_fits(monkeypatch):
    config, target = tiny("sfv", batch_size=8, accumulation_steps=1), targets.parse("cpu:4")

    def planned(config, *args, **kw):
        fits = config.unet.remat and config.accumulation_steps == 2 and config.mesh.fsdp == 4
        return {"fits": fits, "programs": [{"name": "train step", "needed": 2.0**30, "limit": 2.0**31}]}

    monkeypatch.setattr(planning, "plan", planned)
    said = []
    found = planning.fit(config, target, asked("train"), say=said.append)
    final = [
        "--config.unet.remat=True",
        "--config.accumulation_steps=2",
        "--config.mesh.data=-1",
        "--config.mesh.fsdp=4",
    ]
    assert found["flags"] == final
    assert [line.count("--config") for line in said] == [1, 2, 4, 4]
    assert "does not fit, train step needs 1.0 of 2.0 GiB" in said[2]
    assert not config.unet.remat  # the caller's config is unchanged


def test_settings_tried_for_sampling():
    request = asked("sample", decode_pixels=0, batch_size=8)
    tried = [given for given, *_ in planning.attempts(tiny("teacher"), targets.parse("cpu:4"), request)]
    options = ["--dtype=bfloat16", "--vae_dtype=bfloat16", "--decode_pixels=262144", "--batch_size=4"]
    assert tried[:4] == [options[: n + 1] for n in range(4)]
    meshes = [[flag.rpartition(".")[2] for flag in given[4:]] for given in tried[4:]]
    shares = [["data=-1", "fsdp=2"], ["data=-1", "fsdp=4"], ["data=1", "fsdp=2", "spatial=2"]]
    assert meshes == [*shares, ["data=1", "fsdp=1", "spatial=4"]]


def test_fewer_and_fewer_clips_are_tried_for_preparing():
    request = asked("prepare", batch_size=10)
    tried = [given for given, *_ in planning.attempts(tiny("teacher"), targets.parse("cpu:1"), request)]
    assert tried == [["--batch_size=5"], ["--batch_size=2"], ["--batch_size=1"]]


def test_a_trial_ends_with_what_does_not_fit(monkeypatch):
    said = []
    monkeypatch.setattr(planning, "measure", lambda job, *_: cost.Cost(job.name, job.name == "clip", 2.0, 1.0, {}))
    given = tiny("teacher"), targets.parse("cpu:1"), asked("sample")
    found = planning.plan(*given, say=said.append, trial=True)
    assert [program["name"] for program in found["programs"]] == ["clip", "encode"] and not found["fits"]
    assert len(planning.plan(*given, say=said.append)["programs"]) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v7:4x4", "unknown: choose TPU slices v4, v5e"),
        ("v5e:4x4x4", "a v5e slice has a shape of 2 numbers"),
        ("v5p:16x16x16", "at most 256 chips"),
        ("h100:0", "write h100:N with N from 1 to 64"),
        ("h200:12", "hosts of 8"),
        ("a100", "unknown"),
    ],
)
def test_targets_that_do_not_exist(name, message):
    with pytest.raises(targets.TargetError, match=message) as error:
        targets.parse(name)
    assert "\n" not in str(error.value)


def test_target_names():
    assert targets.parse("v5e:4x8*2").count == 64 and targets.parse("v5e:4x8*2").slices == 2
    assert targets.parse("v5e:4x8").link > targets.parse("v5e:4x8*2").link
    assert targets.parse("h200").count == 1 and targets.parse("h200:16").link == 50e9


@pytest.mark.parametrize("name", ["v5e:2x2", "h100:1"])
def test_a_missing_plugin_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setattr(targets, "_installed", lambda module: False)
    extra = {"v5e:2x2": "plan-tpu", "h100:1": "plan-gpu"}[name]
    with pytest.raises(targets.TargetError, match=rf"pip install -e '.\[{extra}\]'"):
        targets.prepare(targets.parse(name))


@pytest.mark.parametrize(
    ("what", "changes", "options", "message"),
    [
        ("train", {"mesh.fsdp": 3}, {}, "on cpu:4, mesh .* fsdp=3 spatial=1 does not cover 4 devices"),
        ("train", {"batch_size": 6}, {}, "batch_size=6 is no multiple"),
        ("sample", {}, {"batch_size": 3}, "batch_size 3 does not divide over data x fsdp = 4"),
        ("prepare", {}, {}, "needs no preparation"),
        ("train", {"method": "gan"}, {}, "choose one of sfv, teacher"),
    ],
)
def test_jobs_that_cannot_be(what, changes, options, message):
    target = targets.parse("cpu:4")
    with pytest.raises(ValueError, match=message):
        planning.build(tiny("sfv", **changes), target, targets.devices(target), asked(what, **options))


def test_sizes_come_from_the_world_and_the_cache(tmp_path):
    assert planning.size_of(tiny("sfv"), "train") == (16, 16) == planning.size_of(tiny("teacher"), "sample")
    config = configs.sfv()
    assert planning.size_of(config, "train") == (448, 768) and planning.size_of(config, "sample") == (576, 1024)
    config.data.path = str(tmp_path)
    assert planning.size_of(config, "train") == (448, 768)  # a cache that is not there yet
    (tmp_path / "manifest.json").write_text(json.dumps({"settings": {"height": 128, "width": 192}}))
    assert planning.size_of(config, "train") == (128, 192)


def test_the_command_says_in_one_line_what_is_wrong():
    command = [sys.executable, "-m", "sfv_jax.plan", "--config", "configs/sfv.py", "--target", "v5e:4x4", "--what=fly"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    message = "plan: flag --what=fly: value should be one of <train|sample|prepare>; see --help"
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == message


@pytest.mark.slow
def test_planning_prepares_the_full_size_networks_of_a_config_without_a_model():
    config = configs.sfv()
    sizes = programs.sizes_of(config)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    job = programs.prepare_programs(mesh, sizes, (448, 768), 1)[1]
    assert cost.shard_bytes(job.parts["parameters"]) == 4 * 97_742_847
    assert sizes.unet.block_out_channels == (320, 640, 1280, 1280)


def needs(platform: str) -> None:
    """Skips a test if the compiler of `platform` is not installed."""
    modules, extra = targets.PLUGINS[platform]
    if not all(map(targets._installed, modules)):
        pytest.skip(f"needs pip install -e '.[{extra}]'")


FEED_FORWARD = """
import sys, jax, jax.numpy as jnp
from sfv_jax.models import tree
from sfv_jax.models.attention import FeedForward
from sfv_jax.performance import hlo, targets
from sfv_jax.runtime import sharding

target = targets.parse(sys.argv[1])
targets.prepare(target)
mesh = sharding.make_mesh(devices=targets.devices(target)[:1])
graph, params = tree.abstract(FeedForward, 320, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
params, x = sharding.with_shardings(
    given := (params, jax.ShapeDtypeStruct((1, 14, 2304, 320), jnp.bfloat16)),
    jax.tree.map(lambda _: sharding.replicated_sharding(mesh), given),
)
call = jax.jit(lambda params, x: tree.build(graph, params)(x))
program = hlo.parse(sharding.on_mesh(mesh, call.lower)(params, x).compile().as_text())
large = [k.op.opcode for k in hlo.kernels(program) if k.bytes > x.size]
print(*[opcode for opcode in large if opcode != "copy-start"])  # moves arguments closer to a TPU's core
"""


@pytest.mark.parametrize(
    ("name", "wanted", "kernels"),
    [
        ("v5e:2x2", "tpu", ["fusion"] * 2),  # gate and gelu are fused with the second product
        ("h100:1", "gpu", ["custom-call", "fusion", "custom-call"]),  # here they are a kernel of their own
    ],
)
def test_a_feed_forward_layer_has_no_kernels_to_spare(name, wanted, kernels):
    needs(wanted)
    command = [sys.executable, "-c", FEED_FORWARD, name]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == kernels


GATHER = """
import re, sys, jax, jax.numpy as jnp
from sfv_jax.models import tree
from sfv_jax.models.attention import FeedForward
from sfv_jax.performance import job, targets
from sfv_jax.runtime import compilation, sharding

target = targets.parse(sys.argv[1])
targets.prepare(target)
compilation.set_up(job.QUICK, runs=False)
mesh = sharding.make_mesh(1, 4, 1, devices=targets.devices(target))
graph, params = tree.abstract(FeedForward, 512, dtype=jnp.bfloat16)
params = sharding.with_shardings(params, sharding.param_shardings(mesh, params))
x = jax.ShapeDtypeStruct((8, 64, 512), jnp.bfloat16, sharding=sharding.batch_sharding(mesh))
call = jax.jit(jax.grad(lambda params, x: jnp.sum(tree.build(graph, params)(x).astype(jnp.float32) ** 2)))
text = sharding.on_mesh(mesh, call.lower)(params, x).compile().as_text()
print(*re.findall(r"= \\(?(.*) all-gather(?:-start)?\\(", text))
"""


@pytest.mark.parametrize(("name", "wanted"), [("v5e:2x2", "tpu"), ("h100:4", "gpu")])
def test_weights_are_gathered_in_the_dtype_of_their_use(name, wanted):
    """They are stored in fp32, and at the effort of plans libtpu once gathered fp32 and converted afterwards."""
    needs(wanted)
    command = [sys.executable, "-c", GATHER, name]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "bf16[" in done.stdout and "f32[" not in done.stdout


@pytest.mark.parametrize(("name", "wanted"), [("v5e:2x2", "tpu"), ("h100:2", "gpu")])
def test_real_compilers_plan_a_small_network(name, wanted, tmp_path):
    needs(wanted)
    command = [sys.executable, "-m", "sfv_jax.plan", "--config", "configs/teacher.py:tiny", "--target", name]
    command += ["--what=sample", "--height=16", "--width=16", "--json", tmp_path / "plan.json", "--config.mesh.fsdp=2"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    found = json.loads((tmp_path / "plan.json").read_text())["programs"]
    denoise = next(cost for cost in found if cost["name"] == "denoise")
    assert denoise["fits"] and denoise["flops"] > 0.5 * denoise["model_flops"]
