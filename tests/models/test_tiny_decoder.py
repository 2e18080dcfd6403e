"""The tiny decoder against an independent statement of TAESDV's layout in torch, and against itself frame by frame."""

from collections import OrderedDict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sfv_jax.errors import UserError
from sfv_jax.models import tiny_decoder, tree
from sfv_jax.models.tiny_decoder import TinyDecoderConfig, TinyTemporalDecoder
from sfv_jax.runtime.device import count_flops
from sfv_jax.weights.taesdv import read_decoder, taesdv_config, taesdv_names
from tests.conftest import error, noise
from tests.support.taesdv import in_memory, random_decoder, torch_decode

CONFIGS = {
    "taesdv": TinyDecoderConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=(2, 1, 1, 1)),  # but smaller
    "ours": TinyDecoderConfig(5, 3, (12, 8), (1, 2), mid_layers=1),
    "flat": TinyDecoderConfig(2, 4, (6,), (2,)),
}


def ours(config: TinyDecoderConfig, **kw) -> TinyTemporalDecoder:
    """Returns our decoder with the weights of `random_decoder`."""
    graph, _ = tree.abstract(TinyTemporalDecoder, config, **kw)
    return tree.build(graph, read_decoder(in_memory(random_decoder(config)), taesdv_names(config), config))


@nnx.jit(static_argnames="frames")
def decoded(decoder: TinyTemporalDecoder, x: np.ndarray, frames: int = 0) -> jax.Array:
    return decoder(x, frames)


def latents(config: TinyDecoderConfig, *size: int) -> np.ndarray:
    """Returns latents `[b, t, h, w, c]`, some of them so large that they are clamped."""
    return 3 * noise(5, *size, config.latent_channels)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(2, 4, 3, 5), (1, 1, 2, 1)], ids=["odd", "one frame"])
def test_frames_are_those_of_torch(name, size):
    pytest.importorskip("torch")
    config, x = CONFIGS[name], latents(CONFIGS[name], *size)
    expected = torch_decode(random_decoder(config), x)
    assert expected.shape == (*size[:2], *(config.downscale * n for n in size[2:]), config.out_channels)
    assert expected.std() > 0.1
    assert error(decoded(ours(config), x), expected)[0] <= 1e-5


@nnx.jit
def advanced(decoder: TinyTemporalDecoder, x: np.ndarray, memory: tuple) -> tuple:
    return decoder.advance(x, memory)


@pytest.mark.parametrize("name", ["taesdv", "ours"])
def test_frames_one_after_another_are_those_decoded_together(name):
    config = CONFIGS[name]
    decoder, x = ours(config), latents(config, 2, 5, 2, 3)
    whole = np.asarray(decoded(decoder, x))
    for frames in (1, 2, 9):
        np.testing.assert_allclose(decoded(decoder, x, frames), whole, atol=1e-5)
    memory, made = decoder.start((2, 2, 3)), []
    for n in range(5):
        frame, memory = advanced(decoder, x[:, n : n + 1], memory)
        made.append(frame)
    np.testing.assert_allclose(np.concatenate(made, axis=1), whole, atol=1e-5)
    assert len(memory) == sum(config.layers_per_block)


def test_a_sample_ignores_its_neighbours_and_a_frame_the_later_ones():
    config = CONFIGS["ours"]
    decoder, x = ours(config), latents(config, 2, 4, 2, 3)
    whole = decoded(decoder, x)
    np.testing.assert_allclose(decoded(decoder, x[1:]), whole[1:], atol=1e-5)
    np.testing.assert_allclose(decoded(decoder, x[:, :2]), whole[:, :2], atol=1e-5)
    assert np.abs(decoded(decoder, x[:, 2:]) - whole[:, 2:]).max() > 1e-2  # but not the earlier ones


def of_the_frame_itself(block, x, memory):
    return block(x, x), x[:, -1:]


def of_two_frames_before(block, x, memory):
    past = jnp.concatenate([memory, memory, x[:, :-2]], axis=1)[:, : x.shape[1]]
    return block(x, past), x[:, -1:]


def of_the_output(block, x, memory):
    y = block(x, jnp.concatenate([memory, x[:, :-1]], axis=1))
    return y, y[:, -1:]


def swapped(block, x, past=None):
    seen = x if past is None else jnp.concatenate([past, x], axis=-1)
    h = block.conv2(nnx.relu(block.conv1(seen)))
    return nnx.relu(block.conv3(nnx.relu(h)) + x)


