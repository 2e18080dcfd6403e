"""Gradients over micro-batches: their mean, and the memory of the loop over them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfv_jax.methods import sfv
from sfv_jax.methods.common import accumulate
from tests.conftest import noise
from tests.methods.test_methods import Plain, make_batch, sfv_config


@pytest.mark.slow
def test_accumulation_is_the_mean_of_its_micro_batches():
    networks, config, batch = Plain(), sfv_config(), make_batch(8)
    gradients, params, key = sfv.make_gradients(networks, config), networks.params, jax.random.key(3)

    @jax.jit
    def one(params, micro, key):
        return gradients(params["generator"], params["heads"], {"backbone": params["backbone"]}, micro, key)

    found = accumulate(one, params, batch, key, 4)
    parts = [one(params, {k: v[i::4] for k, v in batch.items()}, jax.random.fold_in(key, i)) for i in range(4)]
    expected = jax.tree.map(lambda *xs: sum(xs) / 4, *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)
    with pytest.raises(ValueError, match="does not divide into 3"):
        accumulate(one, params, batch, key, 3)


def test_accumulation_of_four_is_one_batch_where_nothing_is_drawn():
    w, batch = noise(0, 5), {"x": noise(1, 8, 5)}
    gradient = lambda w, micro, key: jax.grad(lambda w: jnp.mean((micro["x"] @ w) ** 2))(w)  # noqa: E731
    four, one = (accumulate(gradient, w, batch, jax.random.key(0), steps) for steps in (4, 1))
    np.testing.assert_allclose(four, one, rtol=1e-5)


def test_accumulation_holds_no_copy_of_all_parameters():
    """Values from parameters alone (casts, gathers) are computed in each iteration and not kept through the loop."""
    gradient = lambda w, micro, key: jax.grad(lambda w: jnp.mean((micro @ jnp.sin(w)) ** 2))(w)  # noqa: E731
    step = jax.jit(lambda w, x: accumulate(gradient, w, x, jax.random.key(0), 4))
    text = step.lower(noise(0, 64, 64), noise(1, 8, 64)).compile().as_text()
    (loop,) = re.findall(r"^(.*) while\(", text, re.MULTILINE)  # with the shapes it carries
    assert loop.count("f32[64,64]") <= 2  # the parameters and the sum of gradients


def test_a_micro_batch_is_traced_once():
    traced = []

    def gradient(w, micro, key):
        traced.append(1)
        return micro.sum() * w

    jax.make_jaxpr(lambda w, x: accumulate(gradient, w, x, jax.random.key(0), 4))(noise(0, 3), noise(1, 8))
    assert traced == [1]
