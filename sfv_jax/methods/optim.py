"""Optimizers (SM3 as in SF-V, AdamW and Muon) and the moving average of parameters."""

import functools
import json
import subprocess
import sys
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sfv_jax.errors import UserError
from sfv_jax.models import tree

Array = jax.Array
TEMPORAL = r"(^|\.)(temporal_res_block|temporal_transformer_blocks|time_pos_embed|time_mixer)\."
TRAINABLE = {"all": "", "temporal": TEMPORAL, "spatial": f"^(?!.*{TEMPORAL})"}


class SM3State(NamedTuple):
    """State of SM3 for each parameter, fp32.

    Size-1 axes need no accumulator: theirs is never the minimum.

    Attributes:
      accumulators: `{"0": [n_0], "3": [n_3], ...}`, one vector for each axis r of n_r > 1; a scalar has a scalar "0".
      momentum: an array of the parameter's shape.
    """

    accumulators: optax.Params
    momentum: optax.Params


def scale_by_sm3(
    momentum: float = 0.5, beta: float = 0.999, max_decay: float = 1.0, eps: float = 1e-30
) -> optax.GradientTransformation:
    """Returns SM3-II (arXiv 1901.11150) with the momentum and decay arguments of the torch-SM3 package.

    nu = beta min_r mu_r + (1 - beta) g^2 (without the factors if beta = 0), mu_r = max(mu_r, max of nu over the other
    axes), m = momentum m + (1 - momentum) g / sqrt(nu + eps), update = m. Tensors of rank 0 and 1 have one full
    accumulator. There is no bias correction: the first update is (1 - momentum) / sqrt(1 - beta), about 16 times the
    learning rate at the defaults, so consider a warm-up. The state is fp32 whatever the dtype of the parameters.

    mu never falls: one early spike of the gradient shortens the steps of a layer for ever. With `max_decay` rho below 1
    (not in torch-SM3), mu_r = max(rho mu_r, max of nu over the other axes), which forgets a spike in about
    1 / (1 - rho) steps.

    `optax.sm3` has no beta; `optax.scale_by_sm3` has no running maximum, rejects 0-d parameters, keeps its state in the
    parameter dtype, and has an eps that shortens steps of small gradients.
    """

    def init(params):
        def accumulators(p):
            zeros = {str(r): jnp.zeros(n, jnp.float32) for r, n in enumerate(p.shape) if n > 1 or p.size == 1}
            return zeros or {"0": jnp.zeros((), jnp.float32)}

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return SM3State(jax.tree.map(accumulators, params), zeros)

    def second_moment(g, mus):
        covers = [jax.lax.broadcast_in_dim(mu, g.shape, (int(r),)[: g.ndim]) for r, mu in mus.items()]
        cover = functools.reduce(jnp.minimum, covers)
        return beta * cover + (1 - beta) * g**2 if beta else cover + g**2

    def cover_update(mus, nu):
        others = {r: tuple(axis for axis in range(nu.ndim) if axis != int(r)) for r in mus}
        return {r: jnp.maximum(max_decay * mu, jnp.max(nu, axis=others[r])) for r, mu in mus.items()}

    def update(updates, state, params=None):
        del params
        grads, tree = jax.tree.flatten(jax.tree.map(lambda g: g.astype(jnp.float32), updates))
        covers, moments = tree.flatten_up_to(state.accumulators), tree.flatten_up_to(state.momentum)
        nus = [second_moment(g, mus) for g, mus in zip(grads, covers, strict=True)]
        steps = [
            momentum * m + (1 - momentum) * g * jax.lax.rsqrt(nu + eps)
            for m, g, nu in zip(moments, grads, nus, strict=True)
        ]
        covers = [cover_update(mus, nu) for mus, nu in zip(covers, nus, strict=True)]
        return tree.unflatten(steps), SM3State(tree.unflatten(covers), tree.unflatten(steps))

    return optax.GradientTransformation(init, update)


