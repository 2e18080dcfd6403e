"""Attention, one function with interchangeable kernels, and the transformer blocks of SVD.

Tokens are `[..., s, c]`; heads are split as `[n, s, heads, d]`.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax

from sfv_jax.errors import UserError
from sfv_jax.models.layers import AlphaBlender, GroupNorm, LayerNorm, Linear, TimestepEmbedding, fp32, matmul, remat
from sfv_jax.models.layers import sinusoidal_embedding as sinusoid
from sfv_jax.models.partitioning import flat, per_row, platform, promote, rows, unflat

Array = jax.Array
QUERY_BLOCK = 1024  # queries per step of the blocked kernel: 9 steps at 9216 tokens, scores of 5x1024x9216 per frame
# Largest block of queries and keys in the TPU kernel: it takes 1024 of 9216 tokens, 896 of 5376, 768 of 2304.
SPLASH_BLOCK = 1024
FEW_TOKENS = 256  # on CPU, up to this many tokens attend with all heads at once: the scores fit in cache
LANES = 128  # of a TPU; the blocks of its kernel are multiples of this
CUDNN_BATCH = 2**16 - 1  # largest safe batch: above it, cuDNN and other flash kernels fail or return wrong numbers


def einsum_attention(q: Array, k: Array, v: Array) -> Array:
    """Computes softmax(q k^T / sqrt(d)) v with an fp32 softmax: the reference. All arrays `[..., s, heads, d]`."""
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    weights = jax.nn.softmax(scores / math.sqrt(q.shape[-1]), axis=-1).astype(v.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, v)


def even_blocks(queries: int, block: int) -> tuple[int, int]:
    """Returns (size, padding) of the fewest equal blocks of at most `block` queries: equal ones waste least padding."""
    size = math.ceil(queries / math.ceil(queries / block))
    return size, -queries % size


def blocked_attention(q: Array, k: Array, v: Array, block: int = QUERY_BLOCK) -> Array:
    """Computes `einsum_attention` by blocks of queries, so the full score matrix never exists. `[n, s, heads, d]`."""
    n, s, heads, d = q.shape
    size, pad = even_blocks(s, block)
    blocks = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(n, -1, size, heads, d).swapaxes(0, 1)
    out = lax.map(jax.checkpoint(lambda query: einsum_attention(query, k, v)), blocks)
    return out.swapaxes(0, 1).reshape(n, s + pad, heads, d)[:, :s]


def looped_attention(q: Array, k: Array, v: Array, block: int = QUERY_BLOCK) -> Array:
    """Computes `blocked_attention` for one frame and head at a time. `[n, s, heads, d]`.

    Its products are of plain matrices, and the scores stay in cache. On CPU, XLA's batched products take twice the
    time, even with one head: axes of size 1 still make a batch.
    """
    frames, s, heads, d = q.shape
    size, pad = even_blocks(s, block)

    @jax.checkpoint
    def attend(q: Array, k: Array, v: Array) -> Array:
        scores = jnp.matmul(q, k.T, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
        return jax.nn.softmax(scores / math.sqrt(d), axis=-1).astype(v.dtype) @ v

    def one(qkv: tuple) -> Array:
        q, k, v = qkv
        queries = jnp.pad(q, ((0, pad), (0, 0))).reshape(-1, size, d)
        return lax.map(lambda query: attend(query, k, v), queries).reshape(-1, d)[:s]

    out = lax.map(one, tuple(rearrange(x, "n s h d -> (n h) s d") for x in (q, k, v)))
    return rearrange(out, "(n h) s d -> n s h d", n=frames, h=heads)


def reduce_attention(q: Array, k: Array, v: Array) -> Array:
    """Computes attention over few keys (frames) by multiply-and-reduce, with no limit on the batch.

    Flash kernels reject or corrupt batches above `CUDNN_BATCH`, which pixels x videos exceed, and matrix units waste
    most of a 14 x 14 product. In fp32 the products fuse into the reductions, except in the gradient on CPU.
    All arrays are `[..., t, heads, d]`.
    """
    q, k, values = (jnp.expand_dims(fp32(x), axis) for x, axis in ((q, -3), (k, -4), (v, -4)))
    weights = jax.nn.softmax(jnp.sum(q * k, axis=-1) / math.sqrt(q.shape[-1]), axis=-2)
    return jnp.sum(weights[..., None] * values, axis=-3).astype(v.dtype)


def splash_attention(q: Array, k: Array, v: Array, block: int = SPLASH_BLOCK) -> Array:
    """Computes flash attention with JAX's Pallas kernel for TPU ("splash"); on CPU, slowly, by interpreting it.

    Blocks are the largest multiples of 128 up to `block` that divide the number of tokens. The number of keys must be a
    multiple of 128; queries, of which a device may hold few, are padded. All arrays are `[n, s, heads, d]`.

    Raises:
      UserError: if the number of keys is not a multiple of 128.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (_, s, heads, d), keys = q.shape, k.shape[1]
    if keys % LANES:
        raise UserError(f"attention kernel 'splash': {keys} tokens are not a multiple of {LANES}; choose auto")
    q = jnp.pad(q / math.sqrt(d), ((0, 0), (0, -s % LANES), (0, 0), (0, 0)))
    rows, columns = (max(b for b in range(LANES, block + 1, LANES) if n % b == 0) for n in (q.shape[1], keys))
    sizes = splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    mask = masks.MultiHeadMask([masks.FullMask((q.shape[1], keys))] * heads)
    kernel = splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=platform() == "cpu"
    )
    out = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q, k, v)))
    # pyrefly: ignore[missing-attribute]  # a tuple only with save_residuals=True
    return out.swapaxes(1, 2)[:, :s].astype(v.dtype)


