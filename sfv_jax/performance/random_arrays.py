"""Random arrays for trees of sharded `ShapeDtypeStruct`s."""

import jax
import jax.numpy as jnp
import numpy as np

PERIOD = 1_000_003  # values that are drawn; larger arrays repeat them, and a prime number is no multiple of a row


def random_arrays(abstract, seed: int = 0):
    """Returns random arrays for a tree of sharded `ShapeDtypeStruct`s.

    The path of an array decides its content: kernels and embeddings are normal, divided by the square root of their
    fan-in; norm scales are 1; biases, counters and optimizer state are 0; other integers are uniform in 0..255; all
    other arrays are standard normal. The host makes them: programs that do would be compiled for hundreds of shapes.

    Args:
      abstract: shapes, dtypes and shardings.
      seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    normal, whole = rng.standard_normal(PERIOD, np.float32), rng.integers(0, 256, PERIOD)

    def array(number: int, path, x) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        leaf = name.rsplit(".", 1)[-1]
        if "opt_" in name or leaf in ("bias", "step", "count"):
            return np.zeros(x.shape, x.dtype)
        if leaf == "scale":
            return np.ones(x.shape, x.dtype)
        begin = 7919 * number % PERIOD  # arrays of one shape differ
        values = whole if jnp.issubdtype(x.dtype, jnp.integer) else normal
        values = np.concatenate([values[begin : begin + x.size], values[:begin]])[: x.size]
        if leaf in ("kernel", "embedding"):
            values = values / np.sqrt(np.float32(np.prod(x.shape[:-1])))
        return np.resize(values.astype(x.dtype), x.shape)

    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    made = [jax.device_put(array(n, path, x), x.sharding) for n, (path, x) in enumerate(leaves)]
    return structure.unflatten(made)
