"""Placement of arrays, and equal numbers of a step on every mesh, by the intended collectives.

The heights are chosen so that rows divide over two devices and not over eight.
"""

import re
from functools import partial

import jax
import numpy as np
import pytest

from sfv_jax import config as configs
from sfv_jax.methods import METHODS, optim
from sfv_jax.models import partitioning, tree
from sfv_jax.models.attention import TransformerSpatioTemporal, attention
from sfv_jax.models.layers import Downsample, Upsample
from sfv_jax.models.networks import Networks
from sfv_jax.models.unet import UNetConfig
from sfv_jax.performance import hlo
from sfv_jax.runtime import sharding
from tests.conftest import assert_equal, noise, value_and_gradients

UNET = UNetConfig(
    in_channels=6,
    out_channels=3,
    block_out_channels=(16,),
    num_attention_heads=(2,),
    layers_per_block=1,
    cross_attention_dim=5,
    addition_time_embed_dim=8,
    norm_groups=4,
    temporal_conv="matmul",
)
LOCAL = ("all-to-all", "collective-permute")  # collectives that move activations


pytestmark = pytest.mark.usefixtures("small_things_in_parts")


def batch(step: int) -> dict:
    shapes = dict(latents=(8, 2, 6, 4, 3), cond_latent=(8, 6, 4, 3), image_embed=(8, 5), ids=(8, 3))
    return {k: noise(10 * step + n, *shape) for n, (k, shape) in enumerate(shapes.items())}


class Steps:
    """Runs `count` steps of a method on a mesh.

    Attributes: `states` and `metrics` of the steps, `shardings`, and `first`, the (state, frozen) before them.
    """

    def __init__(self, *shape: int, count: int = 6, method: str = "sfv"):
        config = getattr(configs, method)()
        config.update(dict(dtype="float32", accumulation_steps=1, generator_optimizer=configs.sm3(1e-3)))
        if method == "sfv":
            config.discriminator.update(temporal_kernel=3, projection_dim=8, sinusoid_dim=8)
        networks = METHODS[method].make_networks(UNET, config)
        abstract = networks.abstract["generator"]
        leaves, structure = jax.tree.flatten(abstract)
        params = structure.unflatten([0.3 * noise(n, *x.shape) for n, x in enumerate(leaves)])
        self.mesh = mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])

        begun = jax.tree.map(np.array, METHODS[method].init_state(networks, config, params))  # copies, for donation
        self.abstract = jax.eval_shape(lambda: begun)
        self.shardings = sharding.param_shardings(mesh, self.abstract)
        state, frozen = jax.device_put(begun, self.shardings)
        self.first = jax.device_get((state, frozen))
        split = sharding.batch_sharding(mesh)
        self.step = jax.jit(
            METHODS[method].make_train_step(networks, config),
            in_shardings=(*self.shardings, split),
            out_shardings=(self.shardings[0], sharding.replicated_sharding(mesh)),
            donate_argnums=0,
        )
        self.states, self.metrics, self.frozen, self.last = [], [], frozen, state
        call = sharding.on_mesh(mesh, lambda state, batch: self.step(state, frozen, batch))
        for n in range(count):
            placed = sharding.put_batch(mesh, batch(n))
            with jax.transfer_guard("disallow"):  # no implicit transfer between host and devices
                state, metrics = call(state, placed)
            self.states.append(jax.device_get(state))
            self.metrics.append(jax.device_get(metrics))
        lower = sharding.on_mesh(mesh, lambda state, batch: self.step.lower(state, frozen, batch))
        self.lowered = lambda: lower(state, placed)


def assert_same(found: Steps, expected: Steps, rtol: float, atol: float, first: int | None = None) -> None:
    """Compares the metrics of all steps, or of the `first`, and the parameters after the last of these."""
    for a, b in zip(found.metrics[:first], expected.metrics[:first], strict=True):
        for name in b:
            if name.startswith(("loss/", "norm/", "ratio/", "balance/")):
                np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=1e-6, err_msg=name)
    for name in ("generator", "ema", "heads"):
        pairs = zip(*(jax.tree.leaves(s.states[:first][-1][name]) for s in (found, expected)), strict=True)
        worst = max(float(np.max(np.abs(a - b))) for a, b in pairs)
        assert worst < atol, (name, worst)


