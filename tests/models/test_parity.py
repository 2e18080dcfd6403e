"""Our networks against diffusers and transformers on random weights, in float64 (`tests.support.golden`)."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfv_jax.models import attention, clip, tree
from sfv_jax.models.clip import CLIPConfig
from sfv_jax.models.layers import sinusoidal_embedding
from sfv_jax.models.unet import UNet, UNetConfig
from sfv_jax.models.vae import VAEConfig
from sfv_jax.weights.diffusers import manifest
from tests.conftest import CONFIGS, error, noise
from tests.support import golden

short = pytest.mark.short  # a call of each network, its full-size names, and what depends on numpy
MANIFESTS = json.loads((Path(__file__).parents[1] / "manifests" / "svd.json").read_text())
FULL = {"unet": UNetConfig.svd(), "vae": VAEConfig.svd(), "image_encoder": CLIPConfig.svd()}


def assert_close(found, expected, *, peak, rms):
    found_peak, found_rms = error(found, expected)
    assert found_peak <= peak and found_rms <= rms, (found_peak, found_rms)


@short
def test_unet(build, unet_case):
    assert_close(jax.jit(build("unet"))(*unet_case.inputs), unet_case.expected, peak=1e-5, rms=3e-6)


def test_unet_taps_are_the_down_blocks_outputs(build, unet_case):
    taps = build("unet").encode(*unet_case.inputs)
    assert len(taps) == len(unet_case.taps) == 2
    for found, expected in zip(taps, unet_case.taps, strict=True):
        assert_close(found, expected, peak=1e-5, rms=3e-6)


def test_encoder_only_unet_is_a_subtree(params, unet_case):
    graphdef, shapes = tree.abstract(UNet, CONFIGS["unet"], encoder_only=True)
    half = tree.build(graphdef, tree.subtree(params["unet"], shapes))
    assert_close(half.encode(*unet_case.inputs)[-1], unet_case.taps[-1], peak=1e-5, rms=3e-6)


@pytest.mark.parametrize("changes", [{"temporal_conv": "conv"}, {"attention_kernel": "reduce"}], ids=str)
def test_unet_execution_choices_do_not_change_the_output(build, unet_case, changes):
    model = build("unet", dataclasses.replace(CONFIGS["unet"], **changes))
    assert_close(model(*unet_case.inputs), unet_case.expected, peak=1e-5, rms=3e-6)


@pytest.mark.slow
def test_remat_does_not_change_the_output(build, unet_case):
    model = build("unet", dataclasses.replace(CONFIGS["unet"], remat=True))
    tap = jax.jit(lambda *inputs: model.encode(*inputs)[-1])(*unet_case.inputs)
    assert_close(tap, unet_case.taps[-1], peak=1e-5, rms=3e-6)


def test_unet_batch_members_do_not_mix(build, unet_case):
    model = build("unet")
    together = model(*unet_case.inputs)
    swapped = model(*(x[::-1] for x in unet_case.inputs))
    assert_close(swapped[::-1], np.asarray(together, np.float64), peak=1e-5, rms=3e-6)


def test_attention_kernels_agree():
    q, k, v = (jnp.asarray(noise(n, 3, 50, 2, 16)) for n in range(3))
    expected = np.asarray(attention.einsum_attention(q, k, v), np.float64)
    assert_close(attention.blocked_attention(q, k, v, block=16), expected, peak=1e-5, rms=1e-6)
    assert_close(attention.attention(q, k, v, "reduce"), expected, peak=1e-5, rms=1e-6)
    with pytest.raises(ValueError, match="flash"):
        attention.attention(q, k, v, "flash")


@short
def test_vae_encoder(build, encoder_case):
    assert_close(build("vae").encode(*encoder_case.inputs), encoder_case.expected, peak=5e-5, rms=2e-5)


@short
@pytest.mark.parametrize("form", ["matmul", "conv"])
def test_vae_decoder(build, decoder_case, form):
    model = build("vae", dataclasses.replace(CONFIGS["vae"], temporal_conv=form))
    assert_close(model.decode(*decoder_case.inputs), decoder_case.expected, peak=1e-4, rms=2e-5)


def test_vae_refuses_odd_sizes(build):
    with pytest.raises(ValueError, match="multiples of 8"):
        build("vae").encode(jnp.zeros((1, 1, 36, 32, 3)))


@short
def test_clip(build, clip_case):
    assert_close(build("image_encoder")(*clip_case.inputs), clip_case.expected, peak=1e-5, rms=1e-5)


@short
@pytest.mark.parametrize(("height", "width"), golden.IMAGE_SIZES)
def test_clip_preprocessing(height, width):
    found = clip.preprocess(golden.preprocess_input(height, width))[:, golden.GRID, golden.GRID]
    np.testing.assert_allclose(found, golden.load("preprocessing")[f"preprocess_{height}x{width}"], atol=2e-4)


@short
@pytest.mark.parametrize("side", golden.SIDES)
def test_clip_resize_matrix(side):
    identity = clip.resize_matrix(224)  # the width stays, but has the reference's slight blur
    found = clip.resize_matrix(side) @ golden.resize_input(side) @ identity.T
    np.testing.assert_allclose(found[:, golden.COLUMNS], golden.load("preprocessing")[f"resize_{side}"], atol=1e-4)


@short
def test_many_layers_stay_in_order():
    """Lists of more than ten layers keep their order; only the full-size CLIP tower has them."""
    graphdef, shapes = tree.abstract(clip.CLIPVision, CLIPConfig.tiny(num_hidden_layers=12))
    flat = {path: np.zeros(x.shape, np.float32) for path, x in tree.flatten(shapes).items()}
    for n in range(12):
        flat[f"vision_model.encoder.layers.{n}.mlp.fc1.bias"] += n
    layers = tree.build(graphdef, tree.unflatten(flat)).vision_model.encoder.layers
    assert [float(layer.mlp.fc1.bias[0]) for layer in layers] == list(range(12))


# {index: value} of diffusers' get_timestep_embedding; None is the sum of all entries.
SINUSOIDS = {
    (1.637770, 320): {0: -0.066924, 1: 0.024639, 80: 0.999866, 160: 0.997758, 240: 0.016377, None: 174.0695},
    (-1.553652, 320): {0: 0.017143, 160: -0.999853, None: 125.8983},
    (13.0, 1280): {0: 0.907447, 1: 0.969434, 640: 0.420167, None: 527.7866},
    (6.0, 256): {0: 0.960170, 128: -0.279415, None: 113.8075},
    (127.0, 256): {0: 0.232359, 128: 0.972630, None: 78.6379},
    (0.02, 256): {0: 0.9998, 128: 0.019999, None: 128.2865},
}


@short
@pytest.mark.parametrize("args", SINUSOIDS, ids=str)
def test_sinusoids(args):
    embedding = np.asarray(sinusoidal_embedding(*args))
    for index, value in SINUSOIDS[args].items():
        np.testing.assert_allclose(embedding.sum() if index is None else embedding[index], value, rtol=2e-5, atol=2e-6)


@short
@pytest.mark.parametrize("component", FULL)
def test_full_size_names_and_shapes(component):
    shapes = manifest(component, FULL[component])
    lines = sorted(f"{name} {','.join(map(str, shape))}" for name, shape in shapes.items())
    found = {
        "tensors": len(shapes),
        "parameters": sum(int(np.prod(shape)) for shape in shapes.values()),
        "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
    }
    assert found == MANIFESTS[component]


def test_full_size_encoder_half():
    _, shapes = tree.abstract(UNet, FULL["unet"], encoder_only=True)
    assert tree.count(shapes) == 483_883_534
