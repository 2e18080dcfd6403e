"""The fast forms of layers equal their plain forms in value and gradient, and the networks use them."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sfv_jax.models import attention, layers, tree
from sfv_jax.models.layers import Upsample
from sfv_jax.models.unet import UNet
from sfv_jax.models.vae import TemporalVAE, VAEConfig
from sfv_jax.performance import hlo
from sfv_jax.runtime.device import count_flops
from sfv_jax.runtime.sharding import make_mesh, on_mesh
from tests.conftest import CONFIGS, assert_equal, noise, value_and_gradients


def convolutions(function, *args, layout: bool = False) -> list[tuple]:
    """Returns (kernel shape, input dilation) of all convolutions in `function`, including those in remat and loops.

    With `layout` it is (kernel shape, dimension numbers).
    """
    field = "dimension_numbers" if layout else "lhs_dilation"
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "conv_general_dilated":
                found.append((eqn.invars[1].aval.shape, eqn.params[field]))
            for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(lambda *args: function(*args))(*args).jaxpr)  # a new function, as known ones are cached
    return found


# ---- upsampling ----


def upsample_plainly(kernel, bias, x):
    """Computes the nearest resize, then the 3x3 convolution, with all upsampled pixels in memory."""
    doubled = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    frames = doubled.reshape(-1, *doubled.shape[2:])
    return layers.conv2d(frames, kernel, ((1, 1), (1, 1))).reshape(*doubled.shape[:-1], -1) + bias


def upsample_by_layer(kernel, bias, x):
    graphdef, _ = tree.abstract(Upsample, kernel.shape[2], dtype=x.dtype, param_dtype=kernel.dtype)
    return tree.build(graphdef, {"conv": {"kernel": kernel, "bias": bias}})(x)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_upsampling_is_the_convolution_of_doubled_pixels(monkeypatch, platform):
    monkeypatch.setattr(layers, "platform", lambda: platform)
    with jax.enable_x64(True):
        args = [
            jnp.asarray(noise(n, *shape), jnp.float64) for n, shape in enumerate([(3, 3, 2, 2), (2,), (1, 2, 3, 4, 2)])
        ]
        expected = value_and_gradients(upsample_plainly, *args)
        assert expected[0].shape == (1, 2, 6, 8, 2)
        assert_equal(value_and_gradients(upsample_by_layer, *args), expected, 1e-12)


def test_upsampling_in_bf16_is_as_precise_as_the_plain_form():
    kernel, x = noise(0, 3, 3, 64, 64) / 24, noise(1, 1, 1, 12, 12, 64).astype(jnp.bfloat16)
    exact = upsample_plainly(kernel, 0.0, x.astype(np.float32))
    plain = upsample_plainly(kernel.astype(x.dtype), 0, x)
    fast = upsample_by_layer(kernel, np.zeros(64, np.float32), x)
    assert plain.dtype == fast.dtype == jnp.bfloat16
    errors = [float(jnp.sqrt(jnp.mean((y.astype(jnp.float32) - exact) ** 2))) for y in (fast, plain)]
    assert errors[0] < 1.05 * errors[1] < 0.01, errors


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_networks_upsample_in_the_small_frame(monkeypatch, platform):
    monkeypatch.setattr(layers, "platform", lambda: platform)
    forms = {"cpu": ((2, 2, 64, 64), (1, 1)), "tpu": ((4, 4, 64, 64), (2, 2))}
    count = {"cpu": 4, "tpu": 1}[platform]
    unet, params = tree.abstract(UNet, CONFIGS["unet"])

    def loss(params, x):
        out = tree.build(unet, params)(x, jnp.ones(1), jnp.ones((1, 32)), jnp.ones((1, 3)))
        return jnp.sum(out)

    x = jnp.zeros((1, 2, 8, 8, CONFIGS["unet"].in_channels))
    assert convolutions(loss, params, x).count(forms[platform]) == count
    odd = jnp.zeros((1, 2, 5, 8, CONFIGS["unet"].in_channels))  # three rows to five: not twice the size
    assert forms[platform] not in convolutions(loss, params, odd)


# ---- convolutions on CPU ----


def test_few_pixels_and_many_channels_are_a_matrix_product_on_cpu(monkeypatch):
    def convolve(x, kernel):
        graphdef, _ = tree.abstract(
            partial(layers.Conv2d, o=3, kernel_size=3, padding=1, dtype=x.dtype, param_dtype=x.dtype), 256
        )
        return tree.build(graphdef, {"kernel": kernel, "bias": jnp.ones(3, x.dtype)})(x)

    with jax.enable_x64(True):
        args = jnp.asarray(noise(0, 1, 2, 4, 8, 256), jnp.float64), jnp.asarray(noise(1, 3, 3, 256, 3), jnp.float64)
        found = value_and_gradients(convolve, *args)
        assert not convolutions(convolve, *args)
        larger = jax.ShapeDtypeStruct((1, 2, 5, 8, 256), jnp.float64)
        assert convolutions(convolve, larger, args[1]) == [((3, 3, 256, 3), (1, 1))]
        monkeypatch.setattr(layers, "platform", lambda: "gpu")
        expected = value_and_gradients(convolve, *args)
        assert_equal(found, expected, 1e-12)


def jax_s_own(x, kernel, padding, strides):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("padding", [((0, 0), (0, 0)), ((1, 1), (1, 1)), ((0, 1), (0, 1)), ((3, 0), (1, 2))])
def test_gradients_of_convolutions_on_cpu_are_those_of_jax(padding, strides):
    """Also for windows that leave rows at the end out, and the second derivatives that R1 takes."""
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(noise(0, 2, 8, 7, 3), jnp.float64), jnp.asarray(noise(1, 3, 3, 3, 2), jnp.float64)

        def derivatives(convolve):
            def score(x, kernel):
                return jnp.sum(jnp.sin(convolve(x, kernel, padding, strides)))

            penalty = lambda x, kernel: jnp.sum(jax.grad(score)(x, kernel) ** 2)  # noqa: E731
            return *jax.grad(score, (0, 1))(x, kernel), *jax.grad(penalty, (0, 1))(x, kernel)

        ours = lambda x, kernel, padding, strides: layers.conv2d(x, kernel, padding, strides=strides)  # noqa: E731
        assert_equal(derivatives(ours), derivatives(jax_s_own), 1e-12)


def test_convolutions_on_cpu_are_channels_last_in_all_their_derivatives():
    """Others are some 80 times slower inside loops and conditions; outside, XLA mends them."""
    x, kernel = jnp.asarray(noise(0, 2, 8, 8, 3)), jnp.asarray(noise(1, 3, 3, 3, 2))
    channels_last = lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))

    def others(convolve) -> int:
        def penalty(x, kernel):
            score = lambda x: jnp.sum(jnp.sin(convolve(x, kernel, ((1, 1), (1, 1)), (1, 1))))  # noqa: E731
            return jnp.sum(jax.grad(score)(x) ** 2)

        found = convolutions(jax.grad(penalty, (0, 1)), x, kernel, layout=True)
        assert len(found) >= 4  # forward, its gradient, and the gradients of both
        return sum(layout != channels_last for _, layout in found)

    assert others(jax_s_own) > 0
    assert others(lambda x, kernel, padding, _: layers.conv2d(x, kernel, padding)) == 0


# ---- matrix products ----


def test_the_gradient_of_a_kernel_on_cpu_copies_no_activations():
    """Rows are one axis: for several, XLA writes the cotangent out transposed (see layers.matmul)."""
    x, kernel = jnp.asarray(noise(0, 1, 8, 96, 32)), jnp.asarray(noise(1, 32, 64))

    def moved(product) -> list[str]:
        gradients = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(product(jnp.sin(x), kernel))), (0, 1))
        program = hlo.parse(jax.jit(gradients).lower(x, kernel).compile().as_text())
        return [op.opcode for ops in program.computations.values() for op in ops.values() if op.opcode == "transpose"]

    assert moved(jnp.matmul)  # if this fails, XLA no longer transposes and `matmul` can be removed
    assert not moved(layers.matmul)
    with jax.enable_x64(True):
        args = jnp.float64(x), jnp.float64(kernel)
        assert_equal(value_and_gradients(layers.matmul, *args), value_and_gradients(jnp.matmul, *args), 1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_a_1x1_convolution_on_cpu_is_a_matrix_product(monkeypatch, bias):
    def convolve(x, kernel):
        build = partial(layers.Conv2d, o=3, kernel_size=1, use_bias=bias, dtype=x.dtype, param_dtype=x.dtype)
        parameters = {"kernel": kernel} | ({"bias": jnp.ones(3, x.dtype)} if bias else {})
        return tree.build(tree.abstract(build, 2)[0], parameters)(x)

    with jax.enable_x64(True):
        args = jnp.asarray(noise(0, 2, 5, 3, 4, 2), jnp.float64), jnp.asarray(noise(1, 1, 1, 2, 3), jnp.float64)
        found = value_and_gradients(convolve, *args)
        assert not convolutions(convolve, *args)
        monkeypatch.setattr(layers, "platform", lambda: "gpu")
        assert_equal(found, value_and_gradients(convolve, *args), 1e-12)
        assert len(convolutions(convolve, *args)) == 1


# ---- convolution along time ----


def test_temporal_convolution_on_gpu_is_two_dimensional(monkeypatch):
    def convolve(form, x, kernel):
        build = partial(layers.TemporalConv, o=3, form=form, dtype=x.dtype, param_dtype=x.dtype)
        return tree.build(tree.abstract(build, 2)[0], {"kernel": kernel, "bias": jnp.ones(3, x.dtype)})(x)

    with jax.enable_x64(True):
        args = jnp.asarray(noise(0, 2, 5, 3, 4, 2), jnp.float64), jnp.asarray(noise(1, 3, 1, 1, 2, 3), jnp.float64)
        expected = value_and_gradients(partial(convolve, "conv"), *args)
        assert_equal(value_and_gradients(partial(convolve, "matmul"), *args), expected, 1e-12)
        assert_equal(value_and_gradients(partial(convolve, "auto"), *args), expected, 1e-12)
        assert not convolutions(partial(convolve, "auto"), *args)  # on CPU
        monkeypatch.setattr(layers, "platform", lambda: "gpu")
        assert_equal(value_and_gradients(partial(convolve, "conv"), *args), expected, 1e-12)
        for form in ("conv", "auto"):
            assert convolutions(partial(convolve, form), *args) == [((3, 1, 2, 3), (1, 1))]


# ---- group norms ----


@pytest.mark.parametrize("per_frame", [True, False])
def test_group_norms_on_tpu_never_split_the_channels(monkeypatch, per_frame):
    """On TPU the mean over a group is two products with the channels' membership; it equals the plain norm."""

    def normalise(x, scale, bias):
        build = partial(layers.GroupNorm, groups=3, eps=1e-6, per_frame=per_frame, dtype=x.dtype, param_dtype=x.dtype)
        return tree.build(tree.abstract(build, 12)[0], {"scale": scale, "bias": bias})(x)

    def plainly(x, scale, bias):
        groups = x.reshape(*x.shape[:-1], 3, 4)
        axes = (2, 3, 5) if per_frame else (1, 2, 3, 5)
        centred = groups - groups.mean(axes, keepdims=True)
        y = centred / jnp.sqrt(jnp.square(centred).mean(axes, keepdims=True) + 1e-6)
        return y.reshape(x.shape) * scale + bias

    with jax.enable_x64(True):
        shapes = [(2, 3, 4, 5, 12), (12,), (12,)]
        args = [jnp.asarray(3 + noise(n, *shape), jnp.float64) for n, shape in enumerate(shapes)]
        expected = value_and_gradients(plainly, *args)
        for platform in ("cpu", "tpu"):
            monkeypatch.setattr(layers, "platform", lambda name=platform: name)
            assert_equal(value_and_gradients(normalise, *args), expected, 1e-12)
        program = str(jax.make_jaxpr(jax.grad(lambda *args: jnp.sum(normalise(*args))))(*args))
    assert "3,4]" not in program and program.count("dot_general[") == 8


