"""SM3 and Muon against independent implementations; schedules, clipping and the moving average."""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from sfv_jax import config as configs
from sfv_jax.methods import optim
from sfv_jax.models import tree
from sfv_jax.models.unet import UNet, UNetConfig

SHAPES = [(), (7,), (4, 6), (3, 4, 5), (3, 1, 2, 4, 5)]


class PlainSM3:
    """SM3 of one tensor in float64, element by element over the slices that cover it."""

    def __init__(self, shape, momentum, beta):
        axes = range(len(shape)) if len(shape) > 1 else [None]
        self.covers = {axis: np.zeros(shape if axis is None else shape[axis]) for axis in axes}
        self.average, self.momentum, self.beta = np.zeros(shape), momentum, beta

    def update(self, g):
        nu = np.zeros(g.shape)
        for index in itertools.product(*map(range, g.shape)):
            mu = min(cover[index if axis is None else index[axis]] for axis, cover in self.covers.items())
            nu[index] = self.beta * mu + (1 - self.beta) * g[index] ** 2 if self.beta else mu + g[index] ** 2
        for axis, cover in self.covers.items():
            others = () if axis is None else tuple(n for n in range(g.ndim) if n != axis)
            self.covers[axis] = np.maximum(cover, nu.max(axis=others) if others else nu)
        self.average = self.momentum * self.average + (1 - self.momentum) * g / np.sqrt(nu)
        return self.average


@pytest.mark.parametrize("beta", [0.0, 0.999])
def test_sm3_follows_its_definition(beta):
    optimizer = optim.scale_by_sm3(0.5, beta)
    zeros = [jnp.zeros(shape) for shape in SHAPES]
    state, update = optimizer.init(zeros), jax.jit(optimizer.update)
    plain = [PlainSM3(shape, 0.5, beta) for shape in SHAPES]
    rng = np.random.default_rng(0)
    for step in range(50):
        scale = 10.0 ** rng.integers(-4, 2)  # a running maximum shows when gradients shrink
        grads = [(scale * rng.standard_normal(shape)).astype(np.float32) for shape in SHAPES]
        updates, state = update([jnp.asarray(g) for g in grads], state)
        for found, reference, g in zip(updates, plain, grads, strict=True):
            expected = reference.update(np.asarray(g, np.float64))
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=f"step {step} {g.shape}")
    for found, reference, shape in zip(state.accumulators, plain, SHAPES, strict=True):
        assert list(found) == ([str(axis) for axis, n in enumerate(shape) if n > 1] or ["0"])
        for axis, cover in reference.covers.items():
            largest = np.max([np.max(mu) for mu in found.values()])  # an axis of one element needs no accumulator
            mu = found.get(str(axis or 0), largest)
            np.testing.assert_allclose(np.ravel(mu), np.ravel(cover), rtol=1e-4)


def test_accumulators_never_shrink():
    optimizer = optim.scale_by_sm3(0.5, 0.999)
    _, state = optimizer.update([jnp.full((2, 3), 10.0)], optimizer.init([jnp.zeros((2, 3))]))
    _, later = optimizer.update([jnp.full((2, 3), 0.1)], state)
    jax.tree.map(np.testing.assert_array_equal, state.accumulators, later.accumulators)


def test_a_maximum_that_decays_forgets_a_spike():
    """After a spike of 100 and n gradients of 1 the step is as if only the decayed spike had been there."""
    steps = {}
    for max_decay in (1.0, 0.9):
        optimizer = optim.scale_by_sm3(0.0, 0.999, max_decay)
        state, params = optimizer.init([jnp.zeros((2, 3))]), [jnp.zeros((2, 3))]
        for g in [100.0, *[1.0] * 40]:
            update, state = optimizer.update([jnp.full((2, 3), g)], state, params)
        steps[max_decay] = float(update[0][0, 0])
    mu = 10.0  # 0.001 * 100^2
    for _ in range(39):
        mu = max(0.9 * mu, 0.999 * mu + 0.001)  # the second moment itself falls more slowly than 0.9
    assert steps[0.9] == pytest.approx(1 / np.sqrt(0.999 * mu + 0.001), rel=1e-4)
    assert steps[1.0] == pytest.approx(1 / np.sqrt(0.999 * 10 + 0.001), rel=1e-4)


@pytest.mark.parametrize("size", [1e-9, 1e3])
def test_first_step_is_sixteen_learning_rates(size):
    optimizer = optim.make_optimizer(configs.sm3(1e-3))
    params = {"w": jnp.zeros((3, 3)), "b": jnp.zeros(())}
    grads = jax.tree.map(lambda p: jnp.full_like(p, size), params)
    moved, *_ = optim.apply(optimizer, grads, optimizer.init(params), params)
    for p in jax.tree.leaves(moved):
        np.testing.assert_allclose(p, -1e-3 * 0.5 / np.sqrt(0.001), rtol=1e-4)  # 15.8