def attention(q: Array, k: Array, v: Array, kernel: str = "auto") -> Array:
    """Computes self-attention over tokens `[n, s, heads, d]`, or over the frames t of `[b, s, t, heads, d]`.

    Args:
      kernel: "einsum", "blocked", "looped" (CPU), "reduce", "cudnn" (GPU, fp16/bf16), "splash" (TPU) or "auto", see
        `choose_kernel`. Frames need "einsum", "reduce" or "auto".

    Raises:
      UserError: if the kernel is unknown, or known to fail on these arrays.
    """
    kernel = choose_kernel(q) if kernel == "auto" else kernel
    if kernel == "reduce":
        return reduce_attention(q, k, v)
    if q.ndim == 5 and kernel == "einsum":
        return einsum_attention(q, k, v)
    if kernel == "cudnn":
        if q.shape[0] > CUDNN_BATCH:
            raise UserError(f"attention kernel 'cudnn': a batch of {q.shape[0]} exceeds {CUDNN_BATCH}; choose auto")
        return per_row(partial(jax.nn.dot_product_attention, implementation="cudnn"), q, k, v)
    alone = {"splash": splash_attention, "looped": looped_attention}  # XLA cannot partition these
    kernels = {"einsum": einsum_attention, "blocked": blocked_attention} | alone
    if kernel not in kernels:
        raise UserError(f"attention kernel {kernel!r}: choose auto, cudnn, reduce or one of {sorted(kernels)}")
    return per_row(kernels[kernel], q, k, v, partitioned=kernel not in alone)


def choose_kernel(q: Array) -> str:
    """Returns the name of the attention kernel for queries `q`: a flash kernel where one is legal.

    Spatial attention, `q [n, s, heads, d]`: for fp16 and bf16 heads of about 64 channels, "cudnn" on GPU, and "splash"
    on TPU if the number of tokens is a multiple of 128; on CPU above `FEW_TOKENS`, "looped"; otherwise "einsum" up to
    `QUERY_BLOCK` tokens and "blocked" above, so that large score matrices never exist. Attention over frames,
    `q [b, s, t, heads, d]`: "einsum" on CPU, elsewhere "reduce".
    """
    if q.ndim == 5:
        return "einsum" if platform() == "cpu" else "reduce"
    n, s, _, d = q.shape
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if half and platform() == "gpu" and d <= 128 and d % 8 == 0 and n <= CUDNN_BATCH:
        return "cudnn"
    if half and platform() == "tpu" and d in (64, 128) and s % LANES == 0:
        return "splash"
    if platform() == "cpu" and s > FEW_TOKENS:
        return "looped"
    return "blocked" if s > QUERY_BLOCK else "einsum"


class Identity(nnx.Module):
    """Placeholder for diffusers' Dropout in `net`, so that indices match."""

    def __call__(self, x: Array) -> Array:
        return x


