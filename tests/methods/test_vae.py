"""Training of a VAE: its loss against one composed independently, and a run from frames to a sampled video."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from sfv_jax import config as configs
from sfv_jax.config_check import check
from sfv_jax.methods import vae
from sfv_jax.methods.common import step_key
from tests.conftest import noise

FRAMES = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4, 3), np.uint8)
LATENTS = 2


class Plain:
    """Stand-in for `VAENetworks`: per-pixel linear maps."""

    params = {"encoder": {"w": noise(0, 3, 2 * LATENTS)}, "decoder": {"w": noise(1, LATENTS, 3)}}

    def generator(self, params):
        return SimpleNamespace(
            posterior=lambda x: tuple(jnp.split(x @ params["encoder"]["w"], 2, axis=-1)),
            decode=lambda z: jnp.tanh(z @ params["decoder"]["w"]),
        )


def config(**changes) -> ConfigDict:
    made = configs.vae()
    made.generator_optimizer = configs.adamw(1e-2)
    made.update(dict(dtype="float32", batch_size=2))
    made.vae.update(dict(gradient_weight=0.7, flicker_weight=0.3, kl_weight=0.05))
    made.update_from_flattened_dict(changes)
    return made


def trained(made: ConfigDict, frames=FRAMES):
    networks = Plain()
    state, frozen = vae.init_state(networks, made, networks.params)
    return state, *jax.jit(vae.make_train_step(networks, made))(state, frozen, {"frames": frames})


def expected(made: ConfigDict, frames=FRAMES) -> dict[str, float]:
    """Returns the terms of the loss in numpy, with the noise that the step draws."""
    x = frames / 127.5 - 1
    mean, log_variance = np.split(x @ np.asarray(Plain.params["encoder"]["w"], np.float64), 2, axis=-1)
    drawn = np.asarray(jax.random.normal(jax.random.fold_in(step_key(made, 0), 0), mean.shape), np.float64)
    y = np.tanh((mean + np.exp(log_variance / 2) * drawn) @ np.asarray(Plain.params["decoder"]["w"], np.float64))
    e = y - x
    steady = np.abs(e[:, 1:] - e[:, :-1]).mean() if len(x[0]) > 1 else 0.0
    ends = made.vae.ends_weight if len(x[0]) > 2 else 1.0  # a single frame or a pair has nothing but ends
    weights = np.array([ends, *[1.0] * (len(x[0]) - 2), ends][: len(x[0])])
    e = e * (weights * len(weights) / weights.sum())[:, None, None, None]
    across = np.abs(e[:, :, 1:] - e[:, :, :-1]).mean() + np.abs(e[:, :, :, 1:] - e[:, :, :, :-1]).mean()
    terms = {"l1": np.abs(e).mean(), "gradient": across, "flicker": steady}
    # Divergence between normal distributions, from its definition as an integral over a grid.
    grid = np.linspace(-30, 30, 20001)
    deviation = np.exp(log_variance / 2).reshape(-1, 1)
    log_p = -0.5 * ((grid - mean.reshape(-1, 1)) / deviation) ** 2 - np.log(deviation)
    density = np.exp(log_p) / np.sqrt(2 * np.pi)
    terms["kl"] = (density * (log_p + 0.5 * grid**2)).sum(1).mean() * (grid[1] - grid[0])
    pixels = np.mean(((y - x) * 127.5) ** 2)
    return terms | {"psnr": 10 * np.log10(255**2 / pixels)}


@pytest.mark.parametrize("ends_weight", [1.0, 5.0])
@pytest.mark.parametrize("frames", [FRAMES, FRAMES[:, :2], FRAMES[:, :1]])
def test_loss_terms_are_those_composed_independently(frames, ends_weight):
    made = config(**{"vae.ends_weight": ends_weight})
    _, _, metrics = trained(made, frames)
    for name, value in expected(made, frames).items():
        name = name if name == "psnr" else f"loss/{name}"
        assert float(metrics[name]) == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_the_gradient_is_that_of_the_weighted_sum():
    """Its norm over one trained parameter against central differences."""
    made = config(trainable="^encoder")
    networks = Plain()
    _, _, metrics = trained(made)
    kept, slopes = networks.params["encoder"]["w"], []
    try:
        for place in np.ndindex(kept.shape):
            totals = []
            for shift in (1e-4, -1e-4):
                moved = np.array(kept, np.float64)
                moved[place] += shift
                networks.params["encoder"]["w"] = moved
                terms = expected(made)
                totals.append(terms["l1"] + 0.7 * terms["gradient"] + 0.3 * terms["flicker"] + 0.05 * terms["kl"])
            slopes.append((totals[0] - totals[1]) / 2e-4)
    finally:
        networks.params["encoder"]["w"] = kept
    assert float(metrics["norm/generator_gradient"]) == pytest.approx(np.linalg.norm(slopes), rel=2e-3)


def test_only_the_decoder_moves_when_only_it_is_trained():
    before, after, _ = trained(config(trainable="^decoder"))
    assert np.array_equal(before["generator"]["encoder"]["w"], after["generator"]["encoder"]["w"])
    assert not np.array_equal(before["generator"]["decoder"]["w"], after["generator"]["decoder"]["w"])


def test_steps_draw_their_own_noise():
    made = config()
    networks = Plain()
    state, frozen = vae.init_state(networks, made, networks.params)
    step = jax.jit(vae.make_train_step(networks, made))
    losses = [float(step(state | {"step": n}, frozen, {"frames": FRAMES})[1]["loss/l1"]) for n in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_configs_are_legal():
    check(config())