def test_state_is_fp32_and_small():
    params = {"w": jnp.ones((8, 16), jnp.bfloat16)}
    optimizer = optim.make_optimizer(configs.sm3(1e-3))
    state = optimizer.init(params)
    moved, state, _ = optim.apply(optimizer, jax.tree.map(jnp.ones_like, params), state, params)
    assert moved["w"].dtype == jnp.bfloat16
    arrays = [x for x in jax.tree.leaves(state) if x.ndim]
    assert all(x.dtype == jnp.float32 for x in arrays)
    assert sorted(x.shape for x in arrays) == [(8,), (8, 16), (16,)]


def test_zero_gradients_move_nothing():
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    optimizer = optim.make_optimizer(configs.sm3(1.0))
    moved, *_ = optim.apply(optimizer, jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, moved, params)


def plain_muon(average: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Returns Muon's update of a matrix in float64 from its average of gradients (already with `g`) and `g`."""
    x = 0.95 * average + 0.05 * g
    x /= np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return 0.2 * max(x.shape) ** 0.5 * x


def test_muon_follows_its_definition():
    """The first step is also that of optax, whose later averages are scaled up at the start."""
    shapes = {"linear": (6, 4), "again": (6, 4), "wide": (3, 7), "conv": (3, 3, 2, 5), "bias": (5,), "mix": ()}
    kernels = ("linear", "again", "wide", "conv")
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    optimizer, adam = optim.make_optimizer(configs.muon(0.1, b2=0.99)), optax.adam(0.1, b2=0.99)
    state, adam_state = optimizer.init(params), adam.init(params)
    averages, rng = dict.fromkeys(kernels, 0.0), np.random.default_rng(0)
    for step in range(3):
        grads = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
        found, state = optimizer.update(grads, state, params)
        vectors, adam_state = adam.update(grads, adam_state)
        matrices = {k: grads[k].reshape(-1, shapes[k][-1]) for k in kernels}
        if step == 0:
            peer = optax.contrib.muon(0.1, consistent_rms=0.2)
            theirs, _ = peer.update(matrices, peer.init(matrices), matrices)
        for name, g in matrices.items():
            averages[name] = 0.95 * averages[name] + 0.05 * g.astype(np.float64)
            move = found[name].reshape(g.shape)
            np.testing.assert_allclose(move, -0.1 * plain_muon(averages[name], g), rtol=1e-3, atol=1e-5, err_msg=name)
            if step == 0:
                np.testing.assert_allclose(move, theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)
        for name in ("bias", "mix"):
            np.testing.assert_allclose(found[name], vectors[name], rtol=1e-5, err_msg=name)


def test_an_orthogonalized_matrix_has_singular_values_near_one():
    rng = np.random.default_rng(1)
    matrices = rng.standard_normal((2, 9, 4)) * np.array([1e-6, 1e3])[:, None, None]
    found = np.linalg.svd(optim.orthogonalize(jnp.asarray(matrices, jnp.float32)), compute_uv=False)
    assert found.min() > 0.6 and found.max() < 1.3
    assert not np.any(optim.orthogonalize(jnp.zeros((1, 3, 2))))


def steps_of(config: ConfigDict, grads) -> np.ndarray:
    """Returns how far a scalar moves for each gradient of `grads`."""
    optimizer = optim.make_optimizer(config)
    state, moves = optimizer.init(jnp.zeros(())), []
    for g in grads:
        update, state = optimizer.update(jnp.asarray(g, jnp.float32), state, jnp.zeros(()))
        moves.append(-float(update))
    return np.array(moves)


def test_learning_rate_schedule():
    """Under a constant gradient AdamW moves by the learning rate itself."""
    warmup = [0.25, 0.4375, 0.625, 0.8125]
    plain = steps_of(configs.adamw(2.0), np.ones(3))
    warmed = steps_of(configs.adamw(2.0, warmup_steps=4), np.ones(6))
    decayed = steps_of(configs.adamw(2.0, warmup_steps=4, schedule="cosine", decay_steps=8), np.ones(13))
    np.testing.assert_allclose(plain, 2.0, rtol=1e-4)
    np.testing.assert_allclose(warmed, 2.0 * np.array([*warmup, 1, 1]), rtol=1e-4)
    cosine = (1 + np.cos(np.pi * np.arange(9) / 8)) / 2
    np.testing.assert_allclose(decayed, 2.0 * np.array([*warmup, *cosine]), rtol=1e-4, atol=1e-6)


def test_a_delayed_optimizer_moves_nothing_but_sees_the_gradients():
    delayed = steps_of(configs.adamw(2.0, delay_steps=3, warmup_steps=2), np.ones(6))
    np.testing.assert_allclose(delayed, 2.0 * np.array([0, 0, 0, 0.5, 0.75, 1]), rtol=1e-4)
    sm3 = steps_of(configs.sm3(1.0, delay_steps=40), np.ones(41))
    seen = 0.0
    for _ in range(41):
        seen = max(seen, 0.999 * seen + 0.001)
    np.testing.assert_array_equal(sm3[:40], 0)
    np.testing.assert_allclose(sm3[40], 1 / np.sqrt(seen), rtol=0.02)  # not 16, as an optimizer's first step is


def test_linear_schedule():
    linear = steps_of(configs.adamw(2.0, schedule="linear", decay_steps=4), np.ones(6))
    np.testing.assert_allclose(linear, 2.0 * np.array([1, 0.75, 0.5, 0.25, 0, 0]), rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_gradient():
    grads = [1000.0, 1.0]
    np.testing.assert_allclose(steps_of(configs.adamw(1.0, clip_norm=1.0), grads), 1.0, rtol=1e-4)
    assert abs(steps_of(configs.adamw(1.0), grads)[1] - 1) > 0.1


def test_weight_decay_is_decoupled():
    optimizer = optim.make_optimizer(configs.adamw(0.1, weight_decay=0.5))
    params = jnp.full((2, 2), 4.0)
    moved, *_ = optim.apply(optimizer, jnp.zeros((2, 2)), optimizer.init(params), params)
    np.testing.assert_allclose(moved, 4.0 - 0.1 * 0.5 * 4.0, rtol=1e-6)


def test_the_norm_is_that_of_all_elements():
    """Vectors of one length are added before they are summed; bf16 is squared in fp32."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in [(), (7,), (7,), (7,), (5,), (7, 7), (7, 7)]]
    expected = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in arrays))
    np.testing.assert_allclose(optim.global_norm(arrays), expected, rtol=1e-6)
    assert float(optim.global_norm({"w": jnp.full(300, 1 + 2**-7, jnp.bfloat16)})) == np.float32(
        np.sqrt(300) * (1 + 2**-7)
    )
    sums = str(jax.make_jaxpr(optim.sum_of_squares)(arrays)).count("reduce_sum")
    assert sums == 5  # of the scalar, of each length of vectors, of each matrix


def test_moving_average():
    ema, params = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -2.0])}
    np.testing.assert_allclose(optim.ema_update(ema, params, 0.75)["w"], [1.5, 1.0])
    assert optim.ema_update({"w": jnp.zeros(2, jnp.bfloat16)}, params, 0.5)["w"].dtype == jnp.bfloat16


def test_where_optax_differs():
    """The reason for our own SM3: with tiny gradients, optax's eps shortens the first step."""
    g = {"w": jnp.full((2, 2), 1e-6)}
    theirs, ours = optax.scale_by_sm3(b1=0.5, b2=0.999), optim.scale_by_sm3(0.5, 0.999)
    short, full = (float(o.update(g, o.init(g))[0]["w"][0, 0]) for o in (theirs, ours))
    assert short < 0.1 * full


@pytest.mark.slow
def test_trained_parts_of_svd():
    unet = tree.abstract(UNet, UNetConfig.svd())[1]
    sizes = {which: tree.count(optim.trainable(unet, which)) for which in ("all", "temporal", "spatial")}
    assert sizes == {"all": 1_524_623_082, "temporal": 656_076_838, "spatial": 1_524_623_082 - 656_076_838}
    assert set(optim.trainable(unet, "up_blocks|conv_out")) == {"up_blocks", "conv_out"}
    with pytest.raises(ValueError, match="finds no parameter"):
        optim.check_trainable(unet, "temporel")


def test_a_search_that_never_ends_is_ended(monkeypatch):
    """Python's search of `(.+)+!` takes time exponential in the length of a path."""
    monkeypatch.setattr(optim, "PATIENCE", 1.0)
    unet = tree.abstract(UNet, UNetConfig.tiny())[1]
    began = time.monotonic()
    with pytest.raises(ValueError, match="more than 1 s to search: write it without nested repetitions"):
        optim.check_trainable(unet, "(.+)+!")
    assert time.monotonic() - began < 20
    optim.check_trainable(unet, r"(up_blocks\.\d+\.)+resnets")
