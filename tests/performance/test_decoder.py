"""Tiny decoders in plans and measurements."""

from types import SimpleNamespace

import jax
import pytest

from sfv_jax import config as configs
from sfv_jax.checkpoints.decoders import LatentSpace, save_tiny
from sfv_jax.config import ConfigError
from sfv_jax.models import tree
from sfv_jax.models.codec import PatchCodec
from sfv_jax.models.tiny_decoder import TinyDecoderConfig, TinyTemporalDecoder
from sfv_jax.performance import job, measurement, programs, targets
from sfv_jax.performance.measurement import NETWORKS
from sfv_jax.runtime.device import count_flops
from sfv_jax.runtime.sharding import make_mesh
from sfv_jax.weights.folders import WeightsError
from tests.test_configs import get_config

OWN = TinyDecoderConfig(4, 3, (8, 8, 8, 4), (1, 1, 1, 1))


def test_what_a_decoder_is_called(tmp_path, monkeypatch):
    """A model's own tiny decoder goes before the public sizes; without a model those are meant."""
    config, sizes = configs.sfv(), NETWORKS["svd"]
    assert programs.tiny_of("full", config, sizes) is None
    assert programs.tiny_of("tiny", config, sizes) == TinyDecoderConfig()
    assert programs.tiny_of("wide", config, sizes) == TinyDecoderConfig.wide()
    params = tree.init(TinyTemporalDecoder, OWN)
    save_tiny(tmp_path / "tiny_decoder", OWN, params, LatentSpace())
    assert programs.tiny_of(str(tmp_path / "tiny_decoder"), config, sizes) == OWN
    config.init = str(tmp_path)
    monkeypatch.setattr(programs, "read_model", lambda path: SimpleNamespace(home=lambda part: path))
    assert programs.tiny_of("tiny", config, sizes) == OWN
    with pytest.raises(WeightsError, match="nowhere does not exist"):
        programs.tiny_of("nowhere", config, sizes)
    patched = programs.sizes_of(configs.tiny(configs.sfv()))
    with pytest.raises(ConfigError, match="'tiny': the patch codec has no decoder network"):
        programs.tiny_of("tiny", config, patched)


def test_the_decoding_program_holds_the_tiny_decoder_alone():
    """Its FLOPs in the plan of SVD's video are those of the network, and the VAE only stays in memory."""
    mesh = make_mesh(devices=jax.devices()[:1])
    options = programs.SampleOptions(tiny=TinyDecoderConfig())
    decode = programs.sample_programs(mesh, NETWORKS["svd"], (576, 1024), 1, options)[-1]
    weights, latents = decode.args
    assert weights.keys() == {"tiny_decoder"} and tree.count(weights) == 1_591_171
    assert decode.resident["other weights"].keys() == {"unet", "vae", "image_encoder"}
    assert latents.shape == (1, 14, 72, 128, 4)
    assert count_flops(decode.plain, *decode.args) == pytest.approx(5.217e12, rel=1e-3)


@pytest.mark.slow
def test_a_plan_and_a_measurement():
    config, target = configs.sfv(), targets.parse("cpu:1")
    config.update(dict(unet=dict(block_out_channels=(16,), num_attention_heads=(2,), norm_groups=4)))
    request = job.Request("sample", (16, 16), decoder="tiny")
    _, made = job.build(config, target, targets.devices(target), request)
    assert made[-1].args[0].keys() == {"tiny_decoder"}
    asked = measurement.Request("tiny", 16, 16, 2, dtype="float32", repeats=1, compare="decoders", decoder="tiny")
    found = measurement.run(asked)
    assert [row["name"] for row in found["rows"]] == ["decode, full", "decode, tiny"]
    assert found["ratio"] > 0


def test_the_distillation_at_full_size():
    """The step has the FLOPs of the teacher's forward pass and of three passes of the student, on the crops."""
    mesh, config = make_mesh(devices=jax.devices()[:1]), configs.decoder()
    config.update(dict(dtype="float32", batch_size=1))
    step = programs.train_program(config, mesh, NETWORKS["svd"], (448, 768))
    state, frozen, batch = step.args
    assert tree.count(state["ema"]) - 1_591_171 == 64 * (512 + 512 + 256) + 512 + 512 + 256  # with its projectors
    assert frozen.keys() == {"teacher"} and batch["latents"].shape == (1, 14, 56, 96, 4) and "frames" not in batch
    share = 16 * 16 / (72 * 128)
    teacher, student = 85e12 * share, 3 * 5.217e12 * share
    assert count_flops(step.plain, *step.args) == pytest.approx(teacher + student, rel=0.1)


def test_distillations_that_are_planned(tmp_path):
    """On the world, from a VAE alone; with generated latents the UNet is there, too."""
    mesh, config = make_mesh(devices=jax.devices()[:1]), get_config("decoder")("world")
    with config.unlocked():
        config.data.world.num_frames = 3
    sizes = programs.sizes_of(config)
    step = programs.train_program(config, mesh, sizes, (32, 32))
    batch = step.args[2]
    assert batch["latents"].shape == (config.batch_size, 3, 8, 8, 4)
    assert batch["frames"].shape == (config.batch_size, 3, 32, 32, 3)
    config.update(dict(init="world-teacher"))
    config.decoder.generated_share = 0.5
    step = programs.train_program(config, mesh, programs.sizes_of(config), (32, 32))
    assert step.args[1].keys() == {"teacher", "unet"}
    with pytest.raises(ConfigError, match="config.method='vae': only trainings of UNets and tiny decoders are planned"):
        programs.train_program(get_config("vae")(), mesh, sizes, (32, 32))
    patched = programs.Sizes(sizes.unet, None, None, PatchCodec())
    with pytest.raises(ConfigError, match="has the patch codec: there is no VAE to distill"):
        programs.train_program(config, mesh, patched, (32, 32))
    config = configs.sfv()
    config.init = "world-encoders"
    with pytest.raises(WeightsError, match="world-encoders has no unet, only"):
        programs.sizes_of(config)