# ---- attention ----


def qkv(tokens: int, dtype=np.float32) -> list:
    return [noise(n, 2, tokens, 1, 64).astype(dtype) for n in range(3)]


@pytest.mark.parametrize("devices", [1, 4])
def test_the_tpu_kernel_is_attention(devices):
    """The kernel is interpreted, in blocks of 128; on four devices with 64 queries each, these are padded."""
    args = qkv(256)
    expected = value_and_gradients(attention.einsum_attention, *args)
    splash = partial(attention.attention, kernel="splash")
    mesh = make_mesh(1, 1, devices, devices=jax.devices()[:devices])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.splash_attention, "__defaults__", (128,))
        assert_equal(on_mesh(mesh, value_and_gradients)(splash, *args), expected, 1e-5)


@pytest.mark.parametrize("devices", [1, 4])
def test_attention_of_one_head_at_a_time_is_attention(devices):
    """It holds in one piece and in blocks of queries; of four devices, each loops over its own frames."""
    with jax.enable_x64(True):
        args = [jnp.asarray(noise(n, 4, 6, 2, 8), jnp.float64) for n in range(3)]
        expected = value_and_gradients(attention.einsum_attention, *args)
        mesh = make_mesh(devices, 1, 1, devices=jax.devices()[:devices])
        for block in (6, 4):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(attention.looped_attention, "__defaults__", (block,))
                looped = partial(attention.attention, kernel="looped")
                assert_equal(on_mesh(mesh, value_and_gradients)(looped, *args), expected, 1e-12)


