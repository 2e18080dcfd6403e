"""Training steps: the inputs of every network, and gradients against losses composed independently.

Most tests run the methods on plain functions in place of the networks (`Plain`), which record their inputs.
"""

import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfv_jax import config as configs
from sfv_jax.diffusion import edm, losses
from sfv_jax.methods import adversarial, sfv, teacher
from sfv_jax.models.discriminator import DiscriminatorConfig
from tests.conftest import noise

C, D = 3, 5  # channels of latents, width of embeddings


class Plain:
    """Stand-in for `Networks` with one hidden layer each; `calls[name]` lists the inputs of all calls."""

    discriminator = DiscriminatorConfig(feature_channels=(8,))  # two heads

    def __init__(self):
        self.calls = {"generator": [], "backbone": []}
        self.params = {
            "generator": {"w": noise(0, 2 * C, C), "c": noise(1, D + 4, C)},
            "backbone": {"w": 0.5 * noise(2, 2 * C, 8), "c": noise(3, D + 4, 8)},
            "heads": {"a": noise(4, 8, 6), "s": noise(5, 6), "t": noise(6, 6), "c": noise(7, D + 1)},
        }

    def run(self, name: str, params, x, c_noise, context, ids):
        c = jnp.concatenate([context, c_noise[:, None], ids / 100], axis=-1) @ params["c"]
        out = jnp.tanh(x @ params["w"] + c[:, None, None, None])
        jax.debug.callback(lambda *seen: self.calls[name].append(list(map(np.asarray, seen))), x, c_noise, context, ids)
        return out

    def generator(self, params):
        return lambda *inputs: self.run("generator", params, *inputs)

    def encode(self, params):
        return lambda *inputs: [self.run("backbone", params, *inputs)]

    def heads(self, params):
        def heads(features, embed, c_noise):
            condition = jnp.tanh(jnp.concatenate([embed, c_noise[:, None]], axis=-1) @ params["c"])
            hidden = [jnp.tanh(x @ params["a"]) for x in features]
            return [x @ params[k] + condition[:, None, None, None] for x, k in zip(hidden, "st", strict=True)]

        return heads

    def init_heads(self, key):
        return jax.tree.map(jnp.asarray, self.params["heads"])

    def backbone_params(self, unet_params):
        return self.params["backbone"]


class Silent(Plain):
    """`Plain` without a record of its inputs, so that it can be partitioned, and compiles sooner."""

    def run(self, name, params, x, c_noise, context, ids):
        c = jnp.concatenate([context, c_noise[:, None], ids / 100], axis=-1) @ params["c"]
        return jnp.tanh(x @ params["w"] + c[:, None, None, None])


def make_batch(size: int, seed: int = 10) -> dict:
    ids = np.tile(np.array([6, 127, 0.02], np.float32), (size, 1)) * np.arange(1, size + 1, dtype=np.float32)[:, None]
    shapes = dict(latents=(2, 4, 4, C), cond_latent=(4, 4, C), image_embed=(D,))
    return {k: noise(seed + n, size, *shape) for n, (k, shape) in enumerate(shapes.items())} | {"ids": ids}


def sfv_config(**changes):
    config = configs.printed()
    config.accumulation_steps = 1
    config.sfv.update(changes)
    return config


def wide(sigma: np.ndarray) -> np.ndarray:
    return np.asarray(sigma)[:, None, None, None, None]


def unscaled(call: list) -> tuple[np.ndarray, np.ndarray]:
    """Returns (sigma [b], latents before c_in) from the inputs of one call of a network."""
    sigma = np.exp(4 * call[1].astype(np.float64)).astype(np.float32)
    return sigma, call[0][..., :C] * np.sqrt(wide(sigma) ** 2 + 1)


