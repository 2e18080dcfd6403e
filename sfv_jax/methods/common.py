"""Parts that all training methods share: gradients over micro-batches, the generator's state and update, norms.

State is nested dicts of arrays; modules appear only inside `Networks`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from sfv_jax.methods import optim
from sfv_jax.models import tree
from sfv_jax.models.networks import Params, compute_dtype
from sfv_jax.runtime.seeds import stream

Trained = TypeVar("Trained")  # networks with parameter shapes `abstract["generator"]`


def step_key(config, step: jax.Array | int) -> jax.Array:
    """Returns the random key of a step, a function of `config.seed` and `step` alone, for `accumulate`."""
    return jax.random.fold_in(stream(config.seed, "steps"), step)


def accumulate(gradients: Callable, params, batch: dict, key: jax.Array, steps: int):
    """Returns the mean of `gradients(params, micro_batch, key) -> tree` over `steps` micro-batches, run one at a time.

    Every leaf of `batch` is `[steps * b, ...]`. Micro-batch i consists of every `steps`-th sample from i on, so that a
    batch sharded over devices stays in place; its key is `fold_in(key, i)`.

    Raises:
      ValueError: if the batch size is not a multiple of `steps`.
    """
    size = len(jax.tree.leaves(batch)[0])
    if size % steps:
        raise ValueError(f"batch of {size} does not divide into {steps} accumulation steps")
    if steps == 1:
        return gradients(params, batch, jax.random.fold_in(key, 0))
    micro = jax.tree.map(lambda x: x.reshape(size // steps, steps, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(steps))
    gradients = jax.jit(gradients, inline=True)  # traced once, for the shapes and for the loop

    def body(total, inputs):
        # Ties the parameters to the iteration; otherwise XLA casts and gathers all of them before the loop and keeps
        # these copies throughout.
        held, inputs = jax.lax.optimization_barrier((params, inputs))
        return jax.tree.map(jnp.add, total, gradients(held, *inputs)), None

    shapes = jax.eval_shape(gradients, params, jax.tree.map(lambda x: x[0], micro), keys[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, (micro, keys))
    return jax.tree.map(lambda x: x / steps, total)


def check_recipe(config, networks: Trained) -> Trained:
    """Returns `networks` after checking `config.trainable` against them.

    Raises:
      UserError: if `config.trainable` finds no parameter, or takes too long.
    """
    shapes: Any = networks
    optim.check_trainable(shapes.abstract["generator"], config.trainable)
    return networks


def generator_state(config, params: Params) -> Params:
    """Returns the state common to all methods: `step`, `generator` and `ema` (fp32 copies of `params`), `opt_g`.

    The optimizer state covers only the parameters that `config.trainable` selects.
    """
    generator = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    optimizer = optim.make_optimizer(config.generator_optimizer)
    return {
        "step": jnp.zeros((), jnp.int32),
        "generator": generator,
        "ema": jax.tree.map(jnp.copy, generator),
        "opt_g": optimizer.init(optim.trainable(generator, config.trainable)),
    }


def frozen_copy(config, params: Params) -> Params:
    """Returns a copy of the base model's parameters in the compute dtype, since training donates the original."""
    return jax.tree.map(lambda x: jnp.array(x, compute_dtype(config.dtype)), params)


def update_generator(config, state: Params, grads: Params, ema_decay) -> tuple[Params, dict]:
    """Updates `generator`, `ema` and `opt_g` by gradients of the trained part; other parameters stay unchanged.

    Returns:
      state: the three new entries.
      metrics: `norm/generator_update`, and `norm/ema_distance` between the new parameters and their average.
    """
    generator, ema = state["generator"], state["ema"]
    optimizer = optim.make_optimizer(config.generator_optimizer)
    part, opt_g, moved = optim.apply(optimizer, grads, state["opt_g"], tree.subtree(generator, grads))
    average = optim.ema_update(tree.subtree(ema, grads), part, ema_decay)
    distance = optim.global_norm(jax.tree.map(jnp.subtract, part, average))
    new = {"generator": tree.merge(generator, part), "ema": tree.merge(ema, average), "opt_g": opt_g}
    return new, {"norm/generator_update": moved, "norm/ema_distance": distance}


def warmed_decay(config, step: jax.Array) -> jax.Array:
    """Returns the decay of the moving average after `step` steps: `config.ema_decay`, and less at the start.

    With a constant decay the initialization would dominate the average for 1 / (1 - decay) steps.
    """
    return jnp.minimum(config.ema_decay, (1 + step) / (10 + step))


def watch(**trees: Params) -> dict[str, jax.Array]:
    """Returns `norm/NAME` of each tree except the batch, and `nonfinite/NAME/BLOCK`: NaN or infinity in a block.

    A block is named by the first part of a path, or by the first two if blocks are numbered ("down_blocks.0"). Both
    metrics come from one sum of squares per block, so an overflow of the sum counts as not finite.
    """
    metrics = {}
    for name, params in trees.items():
        blocks: dict[str, list] = {}
        for path, x in tree.flatten(params).items():
            parts = path.split(".")
            block = ".".join(parts[: 2 if parts[1:] and parts[1].isdigit() else 1])
            blocks.setdefault(block, []).append(x)
        squares = {block: optim.sum_of_squares(arrays) for block, arrays in blocks.items()}
        if name != "batch":
            metrics[f"norm/{name}"] = jnp.sqrt(sum(squares.values()))
        metrics |= {f"nonfinite/{name}/{block}": ~jnp.isfinite(square) for block, square in squares.items()}
    return metrics
