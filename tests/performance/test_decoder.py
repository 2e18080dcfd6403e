"""Tiny decoders in plans and measurements."""

import jax
import pytest

from sfv_jax import config as configs
from sfv_jax.checkpoints.decoders import LatentSpace, save_tiny
from sfv_jax.config import ConfigError
from sfv_jax.models import tree
from sfv_jax.models.tiny_decoder import TinyDecoderConfig, TinyTemporalDecoder
from sfv_jax.performance import job, measurement, programs, targets
from sfv_jax.performance.measurement import NETWORKS
from sfv_jax.runtime.device import count_flops
from sfv_jax.runtime.sharding import make_mesh
from sfv_jax.weights.folders import WeightsError

OWN = TinyDecoderConfig(4, 3, (8, 8, 8, 4), (1, 1, 1, 1))


def test_what_a_decoder_is_called(tmp_path):
    """A model's own tiny decoder goes before the public sizes; without a model those are meant."""
    config, sizes = configs.sfv(), NETWORKS["svd"]
    assert programs.tiny_of("full", config, sizes) is None
    assert programs.tiny_of("tiny", config, sizes) == TinyDecoderConfig()
    assert programs.tiny_of("wide", config, sizes) == TinyDecoderConfig.wide()
    params = tree.init(TinyTemporalDecoder, OWN)
    save_tiny(tmp_path / "tiny_decoder", OWN, params, LatentSpace())
    assert programs.tiny_of(str(tmp_path / "tiny_decoder"), config, sizes) == OWN
    config.init = str(tmp_path)
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
    with pytest.raises(ValueError, match="--compare decoders: give --decoder"):
        measurement.run(measurement.Request("tiny", 16, 16, compare="decoders", dtype="float32"))


def test_a_run_of_a_decoder_is_not_planned():
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match="config.method='decoder' trains no UNet"):
        programs.train_program(configs.decoder(), mesh, NETWORKS["svd"], (16, 16))
