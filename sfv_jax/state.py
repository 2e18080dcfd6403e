"""What a training method works on: the networks as pure functions, and gradients over micro-batches.

State is nested dicts of arrays; modules appear only inside `Networks`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from sfv_jax import optim
from sfv_jax.models import tree
from sfv_jax.models.discriminator import DiscriminatorConfig, DiscriminatorHeads
from sfv_jax.models.unet import UNet, UNetConfig

Params = tree.Params
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclass(frozen=True)
class Networks:
    """Generator, frozen backbone and heads as functions of their parameters, with abstract parameter trees.

    `dtype` is the compute dtype of all three; parameters are cast where they are used, except those of the backbone,
    which are kept in `dtype` (they are never updated).
    """

    unet: UNetConfig
    discriminator: DiscriminatorConfig | None = None
    dtype: str = "float32"
    abstract: dict[str, Params] = field(init=False, compare=False)
    graphs: dict[str, nnx.GraphDef] = field(init=False, compare=False)

    def __post_init__(self):
        dtype = DTYPES[self.dtype]
        built = {"generator": tree.abstract(UNet, self.unet, dtype=dtype)}
        if self.discriminator is not None:
            built["backbone"] = tree.abstract(UNet, self.unet, dtype=dtype, param_dtype=dtype, encoder_only=True)
            built["heads"] = tree.abstract(DiscriminatorHeads, self.discriminator, dtype=dtype)
        object.__setattr__(self, "graphs", {k: graph for k, (graph, _) in built.items()})
        object.__setattr__(self, "abstract", {k: params for k, (_, params) in built.items()})

    def generator(self, params: Params) -> Callable:
        """`(input, c_noise, context, ids) -> raw [b, t, h, w, c]`."""
        return tree.build(self.graphs["generator"], params)

    def encode(self, params: Params) -> Callable:
        """`(input, c_noise, context, ids) -> features`, by the discriminator's backbone."""
        return tree.build(self.graphs["backbone"], params).encode

    def heads(self, params: Params) -> Callable:
        """`(features, image_embed, c_noise) -> logits`."""
        return tree.build(self.graphs["heads"], params)

    def backbone_params(self, unet_params: Params) -> Params:
        """A copy of the encoder half of UNet parameters, in the backbone's dtype: training donates the generator's."""
        half = tree.subtree(unet_params, self.abstract["backbone"])
        return jax.tree.map(lambda x, like: jnp.array(x, like.dtype), half, self.abstract["backbone"])

    def init_generator(self, seed: int) -> Params:
        """Fresh UNet parameters, fp32."""
        return tree.init(UNet, self.unet, seed, dtype=DTYPES[self.dtype])

    def init_heads(self, seed: int) -> Params:
        """Fresh head parameters, fp32."""
        return tree.init(DiscriminatorHeads, self.discriminator, seed, dtype=DTYPES[self.dtype])


def accumulate(gradients: Callable, params, batch: dict, key: jax.Array, steps: int):
    """Mean of `gradients(params, micro_batch, key) -> tree` over `steps` micro-batches, one at a time (lax.scan).

    Every leaf of `batch` is `[steps * b, ...]`; micro-batch i takes every `steps`-th sample, so that a batch sharded
    over devices stays in place, and gets `fold_in(key, i)`.

    Raises:
      ValueError: if the batch does not divide.
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
        # Tied to the turn, or XLA casts and gathers all parameters once before the loop and keeps them through it.
        held, inputs = jax.lax.optimization_barrier((params, inputs))
        return jax.tree.map(jnp.add, total, gradients(held, *inputs)), None

    shapes = jax.eval_shape(gradients, params, jax.tree.map(lambda x: x[0], micro), keys[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, (micro, keys))
    return jax.tree.map(lambda x: x / steps, total)


def check_recipe(config, networks: Networks) -> Networks:
    """`networks`, if `config.trainable` and `config.generator_optimizer` are possible with them.

    Raises:
      ValueError: saying which of them is not.
    """
    optim.make_optimizer(config.generator_optimizer)
    optim.trainable(networks.abstract["generator"], config.trainable)
    return networks


def generator_state(config, params: Params) -> Params:
    """What every method starts with: `step`, `generator` and `ema` (fp32 copies of `params`), `opt_g`.

    The optimiser knows only the parameters that `config.trainable` names.
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
    """The base model's parameters in the compute dtype, to be kept as they are: training donates its own copy."""
    return jax.tree.map(lambda x: jnp.array(x, DTYPES[config.dtype]), params)


def update_generator(config, state: Params, grads: Params, ema_decay) -> tuple[Params, dict]:
    """New `generator`, `ema` and `opt_g` from gradients of the trained part; frozen parameters are left as they are.

    Also returns `norm/generator_update`, and `norm/ema_distance` between the new parameters and their average.
    """
    generator, ema = state["generator"], state["ema"]
    optimizer = optim.make_optimizer(config.generator_optimizer)
    part, opt_g, moved = optim.apply(optimizer, grads, state["opt_g"], tree.subtree(generator, grads))
    average = optim.ema_update(tree.subtree(ema, grads), part, ema_decay)
    distance = optim.global_norm(jax.tree.map(jnp.subtract, part, average))
    new = {"generator": tree.merge(generator, part), "ema": tree.merge(ema, average), "opt_g": opt_g}
    return new, {"norm/generator_update": moved, "norm/ema_distance": distance}


def watch(**trees: Params) -> dict[str, jax.Array]:
    """`norm/NAME` of each tree but the batch, and `nonfinite/NAME/BLOCK`: whether a block holds NaN or infinity.

    A block is what the first part of a path names, or the first two where blocks are numbered ("down_blocks.0"). Both
    come from one sum of squares per block, so an overflow of the sum counts as not finite.
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
