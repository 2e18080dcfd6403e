"""One module per training method, each with the functions `make_networks`, `init_state` and `make_train_step`.

A method that trains something else than a UNet says so by `SUBJECT`, see sfv_jax/training/subjects.py.
"""

from types import ModuleType

from sfv_jax.methods import animatelcm, decoder, ladd, sfv, teacher, ufogen, vae

METHODS: dict[str, ModuleType] = {
    "sfv": sfv,
    "teacher": teacher,
    "animatelcm": animatelcm,
    "ufogen": ufogen,
    "ladd": ladd,
    "vae": vae,
    "decoder": decoder,
}
