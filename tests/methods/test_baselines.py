"""AnimateLCM, UFOGen and LADD: their draws, and losses and gradients against float64 implementations in torch.

The methods run on plain functions in place of the networks (`test_methods.Plain`), which record their inputs. The
implementations in torch take the random draws from these inputs and follow the papers' formulas.
"""

import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sfv_jax import config as configs
from sfv_jax.methods import METHODS, adversarial, animatelcm, ladd, sfv, ufogen
from sfv_jax.runtime import sharding
from tests.conftest import noise
from tests.methods.test_methods import C, D, Plain, Silent, assert_trees_close, moved, unscaled, wide

torch = pytest.importorskip("torch")
SIZE, FRAMES = 48, 3


def make_batch(size: int = SIZE) -> dict:
    shapes = dict(latents=(FRAMES, 4, 4, C), cond_latent=(4, 4, C), image_embed=(D,), ids=(3,))
    return {k: noise(20 + n, size, *shape) for n, (k, shape) in enumerate(shapes.items())}


def make_config(method: str, **changes):
    config = getattr(configs, method)()
    config.accumulation_steps = 1
    config[method].update(changes)
    return config


def karras(n: int) -> np.ndarray:
    """Returns the levels of Eq. 5, float64, increasing."""
    low, high = 0.002 ** (1 / 7), 700 ** (1 / 7)
    return (low + np.arange(n) / (n - 1) * (high - low)) ** 7


