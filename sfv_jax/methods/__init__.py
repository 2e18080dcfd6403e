"""One module per training method, each with the functions `make_networks`, `init_state` and `make_train_step`."""

from sfv_jax.methods import animatelcm, ladd, sfv, teacher, ufogen, vae

METHODS = {"sfv": sfv, "teacher": teacher, "animatelcm": animatelcm, "ufogen": ufogen, "ladd": ladd, "vae": vae}
