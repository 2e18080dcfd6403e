"""The fast forms of layers equal their plain forms, in value and gradient, and are what the networks really use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfv_jax.models import layers, tree
from sfv_jax.models.layers import Upsample
from sfv_jax.models.unet import UNet
from tests.conftest import CONFIGS, assert_equal, noise, value_and_gradients


def convolutions(function, *args) -> list[tuple]:
    """(kernel's shape, dilation of the input) of every convolution that `function` makes, remat and loops included."""
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "conv_general_dilated":
                found.append((eqn.invars[1].aval.shape, eqn.params["lhs_dilation"]))
            for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


# ---- upsampling ----


def upsample_plainly(kernel, bias, x):
    """Nearest resize, then the 3x3 convolution, with every doubled pixel in memory."""
    doubled = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    frames = doubled.reshape(-1, *doubled.shape[2:])
    return layers.conv2d(frames, kernel, ((1, 1), (1, 1))).reshape(*doubled.shape[:-1], -1) + bias


def upsample_by_layer(kernel, bias, x):
    graphdef, _ = tree.abstract(Upsample, kernel.shape[2], dtype=x.dtype, param_dtype=kernel.dtype)
    return tree.build(graphdef, {"conv": {"kernel": kernel, "bias": bias}})(x)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_upsampling_is_the_convolution_of_doubled_pixels(monkeypatch, platform):
    monkeypatch.setattr(layers, "platform", lambda: platform)
    with jax.enable_x64(True):
        args = [
            jnp.asarray(noise(n, *shape), jnp.float64) for n, shape in enumerate([(3, 3, 2, 2), (2,), (1, 2, 3, 4, 2)])
        ]
        expected = value_and_gradients(upsample_plainly, *args)
        assert expected[0].shape == (1, 2, 6, 8, 2)
        assert_equal(value_and_gradients(upsample_by_layer, *args), expected, 1e-12)


def test_upsampling_in_bf16_is_as_precise_as_the_plain_form():
    kernel, x = noise(0, 3, 3, 64, 64) / 24, noise(1, 1, 1, 12, 12, 64).astype(jnp.bfloat16)
    exact = upsample_plainly(kernel, 0.0, x.astype(np.float32))
    plain = upsample_plainly(kernel.astype(x.dtype), 0, x)
    fast = upsample_by_layer(kernel, np.zeros(64, np.float32), x)
    assert plain.dtype == fast.dtype == jnp.bfloat16
    errors = [float(jnp.sqrt(jnp.mean((y.astype(jnp.float32) - exact) ** 2))) for y in (fast, plain)]
    assert errors[0] < 1.05 * errors[1] < 0.01, errors


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_networks_upsample_in_the_small_frame(monkeypatch, platform):
    monkeypatch.setattr(layers, "platform", lambda: platform)
    forms = {"cpu": ((2, 2, 64, 64), (1, 1)), "tpu": ((4, 4, 64, 64), (2, 2))}
    count = {"cpu": 4, "tpu": 1}[platform]
    unet, params = tree.abstract(UNet, CONFIGS["unet"])

    def loss(params, x):
        out = tree.build(unet, params)(x, jnp.ones(1), jnp.ones((1, 32)), jnp.ones((1, 3)))
        return jnp.sum(out)

    x = jnp.zeros((1, 2, 8, 8, CONFIGS["unet"].in_channels))
    assert convolutions(loss, params, x).count(forms[platform]) == count
    odd = jnp.zeros((1, 2, 5, 8, CONFIGS["unet"].in_channels))  # three rows to five: not twice the size
    assert forms[platform] not in convolutions(loss, params, odd)