def scale_by_muon(momentum: float = 0.95, b1: float = 0.9, b2: float = 0.999) -> optax.GradientTransformation:
    """Returns Muon (Jordan et al. 2024) for kernels and tables, with Adam for vectors and scalars.

    A kernel `[..., out]` is the matrix `[prod(...), out]`. Its Nesterov momentum is replaced by the nearest matrix with
    orthonormal rows or columns, times 0.2 sqrt(max(rows, columns)): the root mean square of the elements is then about
    0.2, as of AdamW's updates, so that AdamW's learning rates fit (Liu et al., arXiv 2502.16982). The state is fp32.

    `optax.contrib.muon` orthogonalizes each matrix by itself; here matrices of one shape are stacked, so that hundreds
    of kernels compile as some dozens.
    """

    def orthogonalized(updates, params=None):
        del params
        kernels, tree = jax.tree.flatten(updates)
        groups: dict[tuple[int, int], list[int]] = {}
        for n, kernel in enumerate(kernels):
            groups.setdefault((kernel.size // kernel.shape[-1], kernel.shape[-1]), []).append(n)
        for shape, members in groups.items():
            matrices = orthogonalize(jnp.stack([kernels[n].reshape(shape) for n in members]))
            for n, matrix in zip(members, 0.2 * max(shape) ** 0.5 * matrices, strict=True):
                kernels[n] = matrix.reshape(kernels[n].shape)
        return tree.unflatten(kernels)

    nesterov = optax.trace(momentum, nesterov=True, accumulator_dtype=jnp.float32)
    kernels, vectors = optax.chain(nesterov, optax.stateless(orthogonalized)), optax.scale_by_adam(b1, b2)
    kinds: dict[Hashable, optax.GradientTransformation] = {"kernel": kernels, "vector": vectors}
    return optax.partition(kinds, lambda params: jax.tree.map(lambda p: "kernel" if p.ndim > 1 else "vector", params))


def orthogonalize(matrices: Array) -> Array:
    """Returns matrices `[n, rows, columns]` with their singular values moved to between about 0.7 and 1.2.

    Five steps of Newton's and Schulz's iteration, with the quintic polynomial of Jordan et al. 2024, "Muon".
    """
    if tall := matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mT
    x = matrices / (jnp.linalg.norm(matrices, axis=(1, 2), keepdims=True) + 1e-8)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def make_optimizer(config) -> optax.GradientTransformation:
    """Returns the optimizer of a config section.

    Args:
      config: `name` ("sm3", "adamw" or "muon"), that optimizer's own fields, `lr`, `delay_steps` (nothing moves, but
        the optimizer sees the gradients), `warmup_steps` (then, linear), `schedule` (after the warm-up: "constant", or
        "cosine" or "linear" to zero in `decay_steps`) and `clip_norm`.
    """
    if config.name == "sm3":
        scale = scale_by_sm3(config.momentum, config.beta, config.max_decay)
    else:
        adam = optax.scale_by_adam(config.b1, config.b2)
        scale = adam if config.name == "adamw" else scale_by_muon(config.momentum, config.b1, config.b2)
        scale = optax.chain(scale, optax.add_decayed_weights(config.weight_decay))
    schedules = {
        "constant": lambda: optax.schedules.constant_schedule(config.lr),
        "cosine": lambda: optax.schedules.cosine_decay_schedule(config.lr, config.decay_steps),
        "linear": lambda: optax.schedules.linear_schedule(config.lr, 0.0, config.decay_steps),
    }
    schedule = schedules[config.schedule]()
    if config.warmup_steps:
        warmup = optax.schedules.linear_schedule(config.lr / config.warmup_steps, config.lr, config.warmup_steps)
        schedule = optax.schedules.join_schedules([warmup, schedule], [config.warmup_steps])
    if config.delay_steps:
        still = optax.schedules.constant_schedule(0.0)
        schedule = optax.schedules.join_schedules([still, schedule], [config.delay_steps])
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, scale, optax.scale_by_learning_rate(schedule))


def ema_update(ema: tree.Params, params: tree.Params, decay: float | Array) -> tree.Params:
    """Returns decay * ema + (1 - decay) * params, in the dtype of `ema`."""
    return jax.tree.map(lambda e, p: (decay * e + (1 - decay) * p).astype(e.dtype), ema, params)


def trainable(params: tree.Params, which: str) -> tree.Params:
    """Returns the part of UNet parameters that is trained.

    Args:
      params: nested dict of parameters or shapes.
      which: "all"; "temporal" for the temporal residual and transformer blocks, the embedding of the frame index and
        the mix factors; "spatial" for the rest; or a regular expression that is searched for in dotted paths
        ("up_blocks|conv_out").
    """
    return tree.select(params, TRAINABLE.get(which, which))


PATIENCE = 5.0  # seconds for the search of all paths of a UNet; usual patterns take milliseconds
SEARCH = "import json, re, sys; pattern, *paths = json.load(sys.stdin); [re.search(pattern, path) for path in paths]"


def check_trainable(params: tree.Params, which: str) -> None:
    """Checks that `trainable(params, which)` finds parameters, and soon.

    A regular expression such as `(a+)+$` may take years for one path. Python's search cannot be interrupted from
    outside, so a process of its own tries a pattern with repetitions first and is ended after `PATIENCE` seconds.

    Raises:
      UserError: if it finds nothing, or takes longer.
    """
    if which not in TRAINABLE and set(which) & set("*+?{"):
        content = json.dumps([which, *tree.flatten(params)])
        try:
            subprocess.run([sys.executable, "-I", "-S", "-c", SEARCH], input=content, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:
            advice = "write it without nested repetitions such as (a+)+"
            raise UserError(f"trainable {which!r} takes more than {PATIENCE:g} s to search: {advice}") from error
    if not trainable(params, which):
        raise UserError(f"trainable {which!r} finds no parameter: use 'all', 'temporal', 'spatial' or parts of paths")


def apply(optimizer: optax.GradientTransformation, grads, opt_state, params) -> tuple[Any, optax.OptState, Array]:
    """Makes one optimizer step; returns (new params, new optimizer state, Euclidean norm of the update, fp32)."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, global_norm(updates)


def global_norm(tree_: optax.Params) -> Array:
    """Returns the Euclidean norm of all leaves together, fp32."""
    return jnp.sqrt(sum_of_squares(jax.tree.leaves(tree_)))


def sum_of_squares(arrays: Iterable[Array]) -> Array:
    """Returns the sum of squares of all elements of `arrays`, fp32.

    Adds equal-length vectors first, then reduces once: a network has hundreds of them, and hundreds of tiny reductions
    are slow to compile and to run.
    """
    groups: dict = {}
    for n, x in enumerate(arrays):
        groups.setdefault(x.shape if x.ndim == 1 else n, []).append(jnp.square(x.astype(jnp.float32)))
    # pyrefly: ignore[bad-return]  # the integer 0 only without arrays
    return sum(jnp.sum(sum(group[1:], start=group[0])) for group in groups.values())