@pytest.mark.parametrize(
    ("platform", "tokens", "dtype", "kernel"),
    [
        ("tpu", 9216, jnp.bfloat16, "splash"),
        ("tpu", 5376, jnp.float16, "splash"),
        ("tpu", 1344, jnp.bfloat16, "blocked"),  # 10.5 times 128
        ("tpu", 576, jnp.bfloat16, "einsum"),
        ("tpu", 9216, jnp.float32, "blocked"),
        ("gpu", 9216, jnp.bfloat16, "cudnn"),
        ("gpu", 336, jnp.bfloat16, "cudnn"),
        ("gpu", 9216, jnp.float32, "blocked"),
        ("cpu", 9216, jnp.bfloat16, "looped"),
        ("cpu", 257, jnp.float32, "looped"),
        ("cpu", 256, jnp.float32, "einsum"),
    ],
)
def test_the_kernel_fits_the_platform(monkeypatch, platform, tokens, dtype, kernel):
    monkeypatch.setattr(attention, "platform", lambda: platform)
    assert attention.choose_kernel(jax.ShapeDtypeStruct((14, tokens, 5, 64), dtype)) == kernel


def test_kernels_are_kept_from_where_they_fail(monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    many = jax.ShapeDtypeStruct((65536, 14, 5, 64), jnp.bfloat16)
    assert attention.choose_kernel(many) == "einsum"
    with pytest.raises(ValueError, match="'cudnn': a batch of 65536 exceeds 65535; choose auto"):
        jax.eval_shape(partial(attention.attention, kernel="cudnn"), many, many, many)
    with pytest.raises(ValueError, match="'splash': 50 tokens are not a multiple of 128; choose auto"):
        attention.splash_attention(*qkv(50))


@pytest.mark.slow
def test_the_unet_attends_in_space_by_the_tpu_kernel_and_in_time_without(monkeypatch):
    """The jaxpr of its gradient contains the forward kernel and the two kernels of the backward pass."""
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    config = replace(CONFIGS["unet"], block_out_channels=(128,), num_attention_heads=(2,))
    unet, params = tree.abstract(UNet, config, dtype=jnp.bfloat16)

    def loss(params, x):
        return jnp.sum(tree.build(unet, params)(x, jnp.ones(1), jnp.ones((1, 32)), jnp.ones((1, 3))))

    x = jnp.zeros((1, 2, 8, 16, config.in_channels))
    names = re.findall(r"name=(splash_mha_\w+)", str(jax.make_jaxpr(jax.grad(loss))(params, x)))
    attentions = 1  # the last level has none, but the middle does
    for kernel in ("fwd_residuals", "dkv_no_residuals", "dq_no_residuals"):
        assert len([name for name in names if kernel in name]) == attentions, names


def test_attention_over_frames_is_attention(monkeypatch):
    """On CPU it is matrix products: the gradient of the other form would hold queries x keys x channels."""
    ranks = {}
    with jax.enable_x64(True):
        args = [jnp.asarray(noise(n, 2, 3, 5, 2, 8), jnp.float64) for n in range(3)]
        each = [x.reshape(6, 5, 2, 8) for x in args]
        y, *gradients = value_and_gradients(attention.einsum_attention, *each)
        expected = tuple(x.reshape(args[0].shape) for x in (y, *gradients))
        for platform in ("cpu", "tpu"):
            monkeypatch.setattr(attention, "platform", lambda name=platform: name)
            assert_equal(value_and_gradients(attention.attention, *args), expected, 1e-12)
            gradient = jax.grad(lambda *args: jnp.sum(attention.attention(*args)), argnums=(0, 1, 2))
            jaxpr = jax.make_jaxpr(gradient)(*args).jaxpr
            ranks[platform] = max(v.aval.ndim for eqn in jaxpr.eqns for v in eqn.outvars)
    assert ranks == {"cpu": 5, "tpu": 6}


def test_blocks_of_queries_are_even_shares():
    q = jax.ShapeDtypeStruct((1, 6, 2, 8), jnp.float32)
    blocked = partial(attention.blocked_attention, block=4)  # 3 and 3, not 4 and 2 filled up
    assert count_flops(blocked, q, q, q) == count_flops(attention.einsum_attention, q, q, q)


# ---- feed-forward ----


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_geglu_is_the_value_times_gelu_of_the_gate(monkeypatch, platform):
    monkeypatch.setattr(attention, "platform", lambda: platform)

    def layer(x, kernel, bias):
        graphdef, _ = tree.abstract(partial(attention.GEGLU, o=6, dtype=x.dtype, param_dtype=x.dtype), 4)
        return tree.build(graphdef, {"proj": {"kernel": kernel, "bias": bias}})(x)

    def plainly(x, kernel, bias):
        value, gate = jnp.split(x @ kernel + bias, 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)

    with jax.enable_x64(True):
        args = [jnp.asarray(noise(n, *shape), jnp.float64) for n, shape in enumerate([(5, 4), (4, 12), (12,)])]
        assert_equal(value_and_gradients(layer, *args), value_and_gradients(plainly, *args), 1e-12)


def test_geglu_in_bf16_rounds_once():
    halves = [jnp.asarray(3 * noise(n, 64, 32), jnp.bfloat16) for n in range(2)]
    exact = attention.gated(*(x.astype(jnp.float32) for x in halves))
    np.testing.assert_array_equal(attention.gated(*halves), exact.astype(jnp.bfloat16))


# ---- decoding in pieces ----


DECODER = VAEConfig.tiny(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4, temporal_conv="conv")


def decode(pixels: int, params, latents):
    """Returns frames from a decoder that processes at most `pixels` at a time."""
    graphdef, _ = tree.abstract(TemporalVAE, replace(DECODER, decode_pixels=pixels), dtype=latents.dtype)
    return tree.build(graphdef, params).decode(latents)


def decoder_inputs(dtype) -> tuple:
    leaves, structure = jax.tree.flatten(tree.abstract(TemporalVAE, DECODER)[1])
    params = structure.unflatten([0.3 * noise(n, *x.shape) for n, x in enumerate(leaves)])
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, noise(99, 2, 3, 12, 8, 4)))


