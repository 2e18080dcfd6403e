"""Balance of the two losses: its target at any size and mesh, its state, options of the heads' losses, alarms."""

import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfv_jax import config as configs
from sfv_jax.methods import adversarial, sfv
from sfv_jax.methods.adversarial import Balance
from sfv_jax.training.alarms import Alarms
from tests.methods.test_methods import C, Silent, Trace, assert_trees_close, make_batch, sfv_config

RATIO, FACTOR = "ratio/adv_to_rec_gradient", "balance/factor"
VIDEOS = 32  # as in `Trace`: nothing here is jitted, and operations on arrays of known shapes are compiled already


def batch_of(size: int) -> dict:
    """Returns a batch of videos of `size` x `size` cells."""
    batch, rng = make_batch(VIDEOS), np.random.default_rng(size)
    shapes = dict(latents=(VIDEOS, 2, size, size, C), cond_latent=(VIDEOS, size, size, C))
    return batch | {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}


def train(config, steps: int, size: int = 4, module=sfv) -> tuple[list[dict], list[dict]]:
    """Returns the states before and after each step on plain networks, and the metrics of the steps."""
    networks = Silent()
    state, frozen = module.init_state(networks, config, networks.params["generator"])
    step, states, metrics = module.make_train_step(networks, config), [state], []
    for _ in range(steps):
        state, measured = step(states[-1], frozen, batch_of(size))
        states.append(state)
        metrics.append({name: float(x) for name, x in measured.items()})
    return states, metrics


def gradients(size: int, state: Balance | None = None, **changes) -> tuple:
    """Returns (generator gradients, metrics) of one batch."""
    networks, config = Silent(), sfv_config(**changes)
    params = networks.params
    run = sfv.make_gradients(networks, config)
    found = run(params["generator"], params["heads"], params, batch_of(size), jax.random.key(0), 0, state)
    return found[0], {name: float(x) for name, x in found[2].items()}


def test_the_ratio_of_the_printed_losses_falls_with_size_and_that_of_rms_does_not():
    """Four times the side: a fourth of the ratio, as one over the root of the size."""
    printed = [gradients(size)[1][RATIO] for size in (4, 16)]
    rms = [gradients(size, recon_reduction="rms")[1][RATIO] for size in (4, 16)]
    assert printed[0] / printed[1] == pytest.approx(4, rel=0.2)
    assert rms[0] / rms[1] == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("size", [4, 16])
def test_the_first_step_has_the_wanted_ratio(size):
    found, metrics = gradients(size, Balance.start(), balance=2.0)
    assert metrics[RATIO] == pytest.approx(2, rel=1e-4)
    _, printed = gradients(size)
    factor = printed[RATIO] / 2
    assert metrics[FACTOR] == pytest.approx(factor, rel=1e-4)
    assert_trees_close(found, gradients(size, recon_weight=0.1 * factor)[0])


def test_the_ratio_is_measured_at_the_output():
    """Of the gradients with respect to the fake, from the losses written out."""
    trace = Trace(r1_weight=0.0)
    fake, x0, (sigma, noised) = trace.denoise(trace.generator), trace.batch["latents"], trace.fake

    def adversarial_loss(x):
        scores = trace.logits(trace.heads, trace.features(sigma, x + noised - fake), sigma)
        return sum(jnp.mean(s) for s in scores) / 2

    c = 0.00054 * np.sqrt(x0[0].size)
    second = lambda x: 0.1 * jnp.mean(jnp.sqrt(jnp.sum((x - x0) ** 2, axis=(1, 2, 3, 4)) + c**2) - c)  # noqa: E731
    norms = [float(jnp.linalg.norm(jax.grad(loss)(fake).ravel())) for loss in (adversarial_loss, second)]
    assert float(trace.metrics[RATIO]) == pytest.approx(norms[0] / norms[1], rel=1e-3)


def test_the_factor_follows_a_corrected_average():
    """A geometric average of the ratios, weighted as an exponential average is, without its start at 0."""
    method = sfv_config(balance=2.0, balance_decay=0.75).sfv
    balance, ratios = Balance.start(), [1.0, 4.0, 4.0, 0.5]
    for ratio in ratios:
        balance = balance.update(jnp.log(ratio), method.balance_decay)
    weights = np.array([0.75**3, 0.75**2, 0.75, 1])
    expected = np.exp(np.sum(weights * np.log(ratios)) / np.sum(weights)) / 2
    assert float(balance.factor(jnp.log(100.0), method)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("ratio", "factor"), [(1e9, 10.0), (1e-9, 0.1)])
def test_the_factor_is_bounded(ratio, factor):
    method = sfv_config(balance=1.0, balance_limit=10.0).sfv
    assert float(Balance.start().factor(jnp.log(ratio), method)) == pytest.approx(factor, rel=1e-5)


def test_steps_without_a_generator_leave_the_balance_alone():
    states, metrics = train(sfv_config(balance=2.0, generator_every=2), 3)
    before, after, idle, again = (jax.device_get(state["balance"]) for state in states)
    assert before.weight == 0 and after.weight > 0 and again.weight > after.weight
    assert idle == after
    assert np.isnan(metrics[1][RATIO]) and np.isnan(metrics[1][FACTOR])


def test_the_balance_of_micro_batches_is_their_mean():
    config = sfv_config(balance=2.0)
    config.accumulation_steps = 2
    states, metrics = train(config, 1)
    assert metrics[0][RATIO] == pytest.approx(2, rel=1e-4)  # each by its own ratio
    whole = train(sfv_config(balance=2.0), 1)[0][1]["balance"].log_ratio
    assert float(states[1]["balance"].log_ratio) == pytest.approx(float(whole), abs=0.01)