def index_of(sigma: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Returns the indices of `sigma` in `levels`; fails if a value is not a level."""
    places = np.abs(np.log(sigma[:, None]) - np.log(levels)).argmin(axis=1)
    np.testing.assert_allclose(sigma, levels[places], rtol=2e-5)
    return places


def double(x):
    return jax.tree.map(lambda v: torch.tensor(np.asarray(v, np.float64)), x)


def network(params: dict, x, sigma: np.ndarray, batch: dict, keep: float = 1.0):
    """Computes `Plain.run` in torch for unscaled latents `x`; with `keep` 0, conditions except the ids are zero."""
    sigma = torch.tensor(sigma.astype(np.float64))
    s = sigma[:, None, None, None, None]
    frames = (keep * batch["cond_latent"])[:, None].expand(-1, x.shape[1], -1, -1, -1)
    c = torch.cat([keep * batch["image_embed"], sigma.log()[:, None] / 4, batch["ids"] / 100], dim=-1) @ params["c"]
    x = torch.cat([x / (s**2 + 1).sqrt(), frames], dim=-1)
    return torch.tanh(x @ params["w"] + c[:, None, None, None])


def denoise(params: dict, x, sigma: np.ndarray, batch: dict, keep: float = 1.0):
    """Computes Eq. 2 and 3."""
    s = torch.tensor(wide(sigma).astype(np.float64))
    return x / (s**2 + 1) - s / (s**2 + 1).sqrt() * network(params, x, sigma, batch, keep)


def scores(heads: dict, features, sigma: np.ndarray, batch: dict) -> list:
    c_noise = torch.tensor(np.log(sigma.astype(np.float64)) / 4)[:, None]
    condition = torch.tanh(torch.cat([batch["image_embed"], c_noise], dim=-1) @ heads["c"])[:, None, None, None]
    hidden = torch.tanh(features @ heads["a"])
    return [hidden @ heads[k] + condition for k in "st"]


def gradients_of(value, params: dict) -> dict:
    return dict(zip(params, (g.numpy() for g in torch.autograd.grad(value, list(params.values()))), strict=True))


class Adversarial:
    """One call of the gradients of `module`, and the random draws recovered from the inputs of the plain networks."""

    def __init__(self, module, method: str, step: int = 1000, batch=None, **changes):
        self.config, self.networks = make_config(method, **{"r1_weight": 0.0} | changes), Plain()
        self.batch = make_batch() if batch is None else batch
        params = self.networks.params
        frozen = {"backbone": params["backbone"], "teacher": params["generator"]}
        found = module.make_gradients(self.networks, self.config)(
            params["generator"], params["heads"], frozen, self.batch, jax.random.key(7), step
        )
        jax.effects_barrier()
        self.g_grads, self.d_grads, self.metrics = found
        self.sigma, self.x_t = unscaled(self.networks.calls["generator"][-1])
        self.sort(self.batch["latents"])
        self.torch = double(self.batch)
        self.params = {k: v.requires_grad_() for k, v in double(params["generator"]).items()}
        self.heads = {k: v.requires_grad_() for k, v in double(params["heads"]).items()}
        self.x0_hat = denoise(self.params, torch.tensor(self.x_t.astype(np.float64)), self.sigma, self.torch)

    def sort(self, x0: np.ndarray) -> None:
        """Finds the backbone calls with real latents, `x0`, and with fakes: only x0 has pure noise added."""
        self.x0 = x0
        seen = [unscaled(call) for call in self.networks.calls["backbone"]]
        self.real, self.fake = sorted(seen, key=lambda pair: np.std(self.added(*pair)))

    def added(self, sigma, x) -> np.ndarray:
        """Returns the difference of `x` and the real latents, in units of sigma."""
        return (x - self.x0) / wide(sigma)

    def noises(self) -> dict[str, np.ndarray]:
        """Returns the three noises, which should be standard normal."""
        fake = (self.fake[1] - self.x0_hat.detach().numpy()) / wide(self.fake[0])
        return {"generator": self.added(self.sigma, self.x_t), "real": self.added(*self.real), "fake": fake}

    def check_losses(self, second_loss):
        """Checks the discriminator's hinge loss, the generator's `E D(fake) + weight * second loss`, and gradients."""
        backbone = double(self.networks.params["backbone"])
        added = torch.tensor(self.noises()["fake"]) * torch.tensor(wide(self.fake[0]).astype(np.float64))

        def encode(x, sigma):
            return network(backbone, x, sigma, self.torch)

        fake = scores(self.heads, encode(self.x0_hat + added, self.fake[0]), self.fake[0], self.torch)
        generator = sum(s.mean() for s in fake) / 2
        second = second_loss(self.x0_hat, self.torch["latents"])
        weight = self.config[self.config.method].recon_weight
        assert_trees_close(self.g_grads, gradients_of(generator + weight * second, self.params), rtol=1e-3)
        np.testing.assert_allclose(self.metrics["loss/adversarial"], generator.item(), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(self.metrics["loss/reconstruction"], second.item(), rtol=1e-3)
        features = [encode(torch.tensor(x.astype(np.float64)), s) for s, x in (self.real, self.fake)]
        real, fake = (
            scores(self.heads, f, s, self.torch) for f, (s, _) in zip(features, (self.real, self.fake), strict=True)
        )
        hinge = sum((1 + r).relu().mean() + (1 - f).relu().mean() for r, f in zip(real, fake, strict=True)) / 2
        assert_trees_close(self.d_grads, gradients_of(hinge, self.heads), rtol=1e-3)
        np.testing.assert_allclose(self.metrics["loss/hinge"], hinge.item(), rtol=1e-4)


def assert_normal(noises: dict[str, np.ndarray], same: tuple = ()) -> None:
    """Asserts that each noise has unit size in every video and is independent of the others, except the pair `same`."""
    for name, x in noises.items():
        np.testing.assert_allclose(np.std(x, axis=(1, 2, 3, 4)), 1, atol=0.35, err_msg=name)
    names = sorted(noises)
    for a, b in ((a, b) for a in names for b in names if a < b):
        correlation = np.corrcoef(noises[a].ravel(), noises[b].ravel())[0, 1]
        assert abs(correlation - ((a, b) == same)) < 0.06, (a, b)


# ---- UFOGen ----


def check_ufogen(module=ufogen):
    trace = Adversarial(module, "ufogen")
    t = index_of(trace.sigma, karras(1000))
    assert t.min() >= 1 and 350 < t.mean() < 650 and len(set(t)) > SIZE // 2
    for sigma, _ in (trace.real, trace.fake):
        np.testing.assert_array_equal(index_of(sigma, karras(1000)), np.maximum(t - 250, 0))
    assert_normal(trace.noises())  # forward noise: a posterior step would keep some of the generator's
    s = torch.tensor(wide(trace.sigma).astype(np.float64))
    trace.check_losses(lambda x, x0: ((s**2 + 1) / s**2 * (x - x0) ** 2).mean())


def test_ufogen():
    check_ufogen()


@pytest.mark.slow
def test_ufogen_heads_learn_in_every_second_step():
    networks, config = Silent(), make_config("ufogen")
    state, frozen = ufogen.init_state(networks, config, networks.params["generator"])
    step, states = ufogen.make_train_step(networks, config), [state]
    for _ in range(3):
        state, metrics = step(states[-1], frozen, make_batch())  # of the size of other tests
        states.append(state)
        assert np.isfinite(metrics["loss/hinge"])
    pairs = list(zip(states[:-1], states[1:], strict=True))
    assert [moved(*pair, "heads") for pair in pairs] == [True, False, True]
    assert [moved(*pair, "opt_d") for pair in pairs] == [True, False, True]
    assert all(moved(*pair, "generator") for pair in pairs)


# ---- LADD ----


def check_ladd(module=ladd):
    trace = Adversarial(module, "ladd")
    levels = karras(4)
    assert set(index_of(trace.sigma, levels)) == {0, 1, 2, 3}
    assert_normal(trace.noises(), same=("fake", "real"))
    np.testing.assert_array_equal(trace.real[0], trace.fake[0])
    assert 0.7 < np.log(trace.real[0]).mean() < 1.3 and 0.7 < np.log(trace.real[0]).std() < 1.3
    assert trace.config.ladd.recon_weight == 0
    trace.check_losses(lambda x, x0: ((x - x0) ** 2).mean())
    for step, expected in ((0, (0.5, 0.5, 0, 0)), (499, (0.5, 0.5, 0, 0)), (500, (0.1, 0.1, 0.1, 0.7))):
        networks, many = Plain(), make_batch(2000)
        params, gradients = networks.params, module.make_gradients(networks, trace.config)
        gradients(params["generator"], params["heads"], params, many, jax.random.key(0), step)
        jax.effects_barrier()
        found = index_of(unscaled(networks.calls["generator"][-1])[0], levels)
        np.testing.assert_allclose(np.bincount(found, minlength=4) / 2000, expected, atol=0.04)


def test_ladd():
    check_ladd()


@pytest.mark.slow
def test_ladd_on_videos_of_the_base_model():
    """Two Euler steps of the guided base model, 700 -> 0.002 -> 0, replace the batch's latents."""
    trace = Adversarial(ladd, "ladd", teacher_steps=2, teacher_guidance=(1.0, 3.0), batch=make_batch(8))
    teacher, batch = double(trace.networks.params["generator"]), trace.torch
    first = trace.networks.calls["generator"][0]
    assert (
        len(first[0]) == 16 and not first[0][:8, ..., C:].any() and not first[2][:8].any()
    )  # no condition, first half
    x = torch.tensor(unscaled(first)[1][:8].astype(np.float64))
    np.testing.assert_allclose(x.std() / 700, 1, atol=0.05)
    ramp = torch.linspace(1, 3, FRAMES, dtype=torch.float64)[:, None, None, None]
    for high, low in ((700.0, 0.002), (0.002, 0.0)):
        sigma = np.full(8, high)
        without, with_ = (denoise(teacher, x, sigma, batch, keep) for keep in (0.0, 1.0))
        x = x + (low - high) * (x - (without + ramp * (with_ - without))) / high
    trace.sort(x.numpy())
    assert_normal({k: v for k, v in trace.noises().items() if k != "fake"})
    untouched = Adversarial(ladd, "ladd", batch=make_batch(8))
    np.testing.assert_array_equal(untouched.batch["latents"], trace.batch["latents"])


# ---- AnimateLCM ----


class Consistency:
    """One call of the gradients of AnimateLCM; student and target have different weights."""

    def __init__(self, module=animatelcm):
        self.networks, self.batch = Plain(), make_batch()
        student = self.networks.params["generator"]
        target = jax.tree.map(lambda x: x + 0.3 * noise(30, *x.shape), student)
        teacher = jax.tree.map(lambda x: x + 0.3 * noise(31, *x.shape), student)
        gradients = module.make_gradients(self.networks, make_config("animatelcm"))
        self.grads, self.metrics = gradients(student, target, {"teacher": teacher}, self.batch, jax.random.key(3))
        jax.effects_barrier()
        self.student, self.target, self.teacher = map(double, (student, target, teacher))
        calls = self.networks.calls["generator"]
        (self.guided,) = (call for call in calls if len(call[0]) == 2 * SIZE)
        alone = sorted((unscaled(call) for call in calls if len(call[0]) == SIZE), key=lambda pair: -pair[0].mean())
        (self.high, self.x), (self.low, self.lower) = alone


def check_animatelcm(module=animatelcm):
    trace, batch = Consistency(module), double(make_batch())
    levels = karras(40)[::-1]  # downwards: i + 1 has less noise
    i = index_of(trace.high, levels)
    np.testing.assert_array_equal(index_of(trace.low, levels), i + 1)
    assert i.min() < 4 and i.max() > 35 and 15 < i.mean() < 24
    assert_normal({"student": (trace.x - trace.batch["latents"]) / wide(trace.high)})
    # The teacher's Euler step from x, with a guidance ramp that can be read off the target's input.
    high, low = (torch.tensor(wide(levels[n])) for n in (i, i + 1))
    x, lower = (torch.tensor(v.astype(np.float64)) for v in (trace.x, trace.lower))
    without, with_ = (denoise(trace.teacher, x, levels[i], batch, keep) for keep in (0.0, 1.0))
    guess = x - (lower - x) / (low - high) * high
    ramp = (((guess - without) * (with_ - without)).sum((2, 3, 4)) / ((with_ - without) ** 2).sum((2, 3, 4))).numpy()
    far = levels[i] > 0.5  # below, rounding of x hides the guess
    for ends, allowed in ((ramp[far, 0], (1, 1.25, 1.5)), (ramp[far, -1], (2, 2.25, 2.5))):
        nearest = np.abs(ends[:, None] - allowed).argmin(axis=1)
        np.testing.assert_allclose(ends, np.take(allowed, nearest), atol=0.02)
        assert set(nearest) == {0, 1, 2}
    np.testing.assert_allclose(ramp[far, 1], (ramp[far, 0] + ramp[far, 2]) / 2, atol=0.02)
    weights = torch.tensor(np.stack([np.round(4 * ramp[:, 0]) / 4, np.round(4 * ramp[:, -1]) / 4], axis=1))
    ramps = weights[:, :1] + torch.linspace(0, 1, FRAMES, dtype=torch.float64) * (weights[:, 1:] - weights[:, :1])
    guess = without + ramps[..., None, None, None] * (with_ - without)
    expected = x + (low - high) * (x - guess) / high
    np.testing.assert_allclose(lower.numpy()[far], expected.numpy()[far], rtol=1e-3, atol=1e-3)
    # The loss, with the target held fixed.
    student = {k: v.clone().requires_grad_() for k, v in trace.student.items()}
    error = denoise(student, x, levels[i], batch) - denoise(trace.target, lower, levels[i + 1], batch)
    loss = ((1 / (high - low)) ** 0.1 * ((error**2 + 0.001**2).sqrt() - 0.001)).mean()
    np.testing.assert_allclose(trace.metrics["loss/consistency"], loss.item(), rtol=1e-3)
    assert_trees_close(trace.grads, gradients_of(loss, student), rtol=1e-3)


def test_animatelcm():
    check_animatelcm()


def test_animatelcm_step_moves_student_and_target_only():
    networks, config = Silent(), make_config("animatelcm")
    config.dtype = "bfloat16"
    config.generator_optimizer.lr = 1e-2
    state, frozen = animatelcm.init_state(networks, config, networks.params["generator"])
    step = animatelcm.make_train_step(networks, config)
    first, metrics = step(state, frozen, make_batch())
    assert int(first["step"]) == 1 and np.isfinite(metrics["loss/consistency"])
    expected = jax.tree.map(lambda e, p: 0.95 * e + 0.05 * p, state["ema"], first["generator"])
    assert_trees_close(first["ema"], expected, rtol=1e-6)
    assert moved(state, first, "generator")
    second, _ = step(first, frozen, make_batch())
    # The target of the second step is the average: with the student in its place the update differs.
    third, _ = step(first | {"ema": first["generator"]}, frozen, make_batch())
    assert moved(second, third, "generator")
    half = jax.tree.map(lambda x: np.asarray(jnp.bfloat16(x)), networks.params["generator"])
    jax.tree.map(np.testing.assert_array_equal, frozen["teacher"], half)  # in the compute dtype


# ---- mutations ----

MUTATIONS = {  # module, original text, replacement
    "AnimateLCM's levels off by one": (animatelcm, "sigmas[i], sigmas[i + 1]", "sigmas[i], sigmas[i + 2]"),
    "AnimateLCM climbs": (animatelcm, "sigmas[i], sigmas[i + 1]", "sigmas[i + 1], sigmas[i]"),
    "target without guidance": (animatelcm, "x, high, condition, ramps)", "x, high, condition, None)"),
    "student fed pure noise": (animatelcm, "x = edm.add_noise(x0,", "x = edm.add_noise(0 * x0,"),
    "target is not held fixed": (
        animatelcm,
        "return losses.consistency(found, goal,",
        "goal = edm.denoise(networks.generator(tree.merge(target, part)), lower, low, batch)\n"
        "            return losses.consistency(found, goal,",
    ),
    "one step too far": (animatelcm, "edm.expand(low - high, x)", "edm.expand(-high, x)"),
    "UFOGen's levels off by one": (ufogen, "sigmas[jnp.maximum(t - jump, 0)]", "sigmas[jnp.maximum(t - jump, 1)]"),
    "UFOGen at level 0": (ufogen, "1, method.levels)", "0, method.levels - 1)"),
    "fake at another level": (ufogen, "(lower, fake)", "(sigmas[t], fake)"),
    "the generator's noise again": (ufogen, "fake = real if", "fake = noise if True else real if"),
    "re-noised by the posterior": (
        adversarial,
        "features = encode(x, sigma_f, noise_f)",
        "r = edm.expand(sigma_f / sigma, x)\n            features = encode(\n"
        "                x, sigma_f, r * (x_t - x) / edm.expand(sigma, x) + jnp.sqrt(1 - r**2) * noise_f)",
    ),
    "generator fed pure noise": (adversarial, "x_t = edm.add_noise(x0,", "x_t = edm.add_noise(0 * x0,"),
    "LADD's levels off by one": (ladd, "[-len(method.probabilities) :]", "[-len(method.probabilities) - 1 : -1]"),
    "LADD without its warm-up": (ladd, "jnp.where(warm, ", "jnp.where(~warm | True, "),
    "LADD's real and fake at different noise": (sfv, "real if method.shared_noise else", "real if False else"),
}
CHECKS = {animatelcm: check_animatelcm, ufogen: check_ufogen, ladd: check_ladd}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_noticed(monkeypatch, mutation):
    module, old, new = MUTATIONS[mutation]
    source = Path(module.__file__).read_text()
    assert old in source, f"write the mutation {mutation!r} anew: the code has changed"
    mutant = types.ModuleType(mutation)
    exec(compile(source.replace(old, new), mutation, "exec"), mutant.__dict__)  # noqa: S102
    with pytest.raises((AssertionError, IndexError, ValueError)):
        if module in CHECKS:
            CHECKS[module](mutant)
        elif module is adversarial:
            monkeypatch.setattr(ufogen, "adversarial", mutant)
            check_ufogen()
        else:
            monkeypatch.setattr(ladd, "sfv", mutant)
            check_ladd()


# ---- devices ----


@pytest.mark.slow
@pytest.mark.parametrize("method", ["animatelcm", "ufogen", "ladd"])
def test_two_devices_compute_the_loss_of_one(method):
    changes = {"teacher_steps": 2} if method == "ladd" else {}
    networks, config = Silent(), make_config(method, **changes)
    config.accumulation_steps = 2
    module, found = METHODS[method], []
    for count in (1, 2):
        mesh = sharding.make_mesh(count, devices=jax.devices()[:count])
        everywhere = jax.NamedSharding(mesh, P())
        state, frozen = jax.device_put(module.init_state(networks, config, networks.params["generator"]), everywhere)
        step = jax.jit(
            module.make_train_step(networks, config),
            in_shardings=(everywhere, everywhere, sharding.batch_sharding(mesh)),
            out_shardings=everywhere,
        )
        for _ in range(2):
            state, metrics = sharding.on_mesh(mesh, step)(state, frozen, sharding.put_batch(mesh, make_batch(8)))
        found.append(jax.device_get((metrics, state["generator"])))
    one, two = found
    for name in (k for k in one[0] if k.startswith("loss/")):
        np.testing.assert_allclose(two[0][name], one[0][name], rtol=1e-4, err_msg=name)
    assert_trees_close(two[1], one[1], rtol=1e-5)