def loops(jaxpr: str) -> int:
    return jaxpr.count("while[") + jaxpr.count("scan[")


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compile soon, run slowly
decoded = jax.jit(decode, static_argnums=0, compiler_options=QUICK)


@pytest.mark.slow
def test_decoding_in_pieces_is_decoding():
    """Both levels run in pieces: each has two resnets of three loops, and the last convolution has one loop."""
    with jax.enable_x64(True):
        args = decoder_inputs(jnp.float64)
        whole, pieces = decoded(0, *args), decoded(50, *args)
        assert whole.shape == (2, 3, 24, 16, 3)
        assert_equal([pieces], [whole], 1e-12)
        found = [loops(str(jax.make_jaxpr(partial(decode, pixels))(*args))) for pixels in (0, 50, 200, 600)]
    assert found == [0, 13, 7, 0]  # levels of 576 and 2304 pixels: none, both, the second, none in pieces


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 1, 4), (1, 1, 8)], ids=str)
def test_decoding_in_pieces_on_several_devices(mesh):
    """Strips run across the axis that devices share: four share rows; eight share columns on the latents' level."""
    args = decoder_inputs(jnp.float32)
    devices = make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])
    assert_equal([on_mesh(devices, decoded)(15, *args)], [decoded(0, *args)], 2e-5)


@pytest.mark.slow
def test_pieces_hold_less_memory():
    """XLA's plan for 8 frames of 256 x 256 has little more than the largest activation, 16 MiB, instead of four."""
    params, _ = decoder_inputs(jnp.float32)
    latents = jax.ShapeDtypeStruct((1, 8, 128, 128, 4), jnp.float32)
    whole, pieces = (
        decoded.lower(pixels, params, latents).compile().memory_analysis().temp_size_in_bytes / 2**20
        for pixels in (0, 2**14)
    )
    assert pieces < 40 < 64 < whole, (pieces, whole)