def test_a_run_without_balance_has_no_such_state():
    states, metrics = train(sfv_config(), 1)
    assert "balance" not in states[1] and FACTOR not in metrics[0]


def test_a_sum_over_heads_is_as_many_times_the_mean():
    mean, total = (Trace(r1_weight=0.3, heads_reduction=how) for how in ("mean", "sum"))
    assert float(total.metrics[RATIO]) == pytest.approx(2 * float(mean.metrics[RATIO]), rel=1e-4)
    assert_trees_close(total.d_grads, jax.tree.map(lambda x: 2 * x, mean.d_grads))


def test_lazy_penalties_have_the_same_mean():
    """Over a turn, with the same parameters: n-fold in one step of n."""
    networks, config, batch = Silent(), sfv_config(r1_weight=0.3, r1_every=3), batch_of(4)
    run = sfv.make_gradients(networks, config)
    params, key = networks.params, jax.random.key(0)
    found = [run(params["generator"], params["heads"], params, batch, key, step) for step in range(4)]
    every = sfv.make_gradients(networks, sfv_config(r1_weight=0.3))(
        params["generator"], params["heads"], params, batch, key
    )
    lazy = np.array([metrics["loss/r1"] for _, _, metrics in found])
    np.testing.assert_allclose(lazy, every[2]["loss/r1"] * np.array([3, 0, 0, 3]), rtol=1e-4)
    mean = jax.tree.map(lambda *x: sum(x) / 3, *(d_grads for _, d_grads, _ in found[:3]))
    assert_trees_close(mean, every[1])


def test_levels_are_drawn_with_their_probabilities():
    trace = Trace(probabilities=(0.0, 0.25, 0.75))
    top = np.mean(trace.sigma > 100)
    assert set(np.round(trace.sigma)) == {71, 700} and 0.5 < top < 0.95


def test_noise_shift_moves_the_level_with_the_size():
    """The video of `Trace` has 96 numbers, the paper's 301056."""
    shift = np.log(np.sqrt(96 / (14 * 56 * 96 * 4)))
    shifted, plain = (Trace(p_mean=0.0, noise_shift=on, shared_noise=True) for on in (True, False))
    assert np.median(np.log(shifted.real[0])) - np.median(np.log(plain.real[0])) == pytest.approx(shift, abs=0.2)
    assert sfv.noise_shift(301056) == 0


BAND = dict(on_alarm="warn", patience=1, min_live=0.0, max_gap=0.0, min_motion=0.0, max_data_wait=0.0)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (0.1, "the second loss leads .lower the method's recon_weight, or set its balance.*0.1 times"),
        (90.0, "the adversarial loss leads .raise the method's recon_weight"),
        (1.0, ""),
        (float("nan"), ""),
    ],
)
def test_an_alarm_says_which_loss_leads(ratio, message):
    config = configs.sfv().alarms
    config.update(BAND)
    alarms = Alarms(config).check({RATIO: ratio})
    assert [alarm.kind for alarm in alarms] == (["balance"] if message else [])
    if message:
        pytest.raises(ValueError, _raise, alarms[0].message).match(message)


def _raise(message: str):
    raise ValueError(message)


def test_no_alarm_where_the_band_is_open():
    config = configs.sfv().alarms
    config.update(BAND | dict(min_adv_to_rec=0.0, max_adv_to_rec=0.0))
    assert not Alarms(config).check({RATIO: 1e9}) and not Alarms(config).check({RATIO: 1e-9})


MUTATIONS = {  # original text, replacement, check that must fail
    "measured at the parameters": (
        "optim.global_norm(adv_grad) + 1e-12",
        "optim.global_norm(to_generator(adv_grad)) + 1e-12",
    ),
    "ratio inverted": ("average - math.log(method.balance)", "math.log(method.balance) - average"),
    "not saved": ('new["balance"] = balance.update(', "balance.update("),
    "sum for mean": ('if method.heads_reduction == "sum" else 1', 'if method.heads_reduction == "mean" else 1'),
    "penalty not n-fold": ("method.r1_every * penalty()", "penalty()"),
}
CHECKS = {
    "measured at the parameters": test_the_ratio_is_measured_at_the_output,
    "ratio inverted": lambda: test_the_first_step_has_the_wanted_ratio(4),
    "not saved": test_steps_without_a_generator_leave_the_balance_alone,
    "sum for mean": test_a_sum_over_heads_is_as_many_times_the_mean,
    "penalty not n-fold": test_lazy_penalties_have_the_same_mean,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_noticed(monkeypatch, mutation):
    old, new = MUTATIONS[mutation]
    source = Path(adversarial.__file__).read_text()
    assert old in source, f"write the mutation {mutation!r} anew: the code has changed"
    mutant = types.ModuleType(mutation)
    mutant.__dict__["__name__"] = mutation
    monkeypatch.setitem(sys.modules, mutation, mutant)
    exec(compile(source.replace(old, new), mutation, "exec"), mutant.__dict__)  # noqa: S102
    monkeypatch.setattr(sfv, "adversarial", mutant)
    monkeypatch.setattr(sfv, "init_state", mutant.init_state)
    monkeypatch.setattr(sys.modules[__name__], "Balance", mutant.Balance)
    with pytest.raises((AssertionError, KeyError, ValueError, TypeError)):
        CHECKS[mutation]()