def without_last_relu(block, x, past=None):
    seen = x if past is None else jnp.concatenate([x, past], axis=-1)
    return block.conv3(nnx.relu(block.conv2(nnx.relu(block.conv1(seen))))) + x


MISTAKES = {
    "memory of the frame itself": ("MemBlock.remember", of_the_frame_itself),
    "memory of two frames before": ("MemBlock.remember", of_two_frames_before),
    "memory before the frame": ("Block.__call__", swapped),
    "no last ReLU": ("Block.__call__", without_last_relu),
    "no clamp": ("jnp.tanh", lambda x: x),
    "clamp at 1": ("jnp.tanh", lambda x: jnp.clip(3 * x, -1, 1) / 3),
    "no first ReLU": ("nnx.relu", None),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_noticed(name, monkeypatch):
    pytest.importorskip("torch")
    config, (where, wrong) = CONFIGS["taesdv"], MISTAKES[name]
    x = latents(config, 1, 3, 1, 2)
    decoder, expected = ours(config), torch_decode(random_decoder(config), x)
    assert error(decoder(x), expected)[0] <= 1e-5
    if wrong is None:  # the first call of all
        calls, relu = [], nnx.relu
        wrong = lambda x: x if calls.append(x) is None and len(calls) == 1 else relu(x)  # noqa: E731
    monkeypatch.setattr(f"{tiny_decoder.__name__}.{where}", wrong)
    assert error(decoder(x), expected)[0] > 1e-3


def test_a_wrong_memory_is_noticed_between_frames(monkeypatch):
    """A memory that is right within a call but not after it shows only when frames come one after another."""
    config = CONFIGS["taesdv"]
    decoder, x = ours(config), latents(config, 1, 3, 2, 3)
    whole = np.asarray(decoder(x))
    monkeypatch.setattr(tiny_decoder.MemBlock, "remember", of_the_output)
    np.testing.assert_allclose(decoder(x), whole, atol=1e-5)
    assert np.abs(decoder(x, 1) - whole).max() > 1e-2


def test_sizes_are_those_of_the_release():
    """1,591,171 parameters in 10 blocks; 5.2 TFLOP for SVD's video, at most 6 % of the 97.2 of SVD's decoder."""
    found = {name: tree.abstract(TinyTemporalDecoder, make()) for name, make in tiny_decoder.VARIANTS.items()}
    assert {name: tree.count(params) for name, (_, params) in found.items()} == {"tiny": 1_591_171, "wide": 13_398_595}
    video = jax.ShapeDtypeStruct((1, 14, 72, 128, 4), jnp.float32)
    for name, limit in (("tiny", 0.06), ("wide", 0.1)):
        graph, params = found[name]
        flops = count_flops(lambda params, x, graph=graph: tree.build(graph, params)(x), params, video)
        assert 0.8 * limit < flops / 97.2e12 < limit
    assert TinyDecoderConfig.narrow() == TinyDecoderConfig()
    for downscale in (1, 2, 4, 8):
        for make in tiny_decoder.VARIANTS.values():
            assert make(7, downscale).downscale == downscale


def test_compute_dtype():
    config, x = CONFIGS["ours"], latents(CONFIGS["ours"], 1, 3, 2, 3)
    half, whole = ours(config, dtype=jnp.bfloat16), ours(config)
    assert half(x).dtype == half.start((1, 2, 3))[0].dtype == jnp.bfloat16
    assert 0 < error(half(x), np.asarray(whole(x)))[0] < 0.1


def test_impossible_sizes():
    with pytest.raises(UserError, match="have 3 and 2 levels"):
        TinyDecoderConfig(4, 3, (8, 8, 8), (1, 1))
    with pytest.raises(UserError, match="nothing would mix frames"):
        TinyDecoderConfig(4, 3, (8, 8), (0, 0))


def test_the_config_follows_from_the_shapes():
    for config in CONFIGS.values():
        assert taesdv_config(in_memory(random_decoder(config))) == config
    numbered = list(OrderedDict.fromkeys(name.split(".")[1] for name in taesdv_names(TinyDecoderConfig()).values()))
    assert sorted(map(int, numbered)) == [1, 3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 15, 17, 18, 19]


def test_gradients_reach_every_parameter():
    config = CONFIGS["ours"]
    graph, _ = tree.abstract(TinyTemporalDecoder, config)
    params = tree.init(TinyTemporalDecoder, config, 3)
    loss = lambda params, x: jnp.mean(tree.build(graph, params)(x) ** 2)  # noqa: E731
    grads = jax.jit(partial(jax.grad(loss), x=latents(config, 1, 3, 2, 3)))(params)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