class Trace:
    """One call of the SF-V gradients on plain networks, and the random draws recovered from it."""

    def __init__(self, method=sfv, **changes):
        self.config, self.networks, self.batch = sfv_config(**changes), Plain(), make_batch(32)
        self.heads, self.frozen = self.networks.params["heads"], {"backbone": self.networks.params["backbone"]}
        gradients = method.make_gradients(self.networks, self.config)
        self.generator = self.networks.params["generator"]
        self.g_grads, self.d_grads, self.metrics = gradients(
            self.generator, self.heads, self.frozen, self.batch, jax.random.key(0)
        )
        jax.effects_barrier()
        self.calls = dict(self.networks.calls)
        (call,) = self.calls["generator"]
        self.sigma, self.x_t = unscaled(call)
        # Backbone calls, real first: only in that one is the noise added to x0 standard normal times sigma.
        noised = [unscaled(call) for call in self.calls["backbone"]]
        self.real, *self.perturbed, self.fake = sorted(noised, key=lambda pair: np.std(self.noise_of(*pair)))
        assert len(self.perturbed) == (self.config.sfv.r1_form == "perturbation")

    def noise_of(self, sigma: np.ndarray, x: np.ndarray) -> np.ndarray:
        return (x - self.batch["latents"]) / wide(sigma)

    def condition(self) -> tuple:
        return self.batch["image_embed"], self.batch["ids"]

    def denoise(self, generator) -> jax.Array:
        """Computes Eq. 2 and 3, written out."""
        s = wide(self.sigma)
        x = jnp.concatenate([self.x_t / np.sqrt(s**2 + 1), self.frames()], axis=-1)
        raw = self.networks.generator(generator)(x, np.log(self.sigma) / 4, *self.condition())
        return self.x_t / (s**2 + 1) - s / np.sqrt(s**2 + 1) * raw

    def frames(self) -> np.ndarray:
        return np.repeat(self.batch["cond_latent"][:, None], 2, axis=1)

    def features(self, sigma: np.ndarray, x) -> list:
        """Returns the features of the only level, once for each of the two heads."""
        x = jnp.concatenate([x / np.sqrt(wide(sigma) ** 2 + 1), self.frames()], axis=-1)
        return 2 * self.networks.encode(self.frozen["backbone"])(x, np.log(sigma) / 4, *self.condition())

    def logits(self, heads, features, sigma: np.ndarray) -> list:
        return self.networks.heads(heads)(features, self.batch["image_embed"], np.log(sigma) / 4)


@pytest.fixture(scope="module", params=[True, False], ids=["shared noise", "separate noise"])
def trace(request):
    return Trace(shared_noise=request.param, r1_weight=0.3)


def assert_trees_close(found, expected, rtol=2e-4):
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale), found, expected)


def test_generator_trains_at_three_levels(trace):
    levels = [2.2691163, 70.5408415, 700]
    nearest = np.argmin(np.abs(np.log(trace.sigma)[:, None] - np.log(levels)), axis=1)
    np.testing.assert_allclose(trace.sigma, np.take(levels, nearest), rtol=1e-5)
    assert set(nearest) == {0, 1, 2}
    np.testing.assert_allclose(np.std(trace.noise_of(trace.sigma, trace.x_t)), 1, atol=0.05)


def test_discriminator_sees_scaled_renoised_latents(trace):
    sigma, x = trace.real
    levels, _ = edm.lognormal_levels(1000, -1.0, 1.0)
    assert np.abs(np.log(sigma)[:, None] - np.log(levels)).min(axis=1).max() < 1e-4
    assert len(set(sigma)) > 16 and 0.2 < np.median(sigma) < 0.7
    # Had c_in or c_noise belonged to another level, the noise would not be of unit size in every sample.
    np.testing.assert_allclose(np.std(trace.noise_of(sigma, x), axis=(1, 2, 3, 4)), 1, atol=0.3)


def test_every_network_gets_the_conditions_as_they_are(trace):
    for call in trace.calls["generator"] + trace.calls["backbone"]:
        np.testing.assert_array_equal(call[0][..., C:], trace.frames())
        np.testing.assert_array_equal(call[2], trace.batch["image_embed"])
        np.testing.assert_array_equal(call[3], trace.batch["ids"])


def test_real_and_fake_share_level_and_noise(trace):
    (sigma_r, real), (sigma_f, fake) = trace.real, trace.fake
    noise_f = (fake - trace.denoise(trace.generator)) / wide(sigma_f)
    np.testing.assert_allclose(np.std(noise_f), 1, atol=0.05)
    same_noise = np.isclose(noise_f, trace.noise_of(sigma_r, real), atol=5e-3).mean()
    if trace.config.sfv.shared_noise:
        np.testing.assert_array_equal(sigma_r, sigma_f)
        assert same_noise > 0.99
    else:
        assert np.mean(sigma_r == sigma_f) < 0.1 and same_noise < 0.05


