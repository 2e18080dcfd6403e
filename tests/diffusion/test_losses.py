"""Losses: signs, reductions, and the gradient penalty against finite differences and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfv_jax.diffusion import losses
from tests.conftest import noise


def full(value: float, *shape: int) -> jax.Array:
    return jnp.full(shape or (2, 3, 4, 4), value)


SCORES = [(-1, 1, 0), (-5, 5, 0), (0, 0, 2), (1, -1, 4), (1, 1, 2), (-1, -1, 2)]


@pytest.mark.parametrize(("real", "fake", "loss"), SCORES)
def test_real_goes_down_and_fake_up(real, fake, loss):
    assert losses.hinge_discriminator([full(real)], [full(fake)]) == loss


def test_hinge_is_per_position():
    logits = jnp.tile(jnp.array([-3.0, 1.0]), (2, 3, 4, 2))
    assert losses.hinge_discriminator([logits], [full(1.0)]) == 1.0  # of the mean logit, -1, it would be 0
    gradient = jax.grad(lambda x: losses.hinge_discriminator([x], [full(1.0)]))(logits)
    np.testing.assert_allclose(gradient, (logits == 1.0) / logits.size)


def test_heads_count_alike_whatever_their_size():
    large, small = full(1.0, 2, 3, 8, 8), full(-1.0, 2, 3, 1, 1)
    assert losses.hinge_discriminator([large, small], [large, large]) == 1.0
    assert losses.adversarial_generator([large, small]) == 0.0


def test_generator_moves_to_where_real_samples_are():
    """After one discriminator step from zero, one generator step moves fakes towards real: both signs agree."""
    real, fake = full(3.0, 2, 1, 1, 1), full(-3.0, 2, 1, 1, 1)
    score = lambda w, x: [w * x]  # noqa: E731
    gradient = jax.grad(lambda w: losses.hinge_discriminator(score(w, real), score(w, fake)))(0.0)
    w = 0.0 - 0.1 * gradient
    assert score(w, real)[0].max() < score(w, fake)[0].min()
    moved = fake - jax.grad(lambda x: losses.adversarial_generator(score(w, x)))(fake)
    assert jnp.all(jnp.abs(moved - real) < jnp.abs(fake - real))


@pytest.fixture(scope="module")
def two_heads():
    """Returns features of two levels, weights of one small head on each, and the heads in numpy-like code."""
    features = [noise(0, 2, 2, 3, 3, 4), noise(1, 2, 2, 2, 2, 6)]
    weights = [(noise(2, 4, 5), noise(3, 5)), (noise(4, 6, 5), noise(5, 5))]

    def heads(weights, features, lib=jnp):
        return [lib.tanh(f @ w) @ v for f, (w, v) in zip(features, weights, strict=True)]

    return features, weights, heads


def test_r1_is_the_squared_gradient(two_heads):
    features, weights, heads = two_heads
    expected, h = [], 1e-5
    for n, f in enumerate(features):
        gradient = np.zeros(f.shape)
        for index in np.ndindex(f.shape):
            ends = []
            for sign in (1, -1):
                moved = [x.astype(np.float64) for x in features]
                moved[n][index] += sign * h
                ends.append(heads(weights, moved, np)[n].sum())
            gradient[index] = (ends[0] - ends[1]) / (2 * h)
        expected.append(np.sum(gradient**2) / len(f))
    found = losses.r1_on_features(lambda f: heads(weights, f), features)
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)


def test_r1_and_its_gradient_are_torchs(two_heads):
    torch = pytest.importorskip("torch")
    features, weights, heads = two_heads
    value, gradient = jax.value_and_grad(lambda w: losses.r1_on_features(lambda f: heads(w, f), features))(weights)
    torch_weights = [tuple(torch.tensor(x, requires_grad=True) for x in pair) for pair in weights]
    torch_features = [torch.tensor(f, requires_grad=True) for f in features]
    penalties = []
    for n, logits in enumerate(heads(torch_weights, torch_features, torch)):
        (g,) = torch.autograd.grad(logits.sum(), torch_features[n], create_graph=True)
        penalties.append(g.square().sum() / len(g))
    expected = sum(penalties) / len(penalties)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for found, reference in zip(jax.tree.leaves(gradient), [x for pair in torch_weights for x in pair], strict=True):
        np.testing.assert_allclose(found, reference.grad.numpy(), rtol=1e-4, atol=1e-5)


def test_r1_of_features_two_heads_share(two_heads):
    """Gradients of two heads on the same features are penalized separately, not their sum."""
    features, weights, heads = two_heads
    one = losses.r1_on_features(lambda f: heads(weights[:1], f), features[:1])

    def opposed_heads(f):
        return [heads(weights[:1], f[:1])[0], -heads(weights[:1], f[1:])[0]]

    opposed = losses.r1_on_features(opposed_heads, [features[0], features[0]])
    np.testing.assert_allclose(opposed, one, rtol=1e-6)


def test_r1_is_a_mean_over_samples(two_heads):
    features, weights, heads = two_heads
    r1 = lambda features: losses.r1_on_features(lambda f: heads(weights, f), features)  # noqa: E731
    alone = [r1([f[n : n + 1] for f in features]) for n in range(2)]
    np.testing.assert_allclose(r1(features), np.mean(alone), rtol=1e-5)


@pytest.mark.parametrize("kind", ["relativistic", "perturbation"])
def test_new_losses_and_their_gradients_are_torchs(kind):
    torch = pytest.importorskip("torch")
    a, b = ([noise(n, 2, 3, 4, 4), noise(n + 1, 2, 3, 2, 2)] for n in (0, 2))
    if kind == "relativistic":  # -log sigmoid(D(fake) - D(real)): fake is to score higher
        ours, theirs = losses.relativistic_discriminator, lambda r, f: -torch.nn.functional.logsigmoid(f - r).mean()
        swapped = losses.relativistic_generator
    else:
        ours, theirs = losses.perturbation_penalty, torch.nn.functional.mse_loss
        swapped = ours
    value, gradients = jax.value_and_grad(ours, argnums=(0, 1))(a, b)
    tensors = [[torch.tensor(x, requires_grad=True) for x in maps] for maps in (a, b)]
    expected = sum(theirs(x, y) for x, y in zip(*tensors, strict=True)) / 2
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for found, reference in zip(jax.tree.leaves(gradients), [x for maps in tensors for x in maps], strict=True):
        np.testing.assert_allclose(found, reference.grad.numpy(), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(swapped(b, a), value, rtol=1e-6)


def test_relativistic_signs():
    """The discriminator pushes real down and fake up; the generator pulls fakes down."""
    real, fake = [full(0.0)], [full(0.0)]
    real_slope, fake_slope = jax.grad(losses.relativistic_discriminator, argnums=(0, 1))(real, fake)
    assert jnp.all(real_slope[0] > 0) and jnp.all(fake_slope[0] < 0)
    assert jnp.all(jax.grad(losses.relativistic_generator, argnums=1)(real, fake)[0] > 0)
    for kind in ("hinge", "relativistic"):
        live = [losses.live_share(full(-x), full(x), kind) for x in (-20.0, 0.0, 20.0)]
        np.testing.assert_allclose(live, [1.0, 1.0 if kind == "hinge" else 0.5, 0.0], atol=1e-6)


def test_pseudo_huber():
    x, target = noise(0, 3, 2, 4, 4, 4), noise(1, 3, 2, 4, 4, 4)
    square = np.sum((x - target).astype(np.float64) ** 2, axis=(1, 2, 3, 4))
    np.testing.assert_allclose(losses.pseudo_huber(x, target, c=2.0), np.mean(np.sqrt(square + 4) - 2), rtol=1e-6)
    c = 0.00054 * np.sqrt(2 * 4 * 4 * 4)
    np.testing.assert_allclose(losses.pseudo_huber(x, target), losses.pseudo_huber(x, target, c=c), rtol=1e-6)
    elements = np.mean(np.sqrt((x - target).astype(np.float64) ** 2 + 0.00054**2) - 0.00054)
    np.testing.assert_allclose(losses.pseudo_huber(x, target, reduction="element"), elements, rtol=1e-5)
    assert losses.pseudo_huber(x, x) == 0 and jnp.all(jax.grad(losses.pseudo_huber)(x, x) == 0)


def test_the_whole_video_norm_has_the_larger_gradient():
    x = noise(0, 2, 2, 4, 4, 4)
    target = x + np.sign(noise(1, *x.shape))  # errors of one size
    video, element = (
        jax.grad(lambda x, reduction=r: losses.pseudo_huber(x, target, c=0.0, reduction=reduction))(x)
        for r in ("video", "element")
    )
    np.testing.assert_allclose(video / element, np.sqrt(2 * 4 * 4 * 4), rtol=1e-5)


def test_rms_is_the_whole_video_norm_over_the_root_of_its_size():
    x, target = noise(0, 3, 2, 4, 4, 4), noise(1, 3, 2, 4, 4, 4)
    root = np.sqrt(2 * 4 * 4 * 4)
    found, expected = losses.pseudo_huber(x, target, reduction="rms"), losses.pseudo_huber(x, target) / root
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    given = losses.pseudo_huber(x, target, c=0.5, reduction="rms")
    np.testing.assert_allclose(given, losses.pseudo_huber(x, target, c=0.5 * root) / root, rtol=1e-5)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="'video', 'rms' or 'element'"):
        losses.pseudo_huber(full(0.0), full(0.0), reduction="frame")


def test_denoising_error_is_fp32():
    raw = jnp.asarray(noise(0, 2, 64), jnp.bfloat16)
    found = losses.edm(raw, jnp.asarray(noise(1, 2, 64)))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.mean((np.asarray(raw, np.float64) - noise(1, 2, 64)) ** 2), rtol=1e-6)
