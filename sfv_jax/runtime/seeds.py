"""Random keys of a run: an independent stream for each purpose of its seed."""

import zlib

import jax


def stream(seed: int, purpose: str) -> jax.Array:
    """Returns the random key of one `purpose` of a run ("heads", "steps", "previews").

    The initial parameters of the generator have the keys `fold_in(key(seed), 1)`, `fold_in(key(seed), 2)` and so on; a
    purpose folds in the checksum of its name, a number of 32 bits far above theirs. `key(seed)` itself is never drawn
    from and never split.
    """
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
