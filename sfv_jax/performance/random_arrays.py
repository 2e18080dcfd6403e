"""Random arrays for trees of sharded `ShapeDtypeStruct`s."""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np


def random_arrays(abstract, seed: int = 0):
    """Returns random arrays for a tree of sharded `ShapeDtypeStruct`s.

    The path of an array decides its content: kernels and embeddings are normal, divided by the square root of their
    fan-in; norm scales are 1; biases, counters and optimizer state are 0; other integers are uniform in 0..255; all
    other arrays are standard normal.

    Args:
      abstract: shapes, dtypes and shardings.
      seed: of the random numbers.
    """

    def array(number: int, path, x):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        leaf = name.rsplit(".", 1)[-1]
        if "opt_" in name or leaf in ("bias", "step", "count"):
            scale = 0.0
        elif leaf == "scale":
            return _filler(x.shape, x.dtype, x.sharding, None)()
        else:
            scale = float(np.prod(x.shape[:-1])) ** -0.5 if leaf in ("kernel", "embedding") else 1.0
        return _filler(x.shape, x.dtype, x.sharding, scale)(jax.random.fold_in(jax.random.key(seed), number))

    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    return structure.unflatten([array(number, *leaf) for number, leaf in enumerate(leaves)])


@cache
def _filler(shape, dtype, sharding, scale: float | None) -> Callable:
    if scale is None:
        return jax.jit(lambda: jnp.ones(shape, dtype), out_shardings=sharding)
    if not scale:
        return jax.jit(lambda key: jnp.zeros(shape, dtype), out_shardings=sharding)
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.jit(
            lambda key: jax.random.randint(key, shape, 0, 256, jnp.int32).astype(dtype), out_shardings=sharding
        )
    return jax.jit(lambda key: (scale * jax.random.normal(key, shape)).astype(dtype), out_shardings=sharding)
