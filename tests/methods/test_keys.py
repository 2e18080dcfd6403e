"""Random keys of a step: whatever the options, no key is used twice and no two draws are correlated."""

import itertools

import jax
import numpy as np
import pytest

from sfv_jax import config as configs
from sfv_jax.methods import METHODS, ladd, sfv, ufogen
from sfv_jax.models import tree
from sfv_jax.runtime import seeds
from tests.methods.test_baselines import Adversarial, make_batch
from tests.methods.test_methods import Plain, Silent, unscaled, wide

PENALTIES = dict(r1_form="perturbation", r1_weight=1.0, r2_weight=1.0)
OPTIONS = [
    ("teacher", {}),
    ("animatelcm", {}),
    *(("sfv", dict(shared_noise=shared) | PENALTIES) for shared in (True, False)),
    *(("ufogen", dict(shared_noise=shared) | PENALTIES) for shared in (True, False)),
    *(
        ("ladd", dict(shared_noise=shared, teacher_steps=steps) | PENALTIES)
        for shared, steps in itertools.product((True, False), (0, 2))
    ),
]
DRAWS = ("normal", "uniform", "randint", "choice", "bernoulli", "categorical", "truncated_normal", "gumbel", "bits")


class Recorder:
    """Record of `jax.random`: keys that were drawn from, keys that were split or folded, and drawn values."""

    def __init__(self, monkeypatch):
        self.drawn, self.split, self.values = [], [], []
        for name in DRAWS:
            monkeypatch.setattr(jax.random, name, self.wrap(getattr(jax.random, name), self.drawn, keep=True))
        monkeypatch.setattr(jax.random, "split", self.wrap(jax.random.split, self.split))

    def wrap(self, function, keys: list, keep: bool = False):
        def recorded(key, *args, **kw):
            value = function(key, *args, **kw)
            jax.debug.callback(lambda data: keys.append(tuple(np.asarray(data))), jax.random.key_data(key))
            if keep:
                jax.debug.callback(lambda x: self.values.append(np.asarray(x, np.float64)), value)
            return value

        return recorded


def config_of(method: str, changes: dict):
    config = getattr(configs, method)()
    config.accumulation_steps = 3
    config[method].update(changes)
    return config


def train_two_steps(method: str, changes: dict) -> None:
    networks, config = Silent(), config_of(method, changes)
    state, frozen = METHODS[method].init_state(networks, config, networks.params["generator"])
    step = METHODS[method].make_train_step(networks, config)
    draw = jax.jit(lambda state, batch: step(state, frozen, batch)[0]["step"])  # XLA drops all that is not drawn
    for _ in range(2):
        state |= {"step": draw(state, make_batch(6))}
    jax.effects_barrier()


def check_keys(recorder: Recorder) -> None:
    assert len(recorder.drawn) == len(set(recorder.drawn)), "two draws have the same key"
    assert len(recorder.split) == len(set(recorder.split)), "a key is split twice"
    assert not set(recorder.drawn) & set(recorder.split), "a key is both drawn from and split"


def check_values(recorder: Recorder) -> None:
    flat = [x.ravel() for x in recorder.values if x.size >= 100]
    for a, b in itertools.combinations(flat, 2):
        n = min(len(a), len(b))
        assert abs(np.corrcoef(a[:n], b[:n])[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.parametrize(
    "method, changes", OPTIONS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_no_key_is_used_twice(monkeypatch, method, changes):
    """Over two steps of three micro-batches each."""
    recorder = Recorder(monkeypatch)
    train_two_steps(method, changes)
    assert len(recorder.drawn) >= 2 * 3 * 3
    check_keys(recorder)
    check_values(recorder)
    # Nor do the keys of the initial parameters appear among them.
    initial = [tree._Keys(0).key, *(jax.random.fold_in(jax.random.key(0), n) for n in range(1, 2000))]
    initial = {tuple(np.asarray(jax.random.key_data(key))) for key in initial}
    assert not initial & {*recorder.drawn, *recorder.split}


def test_every_method_is_among_the_options():
    assert {method for method, _ in OPTIONS} == {name for name, one in METHODS.items() if not hasattr(one, "SUBJECT")}


def test_a_key_used_twice_is_noticed(monkeypatch):
    """`fold_in(key, i)` is `split(key, n)[i]`, so a fold of a key that is also split repeats one of its keys."""
    key = jax.random.key(7)
    same = jax.random.key_data(jax.random.fold_in(key, 2)) == jax.random.key_data(jax.random.split(key, 4)[2])
    assert same.all()
    recorder = Recorder(monkeypatch)
    make_draw = sfv.make_draw

    def make(*args):
        def draw(keys, shape, step):
            return make_draw(*args)(keys._replace(real_noise=keys.videos), shape, step)

        return draw

    monkeypatch.setattr(sfv, "make_draw", make)
    train_two_steps("ladd", dict(teacher_steps=2))
    with pytest.raises(AssertionError, match="two draws have the same key"):
        check_keys(recorder)
    with pytest.raises(AssertionError):
        check_values(recorder)


@pytest.mark.slow
def test_noise_of_the_base_model_and_of_the_discriminator_are_independent():
    trace = Adversarial(ladd, "ladd", teacher_steps=2, batch=make_batch(8))
    start = unscaled(trace.networks.calls["generator"][0])[1][:8] / 700
    backbone = [unscaled(call) for call in trace.networks.calls["backbone"]]
    sigma, real = min(backbone, key=lambda pair: np.std(pair[1] / wide(pair[0])))
    for sigma, x in backbone:
        assert abs(np.corrcoef(start.ravel(), (x / wide(sigma)).ravel())[0, 1]) < 0.2, sigma


@pytest.mark.slow
@pytest.mark.parametrize("method", [sfv, ufogen], ids=["sfv", "ufogen"])
def test_perturbations_are_independent_of_each_other_and_of_the_noise(method):
    name = method.__name__.rpartition(".")[2]
    networks, config, batch = Plain(), config_of(name, PENALTIES | dict(shared_noise=True)), make_batch()
    params = networks.params
    method.make_gradients(networks, config)(
        params["generator"], params["heads"], params, batch, jax.random.key(7), 1000
    )
    jax.effects_barrier()
    seen = [unscaled(call) for call in networks.calls["backbone"]]
    pairs = [(a, b) for (_, a), (_, b) in itertools.combinations(seen, 2) if np.std(a - b) < 0.12]
    assert len(pairs) == 2  # real and fake, each with its perturbed twin
    shifts = [(b - a).ravel() for a, b in pairs]
    assert abs(np.corrcoef(*shifts)[0, 1]) < 0.05
    noise = min(((x - batch["latents"]) / wide(sigma) for sigma, x in seen), key=np.std).ravel()
    assert all(abs(np.corrcoef(shift, noise)[0, 1]) < 0.05 for shift in shifts)


def test_streams_are_far_from_the_keys_of_parameters():
    names = ("heads", "steps", "previews")
    data = {tuple(np.asarray(jax.random.key_data(seeds.stream(0, name)))) for name in names}
    assert len(data) == len(names)
    assert all(seeds.zlib.crc32(name.encode()) > 2**24 for name in names)
