"""The parser of compiled programs, on handwritten text in XLA's format and on a program compiled here."""

import jax
import jax.numpy as jnp
import pytest

from sfv_jax.performance import hlo

# A loop of three steps with a gather, a reduce-scatter in the form of TPUs, synchronous exchanges.
EXCHANGES = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  %zero = s32[] constant(0)
  %all = f32[64]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %mine = f32[16]{0} dynamic-slice(%all, %zero), dynamic_slice_sizes={16}
}

%cond (state: (s32[], bf16[8,4])) -> pred[] {
  %state = (s32[], bf16[8,4]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %last = s32[] constant(3)
  ROOT %more = pred[] compare(%n, %last), direction=LT
}

%body (state.1: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %state.1 = (s32[], bf16[8,4]{1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%state.1), index=0
  %part = bf16[8,4]{1,0} get-tuple-element(%state.1), index=1
  %gather = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%part), replica_groups=[2,4]<=[8], dimensions={0}
  %whole = bf16[32,4]{1,0} all-gather-done(%gather)
  ROOT %next = (s32[], bf16[8,4]{1,0}) tuple(%n.1, %part)
}

ENTRY %main (x: f32[64], y: bf16[8,4]) -> f32[16] {
  %x = f32[64]{0} parameter(0)
  %y = bf16[8,4]{1,0} parameter(1)
  %start = s32[] constant(0)
  %init = (s32[], bf16[8,4]{1,0}) tuple(%start, %y)
  %loop = (s32[], bf16[8,4]{1,0}) while(%init), condition=%cond, body=%body
  %sum.2 = f32[64]{0} all-reduce(%x), replica_groups={}, to_apply=%add
  %halo = f32[64]{0} collective-permute(%sum.2), source_target_pairs={{0,1},{1,0}}
  %swap = f32[64]{0} all-to-all(%halo), replica_groups={{0,1},{2,3}}
  ROOT %scatter = f32[16]{0} fusion(%swap), kind=kCustom, calls=%all-reduce-scatter.1
}
"""

KERNELS = """HloModule layers, is_scheduled=true

%take (p0: f32[9,64], p1: s32[]) -> f32[1,64] {
  %p0 = f32[9,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,64]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,64}
}

%product (q0: bf16[16,8], q1: bf16[8,4]) -> bf16[16,4] {
  %q0 = bf16[16,8]{1,0} parameter(0)
  %q1 = bf16[8,4]{1,0} parameter(1)
  ROOT %dot = bf16[16,4]{1,0} dot(%q0, %q1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (rows: f32[9,64], n: s32[], a: bf16[16,8], b: bf16[8,4], image: bf16[2,5,5,8], k: bf16[3,3,8,4], \
q: bf16[2,32,5,64], near: bf16[16,8]) -> f32[1,64] {
  %rows = f32[9,64]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %a = bf16[16,8]{1,0} parameter(2)
  %b = bf16[8,4]{1,0} parameter(3)
  %image = bf16[2,5,5,8]{3,2,1,0} parameter(4)
  %k = bf16[3,3,8,4]{3,2,1,0} parameter(5)
  %q = bf16[2,32,5,64]{3,2,1,0} parameter(6)
  %near = bf16[16,8]{1,0:T(8,128)S(1)} parameter(7)
  %matmul = bf16[16,4]{1,0} fusion(%a, %b), kind=kOutput, calls=%product
  %chip = bf16[16,4]{1,0:T(8,128)S(1)} fusion(%near, %b), kind=kOutput, calls=%product
  %gemm = (bf16[16,4]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %conv = bf16[2,5,5,4]{3,2,1,0} convolution(%image, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
  %wide = bf16[2,9,9,4]{3,2,1,0} convolution(%image, %k), \
window={size=3x3 pad=1_1x1_1 lhs_dilate=2x2}, dim_labels=b01f_01io->b01f
  %cudnn = (bf16[2,3,3,4]{3,2,1,0}, u8[0]{0}) custom-call(%image, %k), window={size=3x3 stride=2x2 pad=1_1x1_1}, \
dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convForward"
  %back = (bf16[3,3,8,4]{3,2,1,0}, u8[0]{0}) custom-call(%image, %conv), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %attention = (bf16[2,5,32,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %slice = f32[1,64]{1,0} fusion(%rows, %n), kind=kLoop, calls=%take
}
"""
PAIRS = 13  # (output, tap) pairs that meet a sample: 5 outputs, 3 taps, 5 samples, padding 1


def test_collectives_are_counted_once_and_with_their_loops():
    found = hlo.collectives(hlo.parse(EXCHANGES), devices=8)
    assert found == {
        "all-gather": {"count": 3, "bytes": 3 * 8 * 4 * 2 * 3},  # three loops, three neighbors in a group of four
        "all-reduce": {"count": 1, "bytes": 256 * 2 * 7 / 8},  # no groups: all eight devices
        "reduce-scatter": {"count": 1, "bytes": 256 * 3 / 4},
        "all-to-all": {"count": 1, "bytes": 128},
        "collective-permute": {"count": 1, "bytes": 256},
    }


@pytest.mark.parametrize(
    ("name", "flops", "bytes"),
    [
        ("matmul", 2 * 16 * 4 * 8, 2 * (16 * 8 + 8 * 4 + 16 * 4)),
        ("chip", 2 * 16 * 4 * 8, 2 * 8 * 4),  # arrays on the chip are not read from memory
        ("gemm", 2 * 16 * 4 * 8, 2 * (16 * 8 + 8 * 4 + 16 * 4) + 4096),
        ("conv", 2 * 2 * 4 * 8 * PAIRS**2, None),
        ("wide", 2 * 2 * 4 * 8 * PAIRS**2, None),  # positions between dilated samples do not count
        ("cudnn", 2 * 2 * 4 * 8 * 7**2, None),  # taps 2, 3, 2 of the three outputs
        ("back", 2 * 2 * 4 * 8 * PAIRS**2, None),
        ("attention", 4 * 2 * 32 * 32 * 5 * 64, None),
        ("slice", 0, 2 * 64 * 4 + 4),  # one row of nine, and its number
    ],
)
def test_flops_and_bytes_of_a_kernel(name, flops, bytes):
    kernel = {k.op.name: k for k in hlo.kernels(hlo.parse(KERNELS))}[name]
    assert kernel.flops == flops
    assert bytes is None or kernel.bytes == bytes


def test_kernels_are_those_that_run():
    names = [k.op.name for k in hlo.kernels(hlo.parse(KERNELS))]
    assert len(names) == 9 and "dot" not in names and "rows" not in names


def test_a_compiled_loop_counts_as_often_as_it_runs():
    def step(x, w):
        return jax.lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ w), x)

    text = jax.jit(step).lower(jnp.zeros((32, 64)), jnp.zeros((64, 64))).compile().as_text()
    program = hlo.parse(text)
    assert sum(k.flops * k.times for k in hlo.kernels(program)) == 7 * 2 * 32 * 64 * 64
    assert program.unknown_loops == 0


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("nothing here")