def test_generator_gradient(trace):
    """Eq. 10 composed from Eq. 2, 8 and 9, with the noise that was drawn."""
    x0, (sigma, fake) = trace.batch["latents"], trace.fake
    added = fake - trace.denoise(trace.generator)  # s' eps'
    c = 0.00054 * np.sqrt(x0[0].size)

    def loss(generator):
        x = trace.denoise(generator)
        scores = trace.logits(trace.heads, trace.features(sigma, x + added), sigma)
        adversarial = sum(jnp.mean(s) for s in scores) / 2
        reconstruction = jnp.mean(jnp.sqrt(jnp.sum((x - x0) ** 2, axis=(1, 2, 3, 4)) + c**2) - c)
        return adversarial + 0.1 * reconstruction, (adversarial, reconstruction)

    expected, (adversarial, reconstruction) = jax.grad(loss, has_aux=True)(trace.generator)
    assert_trees_close(trace.g_grads, expected)
    np.testing.assert_allclose(trace.metrics["loss/adversarial"], adversarial, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(trace.metrics["loss/reconstruction"], reconstruction, rtol=1e-4)


def test_heads_gradient(trace):
    """Eq. 11 with fakes and features held fixed; R1 stops at the features."""
    features = [trace.features(*pair) for pair in (trace.real, trace.fake)]

    def loss(heads):
        real, fake = (trace.logits(heads, f, s) for f, (s, _) in zip(features, (trace.real, trace.fake), strict=True))
        hinge = sum(jnp.mean(jnp.maximum(0, 1 + r)) for r in real) / 2
        hinge += sum(jnp.mean(jnp.maximum(0, 1 - f)) for f in fake) / 2
        r1 = 0
        for n in range(2):
            g = jax.grad(lambda f, n=n: jnp.sum(trace.logits(heads, [f, f], trace.real[0])[n]))(features[0][0])
            r1 += jnp.mean(jnp.sum(g**2, axis=(1, 2, 3, 4))) / 2
        return hinge + 0.3 * r1, (hinge, r1)

    expected, (hinge, r1) = jax.grad(loss, has_aux=True)(trace.heads)
    assert_trees_close(trace.d_grads, expected)
    np.testing.assert_allclose(trace.metrics["loss/hinge"], hinge, rtol=1e-4)
    np.testing.assert_allclose(trace.metrics["loss/r1"], r1, rtol=1e-4)


def test_relativistic_pairs_and_perturbation():
    """R3GAN's loss with our sign, and APT's R1: perturbed clean latents, at the level and noise of the real call."""
    trace = Trace(
        gan_loss="relativistic", r1_form="perturbation", r1_weight=0.3, perturbation_std=0.1, recon_weight=0.0
    )
    (sigma, real), (sigma_p, perturbed) = trace.real, trace.perturbed[0]
    np.testing.assert_array_equal(sigma, sigma_p)
    np.testing.assert_allclose(np.std(perturbed - real), 0.1, rtol=0.05)
    assert abs(np.corrcoef((perturbed - real).ravel(), trace.noise_of(sigma, real).ravel())[0, 1]) < 0.05
    added = trace.fake[1] - trace.denoise(trace.generator)
    features = [trace.features(sigma, x) for x in (real, perturbed, trace.fake[1])]

    def adversarial(generator):
        fake = trace.logits(trace.heads, trace.features(sigma, trace.denoise(generator) + added), sigma)
        pairs = zip(trace.logits(trace.heads, features[0], sigma), fake, strict=True)
        return sum(jnp.mean(jnp.log1p(jnp.exp(f - r))) for r, f in pairs) / 2

    def discriminator(heads):
        real, perturbed, fake = (trace.logits(heads, f, sigma) for f in features)
        loss = sum(jnp.mean(jnp.log1p(jnp.exp(r - f))) for r, f in zip(real, fake, strict=True)) / 2
        return loss + 0.3 * sum(jnp.mean((r - p) ** 2) for r, p in zip(real, perturbed, strict=True)) / 2

    assert_trees_close(trace.g_grads, jax.grad(adversarial)(trace.generator))
    assert_trees_close(trace.d_grads, jax.grad(discriminator)(trace.heads))
    np.testing.assert_allclose(trace.metrics["loss/adversarial"], adversarial(trace.generator), rtol=1e-4)


def test_r2_is_r1_on_fakes():
    """R2 equals R1 computed on the fake."""
    trace = Trace(r1_weight=0.0, r2_weight=0.3)
    sigma, features = trace.fake[0], trace.features(*trace.fake)
    expected = losses.r1_on_features(lambda f: trace.logits(trace.heads, f, sigma), features)
    np.testing.assert_allclose(trace.metrics["loss/r2"], expected, rtol=1e-4)
    assert trace.metrics["loss/r1"] == 0
    without = Trace(r1_weight=0.0)
    assert not np.allclose(trace.d_grads["a"], without.d_grads["a"], rtol=1e-3)
    assert_trees_close(trace.g_grads, without.g_grads)


def test_r2_by_perturbation_moves_clean_fakes():
    trace = Trace(r1_weight=0.0, r2_weight=0.3, r1_form="perturbation", perturbation_std=0.1)
    (sigma, one), (_, other) = trace.perturbed[0], trace.fake
    np.testing.assert_allclose(np.std(one - other), 0.1, rtol=0.05)
    pairs = zip(*(trace.logits(trace.heads, trace.features(sigma, x), sigma) for x in (one, other)), strict=True)
    expected = sum(jnp.mean((a - b) ** 2) for a, b in pairs) / 2
    np.testing.assert_allclose(trace.metrics["loss/r2"], expected, rtol=1e-3)


def test_motion_is_that_of_one_step_samples(trace):
    """Motion is summed over samples from the highest level, since from lower levels still generators copy motion."""
    top = trace.sigma > 100
    assert 0 < top.sum() < len(top)
    top = top & (trace.sigma > 600)
    for name, x in (("fake", np.asarray(trace.denoise(trace.generator))), ("real", trace.batch["latents"])):
        energy = np.mean((x[top, 1:] - x[top, :-1]) ** 2) * top.mean()
        np.testing.assert_allclose(trace.metrics[f"motion/{name}"], energy, rtol=1e-3)


def test_gradient_ratio_is_that_of_the_weighted_parts(trace):
    name = "ratio/adv_to_rec_gradient"
    other = Trace(shared_noise=trace.config.sfv.shared_noise, recon_weight=0.2, adv_weight=3.0)
    np.testing.assert_allclose(other.metrics[name], 1.5 * trace.metrics[name], rtol=1e-4)
    assert np.isnan(Trace(shared_noise=trace.config.sfv.shared_noise, recon_weight=0.0).metrics[name])


def plain_step(config, steps: int = 1) -> list[dict]:
    """Returns the states before and after each of `steps` SF-V steps on plain networks."""
    networks = Silent()
    state, frozen = sfv.init_state(networks, config, networks.params["generator"])
    step, states = sfv.make_train_step(networks, config), [state]
    for _ in range(steps):  # not jitted, on arrays of the size of `Trace`, whose operations are compiled already
        states.append(step(states[-1], frozen, make_batch(32))[0])
    return states


def moved(before: dict, after: dict, name: str) -> bool:
    pairs = zip(jax.tree.leaves(before[name]), jax.tree.leaves(after[name]), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_step_counts_averages_and_draws_anew():
    first, second, third = plain_step(sfv_config(), 2)
    assert [int(s["step"]) for s in (first, second, third)] == [0, 1, 2]
    expected = jax.tree.map(lambda e, p: 0.95 * e + 0.05 * p, second["ema"], third["generator"])
    assert_trees_close(third["ema"], expected, rtol=1e-6)
    again = plain_step(sfv_config())[1]
    jax.tree.map(np.testing.assert_array_equal, again, second)
    config = sfv_config()
    config.seed = 1
    assert moved(second, plain_step(config)[1], "generator")


@pytest.mark.slow
def test_a_waiting_generator_runs_nothing_backward():
    networks, config, backwards = Plain(), sfv_config(generator_every=2), []

    @jax.custom_vjp
    def tap(x):
        return x

    def backward(_, gradient):
        jax.debug.callback(lambda: backwards.append(1))
        return (gradient,)

    tap.defvjp(lambda x: (x, None), backward)
    networks.generator = lambda params: lambda *inputs: tap(networks.run("generator", params, *inputs))
    params = networks.params
    gradients = jax.jit(sfv.make_gradients(networks, config))

    def run(step):
        found = gradients(params["generator"], params["heads"], params, make_batch(4), jax.random.key(0), step)
        jax.effects_barrier()
        return found

    g_grads, d_grads, metrics = run(1)
    assert not backwards and not any(np.any(x) for x in jax.tree.leaves(g_grads))
    assert np.isnan(metrics["ratio/adv_to_rec_gradient"]) and np.isfinite(metrics["loss/adversarial"])
    learned, same_d_grads, _ = run(2)
    assert len(backwards) == 1 and all(np.any(x) for x in jax.tree.leaves(learned))
    assert_trees_close(d_grads, same_d_grads)


@pytest.mark.parametrize(
    "optimizer",
    [configs.sm3(1e-3), configs.adamw(1e-3, weight_decay=0.5), configs.muon(1e-3, weight_decay=0.5)],
    ids=["sm3", "adamw", "muon"],
)
def test_frozen_parameters_stay_bit_for_bit(optimizer):
    config = sfv_config()
    config.generator_optimizer, config.trainable, config.ema_decay = optimizer, "^w", 0.37
    first, _, third = plain_step(config, 2)
    for name in ("generator", "ema"):
        np.testing.assert_array_equal(first[name]["c"], third[name]["c"])
        assert not np.array_equal(first[name]["w"], third[name]["w"])
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(third["opt_g"])]
    assert any("['w']" in p for p in paths) and not any("['c']" in p for p in paths)
    # Trained parameters have the same gradient as without frozen ones.
    config.generator_optimizer, config.trainable = configs.sm3(1e-3), "all"
    free = plain_step(config)[1]["opt_g"][1].momentum["w"]
    config.trainable = "^w"
    np.testing.assert_allclose(plain_step(config)[1]["opt_g"][1].momentum["w"], free, rtol=1e-4)


MUTATIONS = {  # module, original text, replacement
    "hinge after averaging": (
        "adversarial",
        "loss_d(real, fake_)",
        "loss_d([jnp.mean(x) for x in real], [jnp.mean(x) for x in fake_])",
    ),
    "R1 through the backbone": (
        "adversarial",
        "losses.r1_on_features(score, features)",
        "losses.r1_on_features(lambda x: score(encode(x[0], sigma, noise)), [x])",
    ),
    "latents scaled twice": ("adversarial", 'x0 = batch["latents"]', 'x0 = batch["latents"] * 0.18215'),
    "real made of noise": ("adversarial", "encode(x0, sigma_r, noise_r)", "encode(noise_r, sigma_r, noise_r)"),
    "velocity taken for x0": (
        "adversarial",
        "return edm.denoise(networks.generator(tree.merge(generator, part)), x_t, sigma, batch)",
        "return networks.generator(tree.merge(generator, part))(edm.model_input(x_t, batch['cond_latent'], sigma), "
        "edm.scalings(sigma)[3], batch['image_embed'], batch['ids'])",
    ),
    "one sigma' for the batch": (
        "sfv",
        "edm.draw_levels(level, d_sigmas, d_probabilities, shape[:1])",
        "jax.numpy.repeat(edm.draw_levels(level, d_sigmas, d_probabilities, (1,)), shape[0])",
    ),
    "EMA of the old generator": (
        "common",
        "optim.ema_update(tree.subtree(ema, grads), part,",
        "optim.ema_update(ema, generator,",
    ),
    "frozen weights trained": (
        "adversarial",
        "part = optim.trainable(generator, config.trainable)",
        "part = generator",
    ),
}
CHECKS = [test_discriminator_sees_scaled_renoised_latents, test_generator_gradient, test_heads_gradient]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_noticed(monkeypatch, mutation):
    name, old, new = MUTATIONS[mutation]
    module = {"adversarial": adversarial, "sfv": sfv, "common": sys.modules["sfv_jax.methods.common"]}[name]
    source = Path(module.__file__).read_text()
    assert old in source, f"write the mutation {mutation!r} anew: the code has changed"
    mutant = types.ModuleType(mutation)
    exec(compile(source.replace(old, new), mutation, "exec"), mutant.__dict__)  # noqa: S102
    with pytest.raises((AssertionError, ValueError, TypeError)):
        if mutation in ("EMA of the old generator", "frozen weights trained"):
            if name == "common":
                monkeypatch.setattr(adversarial, "update_generator", mutant.update_generator)
            else:
                monkeypatch.setattr(sfv, "adversarial", mutant)
            test_step_counts_averages_and_draws_anew()
            test_frozen_parameters_stay_bit_for_bit(configs.sm3(1e-3))
        elif name == "adversarial":
            monkeypatch.setattr(sfv, "adversarial", mutant)
            check_all(sfv)
        else:
            check_all(mutant)


def check_all(module) -> None:
    trace = Trace(module, r1_weight=0.3)
    for check in CHECKS:
        check(trace)


def test_no_mutation_is_no_mistake():
    copy = types.ModuleType("copy")
    exec(compile(Path(sfv.__file__).read_text(), "copy", "exec"), copy.__dict__)  # noqa: S102
    check_all(copy)


def test_generator_can_wait_for_the_discriminator():
    first, second, third = plain_step(sfv_config(generator_every=2), 2)
    assert all(moved(first, second, k) for k in ("generator", "ema", "opt_g", "heads"))
    assert moved(second, third, "heads")
    assert not any(moved(second, third, k) for k in ("generator", "ema", "opt_g"))


# ---- teacher ----


def test_teacher_loss_is_the_weighted_denoising_error():
    """It equals (sigma^2 + 1) / sigma^2 ||D - x0||^2 of the recorded input, in float64."""
    networks, config, batch = Plain(), configs.teacher(), make_batch(32)
    config.teacher.cond_drop = 0.0
    state, frozen = teacher.init_state(networks, config, networks.params["generator"])
    after, metrics = teacher.make_train_step(networks, config)(state, frozen, batch)
    jax.effects_barrier()
    (call,) = networks.calls["generator"]
    sigma, x = (v.astype(np.float64) for v in unscaled(call))
    noise_std = np.std((x - batch["latents"]) / wide(sigma), axis=(1, 2, 3, 4))
    np.testing.assert_allclose(noise_std, 1, atol=0.3)
    assert 0.3 < np.median(np.log(sigma)) < 1.7 and 1.0 < np.std(np.log(sigma)) < 2.3
    raw = np.asarray(networks.generator(networks.params["generator"])(*call), np.float64)
    s = wide(sigma)
    denoised = x / (s**2 + 1) - s / np.sqrt(s**2 + 1) * raw
    expected = np.mean((s**2 + 1) / s**2 * (denoised - batch["latents"]) ** 2)
    np.testing.assert_allclose(metrics["loss/denoising"], expected, rtol=1e-3)
    # The average follows closely at first: decay (1 + step) / (10 + step).
    expected = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, state["ema"], after["generator"])
    assert_trees_close(after["ema"], expected, rtol=1e-6)


def test_conditions_are_dropped_one_by_one_and_together():
    batch = {k: np.ones_like(v[:1]).repeat(20_000, axis=0) for k, v in make_batch(1).items()}
    dropped = teacher.drop_conditions(batch, jax.random.key(0), 0.1)
    embed = np.asarray(dropped["image_embed"]).max(axis=1) == 0
    latent = np.asarray(dropped["cond_latent"]).max(axis=(1, 2, 3)) == 0
    for share in (embed & ~latent, embed & latent, latent & ~embed):
        np.testing.assert_allclose(share.mean(), 0.1, atol=0.01)
    # Nothing in between, and nothing else touched.
    assert np.all(np.asarray(dropped["image_embed"])[~embed] == 1)
    assert np.all(np.asarray(dropped["cond_latent"])[~latent] == 1)
    np.testing.assert_array_equal(dropped["latents"], batch["latents"])
    np.testing.assert_array_equal(dropped["ids"], batch["ids"])
