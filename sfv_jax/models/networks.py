"""Generator, discriminator backbone and heads as pure functions of their parameters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sfv_jax.choices import auto_dtype
from sfv_jax.errors import UserError
from sfv_jax.models import tree
from sfv_jax.models.discriminator import DiscriminatorConfig, DiscriminatorHeads
from sfv_jax.models.partitioning import platform
from sfv_jax.models.unet import UNet, UNetConfig

Params = tree.Params
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def compute_dtype(name: str):
    """Returns the dtype of a name of `DTYPES`, or of "auto" on the platform at hand.

    Raises:
      UserError: if the name is unknown.
    """
    name = auto_dtype(platform()) if name == "auto" else name
    if name not in DTYPES:
        raise UserError(f"dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class Networks:
    """Generator, frozen backbone and heads as functions of their parameters, with abstract parameter trees.

    `dtype` is the compute dtype of all three. Parameters are cast to it where they are used; those of the backbone,
    which are never updated, are stored in it.

    Raises:
      UserError: if `dtype` is neither one of `DTYPES` nor "auto" (`choices.auto_dtype` of the platform at hand).
    """

    unet: UNetConfig
    discriminator: DiscriminatorConfig | None = None
    dtype: str = "float32"
    abstract: dict[str, Params] = field(init=False, compare=False)
    graphs: dict[str, nnx.GraphDef[Any]] = field(init=False, compare=False)

    def __post_init__(self):
        dtype = compute_dtype(self.dtype)
        built: dict[str, tuple[nnx.GraphDef[Any], Params]] = {"generator": tree.abstract(UNet, self.unet, dtype=dtype)}
        if self.discriminator is not None:
            built["backbone"] = tree.abstract(UNet, self.unet, dtype=dtype, param_dtype=dtype, encoder_only=True)
            built["heads"] = tree.abstract(DiscriminatorHeads, self.discriminator, dtype=dtype)
        object.__setattr__(self, "graphs", {k: graph for k, (graph, _) in built.items()})
        object.__setattr__(self, "abstract", {k: params for k, (_, params) in built.items()})

    def generator(self, params: Params) -> Callable:
        """Returns the UNet as `(input, c_noise, context, ids) -> raw [b, t, h, w, c]`."""
        return tree.build(self.graphs["generator"], params)

    def encode(self, params: Params) -> Callable:
        """Returns the discriminator's backbone as `(input, c_noise, context, ids) -> features`."""
        return tree.build(self.graphs["backbone"], params).encode

    def heads(self, params: Params) -> Callable:
        """Returns the heads as `(features, image_embed, c_noise) -> logits`."""
        return tree.build(self.graphs["heads"], params)

    def backbone_params(self, unet_params: Params) -> Params:
        """Returns the encoder half of UNet parameters in the backbone's dtype.

        It is a copy, because training donates the generator's parameters.
        """
        half = tree.subtree(unet_params, self.abstract["backbone"])
        return jax.tree.map(lambda x, like: jnp.array(x, like.dtype), half, self.abstract["backbone"])

    def init_generator(self, seed: int) -> Params:
        """Returns fresh UNet parameters, fp32."""
        return tree.init(UNet, self.unet, seed, dtype=compute_dtype(self.dtype))

    def init_heads(self, key: jax.Array) -> Params:
        """Returns fresh head parameters, fp32."""
        return tree.init(DiscriminatorHeads, self.discriminator, key, dtype=compute_dtype(self.dtype))
