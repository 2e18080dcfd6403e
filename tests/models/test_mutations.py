"""Plausible mistakes: each must fail the parity test that the true network passes.

A test that passes one of them proves nothing. The mutations change one network in place, by name.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sfv_jax.models import attention, layers, unet
from sfv_jax.models.layers import sinusoidal_embedding
from tests.conftest import error

pytestmark = pytest.mark.slow


def passes(found, expected, *, peak: float, rms: float) -> bool:
    found_peak, found_rms = error(found, expected)
    return found_peak <= peak and found_rms <= rms


def change(kind: type, within: str = "", **values):
    """Returns a mutation that sets attributes of all modules of a class, only below modules named `within` if given."""

    def mutate(model, inputs, patch):
        modules = [m for path, m in nnx.iter_modules(model) if isinstance(m, kind) and (not within or within in path)]
        assert modules
        for module in modules:
            for name, value in values.items():
                assert hasattr(module, name)
                setattr(module, name, value)
        return inputs

    return mutate


def pad_downsamplers(padding):
    def mutate(model, inputs, patch):
        for _, module in nnx.iter_modules(model):
            if isinstance(module, layers.Downsample):
                module.conv.padding = padding
        return inputs

    return mutate


def flipped(x, dim: int, only: int | None = None):
    """Embeds with sines first, in embeddings of width `only` or in all."""
    embedding = sinusoidal_embedding(x, dim)
    return jnp.roll(embedding, dim // 2, axis=-1) if only in (None, dim) else embedding


def shifted(x, dim: int):
    """Embeds with frequencies divided by half - 1, diffusers' `downscale_freq_shift=1`."""
    angles = jnp.asarray(x)[..., None] * np.exp(-np.log(1e4) * np.arange(dim // 2) / (dim // 2 - 1))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def shift_frequencies(model, inputs, patch):
    patch.setattr(unet, "sinusoidal_embedding", shifted)
    patch.setattr(attention, "sinusoid", shifted)
    return inputs


def flip_frame_embedding(model, inputs, patch):
    patch.setattr(attention, "sinusoid", flipped)
    return inputs


def flip_noise_embedding(model, inputs, patch):
    patch.setattr(unet, "sinusoidal_embedding", partial(flipped, only=model.config.block_out_channels[0]))
    return inputs


def omit_frame_embedding(model, inputs, patch):
    for path, module in nnx.iter_modules(model):
        if path and path[-1] == "time_pos_embed":
            for parameter in (module.linear_2.kernel, module.linear_2.bias):
                parameter[...] = jnp.zeros_like(parameter[...])
    return inputs


def tanh_gelu(model, inputs, patch):
    patch.setattr(nnx, "gelu", lambda x, approximate: jax.nn.gelu(x, approximate=True))
    patch.setattr(attention, "gated", gated_by_tanh)
    return inputs


def gated_by_tanh(value, gate):
    return value * jax.nn.gelu(gate, approximate=True)


def quick_gelu(model, inputs, patch):
    patch.setattr(nnx, "gelu", lambda x, approximate: x * jax.nn.sigmoid(1.702 * x))
    return inputs


def swap_geglu(model, inputs, patch):
    def call(self, x):
        gate, value = jnp.split(self.proj(x), 2, axis=-1)
        return value * nnx.gelu(gate, approximate=False)

    patch.setattr(attention.GEGLU, "__call__", call)
    return inputs


def no_silu_on_embedding(model, inputs, patch):
    def call(self, x, emb):
        h = self.conv1(nnx.silu(self.norm1(x))) + self.time_emb_proj(emb)[:, None, None, None]
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))

    patch.setattr(layers.ResnetBlock, "__call__", call)
    return inputs


def mix_time_context(model, inputs, patch):
    """Mixes contexts as diffusers did before 0.28: pixel p of sample b has that of (b * pixels + p) mod batch."""
    call = attention.TransformerBlock.__call__

    def mixed(self, x, context):
        if not self.temporal:
            return call(self, x, context)
        samples, pixels = np.arange(x.shape[0])[:, None], np.arange(x.shape[2])
        own = ((samples * len(pixels) + pixels) % len(samples) == samples)[:, None, :, None]
        return jnp.where(own, call(self, x, context), call(self, x, context[::-1]))

    patch.setattr(attention.TransformerBlock, "__call__", mixed)
    return inputs