class Attention(nnx.Module):
    """Multi-head attention (diffusers Attention): self-attention, or cross-attention to a single key by `cross`.

    SVD's context is a single CLIP token, so the softmax over it is 1 and the layer equals `to_out(to_v(context))`;
    `to_q` and `to_k` are kept so that conversion loses nothing, and receive no gradient.
    """

    def __init__(self, channels: int, heads: int, *, context_dim=None, qkv_bias=False, kernel="auto", **kw):
        self.to_q = Linear(channels, channels, use_bias=qkv_bias, **kw)
        self.to_k = Linear(context_dim or channels, channels, use_bias=qkv_bias, **kw)
        self.to_v = Linear(context_dim or channels, channels, use_bias=qkv_bias, **kw)
        self.to_out = nnx.List([Linear(channels, channels, **kw)])
        self.heads, self.kernel = heads, kernel

    def __call__(self, x: Array) -> Array:
        """Returns self-attention over the tokens of `x [n, s, c]` or the frames of `x [b, s, t, c]`, in its shape."""
        q, k, v = (
            rearrange(project(x), "... s (heads d) -> ... s heads d", heads=self.heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out[0](rearrange(attention(q, k, v, self.kernel), "... s heads d -> ... s (heads d)"))

    def cross(self, context: Array) -> Array:
        """Returns `[b, c]`: cross-attention of any query to the single token `context [b, d]`."""
        return self.to_out[0](self.to_v(context))


class GEGLU(nnx.Module):
    """Linear layer to (value, gate), then value * gelu(gate) with the exact (erf) GELU (diffusers GEGLU)."""

    def __init__(self, i: int, o: int, **kw):
        self.proj = Linear(i, 2 * o, **kw)

    def __call__(self, x: Array) -> Array:
        if platform() != "cpu":  # split before `gated` casts: on TPU the product would be fp32 too
            return gated(*jnp.split(self.proj(x), 2, axis=-1))
        # On CPU the kernel is split instead, so that the gradient does not join two arrays of this width, and the gate
        # is recomputed, or XLA keeps four more such arrays for it. On TPU both would cost copies.
        # pyrefly: ignore[unsupported-operation]  # the projection has a bias
        x, kernel, bias = promote((x, self.proj.kernel[...], self.proj.bias[...]), dtype=self.proj.dtype)
        halves = zip(jnp.split(kernel, 2, axis=1), jnp.split(bias, 2), strict=True)
        return jax.checkpoint(gated)(*(matmul(x, part) + shift for part, shift in halves))


def gated(value: Array, gate: Array) -> Array:
    """Returns `value * gelu(gate)` in the dtype of `value`, computed in fp32 as torch does."""
    dtype = value.dtype
    value, gate = fp32(value), fp32(gate)
    return (value * (0.5 * gate * (1 + lax.erf(gate / math.sqrt(2))))).astype(dtype)


class FeedForward(nnx.Module):
    """GEGLU to 4c, then Linear back (diffusers FeedForward)."""

    def __init__(self, channels: int, **kw):
        self.net = nnx.List([GEGLU(channels, 4 * channels, **kw), Identity(), Linear(4 * channels, channels, **kw)])

    def __call__(self, x: Array) -> Array:
        return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention to one key and feed-forward, pre-norm (diffusers BasicTransformerBlock).

    `temporal=True` puts a residual feed-forward in front (TemporalBasicTransformerBlock). `norm2` normalizes the
    queries of the cross-attention, which a single key makes irrelevant; it is kept so that conversion loses nothing.
    """

    def __init__(self, channels: int, heads: int, context_dim: int, *, temporal: bool, kernel: str, **kw):
        if temporal:
            self.norm_in = LayerNorm(channels, **kw)
            self.ff_in = FeedForward(channels, **kw)
        self.norm1 = LayerNorm(channels, **kw)
        self.attn1 = Attention(channels, heads, kernel=kernel, **kw)
        self.norm2 = LayerNorm(channels, **kw)
        self.attn2 = Attention(channels, heads, context_dim=context_dim, **kw)
        self.norm3 = LayerNorm(channels, **kw)
        self.ff = FeedForward(channels, **kw)
        self.temporal = temporal

    def __call__(self, x: Array, context: Array) -> Array:
        """Returns `[b, t, s, c]` from `x [b, t, s, c]` and `context [b, d]`; attends over s, or over t if temporal."""
        b = x.shape[0]
        if self.temporal:
            x = self.ff_in(self.norm_in(x)) + x
            tokens = rearrange(self.norm1(x), "b t s c -> b s t c")  # b and s stay apart: each may be sharded
            x = x + rearrange(self.attn1(tokens), "b s t c -> b t s c")
        else:
            tokens = rearrange(self.norm1(x), "b t s c -> (b t) s c")
            x = x + rearrange(self.attn1(tokens), "(b t) s c -> b t s c", b=b)
        x = x + rearrange(self.attn2.cross(context), "b c -> b 1 1 c")
        return x + self.ff(self.norm3(x))


class TransformerSpatioTemporal(nnx.Module):
    """Spatial block, then frame embedding and temporal block, mixed (diffusers TransformerSpatioTemporalModel)."""

    def __init__(self, channels: int, heads: int, context_dim: int, *, groups: int, kernel: str, remat: bool, **kw):
        block = partial(TransformerBlock, channels, heads, context_dim, **kw)
        self.norm = GroupNorm(channels, groups=groups, eps=1e-6, per_frame=True, **kw)
        self.proj_in = Linear(channels, channels, **kw)
        self.transformer_blocks = nnx.List([block(temporal=False, kernel=kernel)])
        self.temporal_transformer_blocks = nnx.List([block(temporal=True, kernel="auto")])
        self.time_pos_embed = TimestepEmbedding(channels, 4 * channels, channels, **kw)
        self.time_mixer = AlphaBlender(0.5, **kw)
        self.proj_out = Linear(channels, channels, **kw)
        self.remat = remat

    def __call__(self, x: Array, context: Array) -> Array:
        """Returns `[b, t, h, w, c]` from `x [b, t, h, w, c]` and `context [b, d]`."""
        _, t, height, width, c = x.shape

        def spatial(x: Array) -> Array:
            tokens = self.proj_in(flat(self.norm(x)))
            return self.transformer_blocks[0](tokens, context)

        def temporal(tokens: Array) -> Array:
            frames = self.time_pos_embed(sinusoid(jnp.arange(t), c).astype(tokens.dtype))
            moved = self.temporal_transformer_blocks[0](tokens + frames[:, None], context)
            return self.proj_out(self.time_mixer(tokens, moved))

        tokens = remat(temporal, self.remat)(remat(spatial, self.remat)(x))
        return rows(x + unflat(tokens, height, width))