@pytest.fixture(scope="module")
def one_device() -> Steps:
    return Steps(1, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_any_mesh_gives_the_numbers_of_one_device(one_device, shape):
    """Parameters agree to 2e-5 after six adversarial steps, and to 1e-6 after the first."""
    steps = Steps(*shape)
    assert_same(steps, one_device, rtol=1e-5, atol=2e-5)
    assert_same(steps, one_device, rtol=1e-5, atol=1e-6, first=1)
    assert steps.step._cache_size() == 1  # compiled once
    if shape == (1, 8, 1):
        check_fsdp(steps)


def check_fsdp(steps: Steps) -> None:
    """Checks that weights are gathered, activations stay in place, and the state is updated in place."""
    compiled = steps.lowered().compile()
    text = compiled.as_text()
    assert not [name for name in LOCAL if re.search(rf"\b{name}(-start)?\(", text)]
    gathers = re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
    stored = jax.tree.leaves((steps.abstract[0]["generator"], steps.abstract[1]))
    placed = jax.tree.leaves((steps.shardings[0]["generator"], steps.shardings[1]))
    sharded = [x for x, s in zip(stored, placed, strict=True) if "fsdp" in s.spec]
    assert len(sharded) > 20 and gathers
    # Each sharded weight is gathered once. SM3 gathers its accumulators, which are vectors, to compare axes.
    sizes = [np.prod([int(n) for n in re.search(r"\[([\d,]*)\]", g)[1].split(",")]) for g in gathers]
    assert sum(sizes) <= 1.25 * sum(x.size for x in sharded)
    local = sum(
        np.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
        for x, s in zip(*map(jax.tree.leaves, (steps.abstract[0], steps.shardings[0])), strict=True)
    )
    assert compiled.memory_analysis().alias_size_in_bytes >= local


@pytest.mark.slow
@pytest.mark.parametrize("layer", [Upsample, partial(Downsample, padding=1)], ids=["up", "down"])
@pytest.mark.parametrize("size", [(6, 4), (5, 8), (3, 16)], ids=str)
def test_resizing_where_rows_do_not_divide(layer, size):
    """Values and gradients are equal, by columns or whole; XLA's own choice gave kernel gradients wrong by a factor."""
    graphdef, _ = tree.abstract(partial(layer, dtype=np.float32, param_dtype=np.float32), 2)

    def resize(x, kernel):
        return tree.build(graphdef, {"conv": {"kernel": kernel, "bias": np.ones(2, np.float32)}})(partitioning.rows(x))

    args = noise(0, 1, 2, *size, 2), noise(1, 3, 3, 2, 2)
    expected = value_and_gradients(resize, *args)
    for spatial in (4, 8):
        mesh = sharding.make_mesh(1, 1, spatial, devices=jax.devices()[:spatial])
        assert_equal(sharding.on_mesh(mesh, value_and_gradients)(resize, *args), expected, 1e-5)


def test_levels_share_one_side_of_their_frames(monkeypatch):
    """The longer side is shared if divisible, as at every level of SVD (rows only at the first); on GPU, rows first."""
    sizes = [(72, 128), (36, 64), (18, 32), (9, 16)]
    shared = sharding.on_mesh(sharding.make_mesh(1, 1, 8), partitioning.shared_axis)
    assert [shared(*size) for size in sizes] == [3] * 4
    assert [shared(*size[::-1]) for size in sizes] == [2] * 4
    assert [shared(8, 9), shared(9, 8), shared(8, 8), shared(9, 9)] == [2, 3, 2, None]
    monkeypatch.setattr(partitioning, "platform", lambda: "gpu")
    assert [shared(*size) for size in sizes] == [2, 3, 3, 3]


@pytest.mark.parametrize(
    ("shape", "frames", "heads"), [((1, 1, 8), 3, 5), ((2, 1, 4), 8, 1), ((1, 1, 8), 1, 3)], ids=str
)
def test_attention_over_shared_rows(shape, frames, heads):
    """Values and gradients are equal; frames are exchanged if they divide evenly, else keys and values are gathered."""
    args = [noise(n, frames, 16, heads, 4) for n in range(3)]
    expected = value_and_gradients(attention, *args)
    mesh = sharding.make_mesh(*shape)
    assert_equal(sharding.on_mesh(mesh, value_and_gradients)(attention, *args), expected, 1e-5)
    place = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "spatial"))
    forward = sharding.on_mesh(mesh, jax.jit(attention, in_shardings=(place,) * 3, out_shardings=place).lower)(*args)
    found = set(hlo.collectives(hlo.parse(forward.compile().as_text()), 8))
    assert found == ({"all-to-all"} if frames > 1 else {"all-gather"})