def wrong_fps(model, inputs, patch):
    x, c_noise, context, ids = inputs
    return x, c_noise, context, ids + np.array([1, 0, 0], np.float32)


def sigma_for_c_noise(model, inputs, patch):
    x, c_noise, context, ids = inputs
    return x, np.exp(4 * c_noise), context, ids


def scaled_condition(model, inputs, patch):
    x, *rest = inputs
    return np.concatenate([x[..., :4], 0.18215 * x[..., 4:]], axis=-1), *rest


def skip_time_conv(model, inputs, patch):
    model.decoder.time_conv_out = attention.Identity()
    return inputs


UNET = {
    "LayerNorm eps 1e-6": change(nnx.LayerNorm, epsilon=1e-6),
    "all GroupNorm eps 1e-6": change(layers.GroupNorm, eps=1e-6),
    "transformer GroupNorm eps 1e-5": change(layers.GroupNorm, within="attentions", eps=1e-5),
    "resnet eps 1e-5": change(layers.GroupNorm, within="resnets", eps=1e-5),
    "tanh GELU": tanh_gelu,
    "fps instead of fps - 1": wrong_fps,
    "frequency shift 1": shift_frequencies,
    "frame embedding omitted": omit_frame_embedding,
    "frame embedding flipped": flip_frame_embedding,
    "temporal GroupNorm per frame": change(layers.GroupNorm, within="temporal_res_block", per_frame=True),
    "sigma for c_noise": sigma_for_c_noise,
    "noise embedding flipped": flip_noise_embedding,
    "no SiLU before time_emb_proj": no_silu_on_embedding,
    "GEGLU halves swapped": swap_geglu,
    "time context mixed over the batch": mix_time_context,
    "stride 2 padded SAME": pad_downsamplers(((0, 1), (0, 1))),
    "AlphaBlender swapped": change(layers.AlphaBlender, switch=True),
    "conditioning latent scaled": scaled_condition,
}
DECODER = {
    "temporal eps 1e-6": change(layers.GroupNorm, within="temporal_res_block", eps=1e-6),
    "all eps 1e-5": change(layers.GroupNorm, eps=1e-5),
    "mix side not switched": change(layers.AlphaBlender, switch=False),
    "time_conv_out skipped": skip_time_conv,
}
ENCODER = {"symmetric padding": pad_downsamplers(((1, 1), (1, 1)))}
CLIP = {
    "quick GELU": quick_gelu,
    "tanh GELU": tanh_gelu,
    "LayerNorm eps 1e-6": change(nnx.LayerNorm, epsilon=1e-6),
}


def unchanged(model, inputs, patch):
    return inputs


def cases(mutations: dict):
    return pytest.mark.parametrize("mutate", [unchanged, *mutations.values()], ids=["unchanged", *mutations])


@cases(UNET)
def test_unet(build, unet_case, monkeypatch, mutate):
    model = build("unet")
    found = model(*mutate(model, unet_case.inputs, monkeypatch))
    assert passes(found, unet_case.expected, peak=1e-5, rms=3e-6) == (mutate is unchanged)


@cases(DECODER)
def test_vae_decoder(build, decoder_case, monkeypatch, mutate):
    model = build("vae")
    found = model.decode(*mutate(model, decoder_case.inputs, monkeypatch))
    assert passes(found, decoder_case.expected, peak=1e-4, rms=2e-5) == (mutate is unchanged)


@cases(ENCODER)
def test_vae_encoder(build, encoder_case, monkeypatch, mutate):
    model = build("vae")
    found = model.encode(*mutate(model, encoder_case.inputs, monkeypatch))
    assert passes(found, encoder_case.expected, peak=5e-5, rms=2e-5) == (mutate is unchanged)


@cases(CLIP)
def test_clip(build, clip_case, monkeypatch, mutate):
    model = build("image_encoder")
    found = model(*mutate(model, clip_case.inputs, monkeypatch))
    assert passes(found, clip_case.expected, peak=1e-5, rms=1e-5) == (mutate is unchanged)
