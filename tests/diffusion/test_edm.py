"""Noise levels, preconditioning and their laws, against tables, diffusers and independent formulas."""

from statistics import NormalDist

import jax
import numpy as np
import pytest

from sfv_jax.diffusion import edm
from tests.conftest import noise
from tests.support import golden

# sigma of diffusers' EulerDiscreteScheduler with SVD's config, without the final 0.
SCHEDULES = {
    1: [700],
    4: [700, 70.54084, 2.269116, 0.002],
    8: [700, 286.5388, 102.9034, 30.99361, 7.276163, 1.167571, 0.09738768, 0.002],
    16: [700, 467.9608, 305.2408, 193.6457, 119.0217, 70.54084, 40.07711, 21.66523, 11.03762, 5.232778, 2.269116]
    + [0.8784568, 0.2929653, 0.07960167, 0.01603357, 0.002],
    25: [700, 545.7292, 421.5691, 322.4537, 244.0231, 182.5471, 134.8544, 98.26714, 70.54084, 49.80979, 34.53674]
    + [23.46751, 15.58997, 10.09713, 6.354266, 3.869697, 2.269116, 1.273177, 0.678146, 0.3393781, 0.1574046]
    + [0.06639908, 0.02480258, 0.007882495, 0.002],
}
C_NOISE = {
    1: [1.63777],
    4: [1.63777, 1.06405, 0.204848, -1.55365],
    8: [1.63777, 1.41447, 1.15845, 0.858445, 0.496151, 0.0387313, -0.582264, -1.55365],
}


@pytest.mark.parametrize("steps", SCHEDULES)
def test_sampling_schedule(steps):
    found = edm.sampling_sigmas(steps)
    assert found.dtype == np.float32 and found[-1] == 0
    np.testing.assert_allclose(found[:-1], SCHEDULES[steps], rtol=1e-6)
    if steps in C_NOISE:
        np.testing.assert_allclose(edm.scalings(found[:-1])[3], C_NOISE[steps], rtol=5e-6)


@pytest.mark.parametrize("steps", golden.STEPS)
def test_sampling_schedule_is_diffusers(steps):
    expected, found = golden.load("schedules"), edm.sampling_sigmas(steps)
    np.testing.assert_allclose(found, expected[f"sigmas_{steps}"], rtol=1e-6)
    np.testing.assert_allclose(edm.scalings(found[:-1])[3], expected[f"c_noise_{steps}"], rtol=1e-5, atol=1e-6)


def test_training_levels_increase():
    np.testing.assert_allclose(edm.generator_sigmas(4), [2.2691163, 70.5408415, 700], rtol=1e-6)
    levels = edm.karras_sigmas(1000)
    assert np.all(np.diff(levels) > 0)
    np.testing.assert_allclose(levels[[0, -1]], [0.002, 700], rtol=1e-6)


def test_scalings():
    expected = [
        [0.162631011, 2.00923835e-4, 2.0408e-6],
        [-0.915078679, -0.999899533, -0.999998980],
        [0.403275354, 0.0141747605, 0.00142856997],
    ]
    for found, values in zip(edm.scalings(edm.generator_sigmas(4)), expected, strict=False):
        np.testing.assert_allclose(found, values, rtol=2e-5 if values[-1] == 2.0408e-6 else 1e-6)


def test_levels_that_cannot_be():
    with pytest.raises(ValueError, match="at least 2"):
        edm.karras_sigmas(1)
    with pytest.raises(ValueError, match="at least 1"):
        edm.sampling_sigmas(0)


def test_discriminator_levels():
    sigmas, p = edm.lognormal_levels(1000, -1.0, 1.0)
    assert len(sigmas) == len(p) == 998
    np.testing.assert_allclose(p.sum(), 1, atol=1e-6)
    law = NormalDist(-1, 1)
    edges = np.log(edm.karras_sigmas(1000)[1:].astype(np.float64))
    mass = np.diff([law.cdf(x) for x in edges])
    np.testing.assert_allclose(p, mass / mass.sum(), atol=1e-7)
    for quantile, sigma in ((0.05, 0.071), (0.5, 0.369), (0.95, 1.93)):
        found = np.searchsorted(np.cumsum(p), quantile)
        assert sigmas[found - 1] <= sigma <= sigmas[found + 1]


def test_only_the_magnitude_of_p_std_matters():
    for a, b in zip(edm.lognormal_levels(1000, -1.0, -1.0), edm.lognormal_levels(1000, -1.0, 1.0), strict=True):
        np.testing.assert_array_equal(a, b)


def test_logit_normal_is_lognormal_in_sigma():
    """LADD's logit-normal(1, 1) time t, sigma = t / (1 - t), is the lognormal with P_mean = P_std = 1."""
    sigmas, p = edm.lognormal_levels(1000, 1.0, 1.0)
    t = 1 / (1 + np.exp(-np.random.default_rng(0).normal(1, 1, 20_000)))
    draws = t / (1 - t)
    for n in (400, 500, 600):
        np.testing.assert_allclose(p[:n].sum(), np.mean(draws < sigmas[n]), atol=0.015)


def test_draws_follow_the_law():
    sigmas, p = np.array([0.5, 2.0, 9.0]), np.array([0.7, 0.1, 0.2])
    draws = np.asarray(edm.draw_levels(jax.random.key(0), sigmas, p, (20_000,)))
    np.testing.assert_allclose([np.mean(draws == s) for s in sigmas], p, atol=0.015)
    uniform = np.asarray(edm.draw_levels(jax.random.key(0), sigmas, None, (20_000,)))
    np.testing.assert_allclose([np.mean(uniform == s) for s in sigmas], 1 / 3, atol=0.015)
    log = np.log(edm.draw_lognormal(jax.random.key(1), 1.0, 1.6, (20_000,)))
    np.testing.assert_allclose([log.mean(), log.std()], [1.0, 1.6], atol=0.04)


SIGMA = np.array([0.05, 0.7, 2.269, 70.54], np.float32)


def test_true_velocity_denoises():
    x0, epsilon = noise(0, 4, 2, 3, 3, 4), noise(1, 4, 2, 3, 3, 4)
    x = edm.add_noise(x0, epsilon, SIGMA)
    found = edm.denoised(edm.velocity_target(x0, epsilon, SIGMA), x, SIGMA)
    np.testing.assert_allclose(found, x0, atol=1e-5)


def test_velocity_error_is_the_weighted_denoising_error():
    x0, epsilon, raw = (noise(n, 4, 2, 3, 3, 4) for n in range(3))
    x = edm.add_noise(x0, epsilon, SIGMA)
    denoising = np.sum((np.asarray(edm.denoised(raw, x, SIGMA), np.float64) - x0) ** 2, axis=(1, 2, 3, 4))
    velocity = np.sum((raw - np.asarray(edm.velocity_target(x0, epsilon, SIGMA), np.float64)) ** 2, axis=(1, 2, 3, 4))
    np.testing.assert_allclose((SIGMA**2 + 1) / SIGMA**2 * denoising, velocity, rtol=1e-4)


def test_condition_enters_unscaled_on_every_frame():
    x, condition = noise(0, 2, 3, 4, 5, 4), noise(1, 2, 4, 5, 4)
    found = edm.model_input(x, condition, SIGMA[:2])
    np.testing.assert_array_equal(found[..., 4:], np.repeat(condition[:, None], 3, axis=1))
    np.testing.assert_allclose(found[..., :4], x / np.sqrt(SIGMA[:2] ** 2 + 1)[:, None, None, None, None], rtol=1e-6)
