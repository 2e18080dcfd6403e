"""What a training method works on: the networks as pure functions, and gradients over micro-batches.

State is nested dicts of arrays; modules appear only inside `Networks`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

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
        return nnx.merge(self.graphs["generator"], params)

    def encode(self, params: Params) -> Callable:
        """`(input, c_noise, context, ids) -> features`, by the discriminator's backbone."""
        return nnx.merge(self.graphs["backbone"], params).encode

    def heads(self, params: Params) -> Callable:
        """`(features, image_embed, c_noise) -> logits`."""
        return nnx.merge(self.graphs["heads"], params)

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


def accumulate(gradients: Callable, batch: dict, key: jax.Array, steps: int):
    """Mean of `gradients(micro_batch, key) -> tree` over `steps` micro-batches, one at a time (lax.scan).

    Every leaf of `batch` is `[steps * b, ...]`; micro-batch i takes every `steps`-th sample, so that a batch sharded
    over devices stays in place, and gets `fold_in(key, i)`.

    Raises:
      ValueError: if the batch does not divide.
    """
    size = len(jax.tree.leaves(batch)[0])
    if size % steps:
        raise ValueError(f"batch of {size} does not divide into {steps} accumulation steps")
    if steps == 1:
        return gradients(batch, jax.random.fold_in(key, 0))
    micro = jax.tree.map(lambda x: x.reshape(size // steps, steps, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(steps))

    def body(total, inputs):
        return jax.tree.map(jnp.add, total, gradients(*inputs)), None

    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], micro), keys[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, (micro, keys))
    return jax.tree.map(lambda x: x / steps, total)


def global_norm(tree_: Params) -> jax.Array:
    """Euclidean norm of all leaves together, fp32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree_)))