@pytest.mark.slow
@pytest.mark.parametrize("size", [(6, 8), (8, 3)], ids=str)
def test_a_transformer_by_rows_or_columns(size):
    """Values and gradients are equal, and nothing is gathered: the order of tokens follows the devices."""
    kw = dict(groups=2, kernel="auto", remat=False, dtype=np.float32, param_dtype=np.float32)
    graphdef, shapes = tree.abstract(lambda _, **k: TransformerSpatioTemporal(8, 2, 4, **kw, **k), None)
    leaves, structure = jax.tree.flatten(shapes)
    params = structure.unflatten([0.3 * noise(n, *x.shape) for n, x in enumerate(leaves)])

    def forward(x, context):
        return tree.build(graphdef, params)(partitioning.rows(x), context)

    args = noise(0, 1, 4, *size, 8), noise(1, 1, 4)
    expected = value_and_gradients(forward, *args)
    mesh = sharding.make_mesh(1, 1, 4, devices=jax.devices()[:4])
    assert_equal(sharding.on_mesh(mesh, value_and_gradients)(forward, *args), expected, 1e-5)
    place = jax.NamedSharding(mesh, jax.P(None, None, *(["spatial"] if size[0] % 4 == 0 else [None, "spatial"])))
    compiled = sharding.on_mesh(mesh, jax.jit(forward, in_shardings=(place, None)).lower)(*args).compile()
    assert "all-gather" not in hlo.collectives(hlo.parse(compiled.as_text()), 4)


# ---- the table of rules ----


@pytest.mark.slow
def test_full_network_is_stored_in_parts():
    """Every array of the full SF-V state has a rule; each of eight devices stores less than 1.01 eighths."""
    mesh = sharding.make_mesh(1, 8, 1)
    networks = Networks(UNetConfig.svd())
    optimizer = optim.make_optimizer(configs.sfv().generator_optimizer)
    generator = networks.abstract["generator"]
    state = {"generator": generator, "opt_g": jax.eval_shape(optimizer.init, generator)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "SMALL", 2**14)
        placed = sharding.param_shardings(mesh, state)
    pairs = zip(*map(jax.tree.leaves, (state, placed)), strict=True)
    sizes = [(x.size, np.prod(s.shard_shape(x.shape))) for x, s in pairs]
    whole, part = map(sum, zip(*sizes, strict=True))
    assert part < 1.01 * whole / 8
    kernels = {k: s.spec for k, s in tree.flatten(placed["generator"]).items()}
    assert kernels["conv_in.kernel"] == jax.P(None, None, None, "fsdp")
    assert not any(kernels["conv_in.bias"]) and not any(kernels["down_blocks.0.resnets.0.time_mixer.mix_factor"])
    # Accumulator r of SM3 is placed like axis r of its parameter.
    accumulators = tree.flatten(placed["opt_g"][1].accumulators)
    specs = {axis: tuple(accumulators[f"conv_in.kernel.{axis}"].spec) for axis in range(4)}
    assert specs == {0: (None,), 1: (None,), 2: (None,), 3: ("fsdp",)}
    temporal = "down_blocks.0.resnets.0.temporal_res_block.conv1.kernel"  # [3, 1, 1, 320, 320]
    assert [k for k in accumulators if k.startswith(temporal)] == [f"{temporal}.{axis}" for axis in (0, 3, 4)]


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no rule of sharding.RULES covers generator.conv.wieght"):
        sharding.param_shardings(sharding.make_mesh(), {"generator": {"conv": {"wieght": np.zeros((8, 8))}}})


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_a_batch_arrives_whole_and_in_order(shape):
    mesh = sharding.make_mesh(*shape)
    expected = batch(0)
    placed = sharding.put_batch(mesh, expected)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), expected)
    assert placed["ids"].sharding.shard_shape((8, 3)) == (8 // (shape[0] * shape[1]), 3)
    assert sharding.local_rows(mesh, 16, 2).tolist() == list(range(16))


def test_batches_and_meshes_that_do_not_fit():
    mesh = sharding.make_mesh(4, 2, 1)
    alone = sharding.make_mesh(devices=jax.devices()[:1])
    for batch, steps, remedy in (
        (2, 4, "set --config.accumulation_steps=2, or --config.batch_size=4$"),
        (6, 4, "set --config.accumulation_steps=3, or --config.batch_size=4 or 8$"),
    ):
        with pytest.raises(ValueError, match=remedy):
            sharding.local_rows(alone, batch, steps)
    with pytest.raises(ValueError, match="batch_size=8 is no multiple of accumulation_steps=2 times .* = 8"):
        sharding.local_rows(mesh, 8, 2)
    with pytest.raises(ValueError, match="data=-1 fsdp=3 spatial=1 does not cover 8|data=2 fsdp=3"):
        sharding.make_mesh(fsdp=3)
