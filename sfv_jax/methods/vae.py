"""Trains a temporal VAE of SVD's class: reconstruction and a KL term, as the first stage of latent diffusion
(arXiv 2112.10752).

SVD's own VAE was made in two stages, and so is ours: first encoder and decoder on very short clips, then the decoder
alone (`trainable="^decoder"`) on whole ones, with the encoder frozen.

State: `step`, `generator` (the VAE), `ema`, `opt_g`. Nothing is frozen.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from sfv_jax.methods import optim
from sfv_jax.methods.common import (
    accumulate,
    check_recipe,
    generator_state,
    step_key,
    update_generator,
    warmed_decay,
    watch,
)
from sfv_jax.models import tree
from sfv_jax.models.codec import to_signed
from sfv_jax.models.networks import Params, compute_dtype
from sfv_jax.models.vae import TemporalVAE, VAEConfig

Array = jax.Array
SUBJECT = "vae"
LOG_VARIANCE = (-30.0, 20.0)  # range of the posterior's log variance, as in latent diffusion


@dataclass(frozen=True)
class VAENetworks:
    """The VAE as a function of its parameters, in the form of `models.networks.Networks`.

    Its compute dtype is `dtype`, as for `Networks`.
    """

    vae: VAEConfig
    dtype: str = "float32"
    abstract: dict[str, Params] = field(init=False, compare=False)
    graph: nnx.GraphDef[TemporalVAE] = field(init=False, compare=False)

    def __post_init__(self):
        graph, params = tree.abstract(TemporalVAE, self.vae, dtype=compute_dtype(self.dtype))
        object.__setattr__(self, "graph", graph)
        object.__setattr__(self, "abstract", {"generator": params})

    def generator(self, params: Params) -> TemporalVAE:
        """Returns the VAE with these parameters."""
        return tree.build(self.graph, params)

    def init_generator(self, seed: int) -> Params:
        """Returns fresh parameters, fp32."""
        return tree.init(TemporalVAE, self.vae, seed, dtype=compute_dtype(self.dtype))


def make_networks(vae: VAEConfig, config) -> VAENetworks:
    """Returns the VAE alone.

    Raises:
      UserError: if the recipe is impossible (`check_recipe`).
    """
    return check_recipe(config, VAENetworks(vae, config.dtype))


def init_state(networks: VAENetworks, config, generator: Params) -> tuple[Params, Params]:
    """Returns (state, frozen) from initial parameters; `frozen` is empty."""
    del networks
    return generator_state(config, generator), {}


def kl(mean: Array, log_variance: Array) -> Array:
    """Returns the divergence of the posterior from a standard normal distribution, mean over latent numbers."""
    return 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1 - log_variance)


def frame_weights(t: int, ends: float) -> Array:
    """Returns weights `[1, t, 1, 1, 1]` of mean 1, with `ends` times the weight for the first and the last frame."""
    weights = jnp.ones(t).at[jnp.array([0, -1])].set(ends)
    return (weights / weights.mean())[None, :, None, None, None]


def edges(e: Array) -> Array:
    """Returns the mean absolute difference between neighboring pixels of `[b, t, h, w, c]`, both ways added."""
    return jnp.mean(jnp.abs(jnp.diff(e, axis=2))) + jnp.mean(jnp.abs(jnp.diff(e, axis=3)))


def flicker(e: Array) -> Array:
    """Returns the mean absolute difference between frames of `[b, t, h, w, c]`; 0 for one frame."""
    return jnp.mean(jnp.abs(jnp.diff(e, axis=1))) if e.shape[1] > 1 else jnp.zeros(())


def make_train_step(networks: VAENetworks, config):
    """Returns the train step `(state, frozen, batch) -> (state, metrics)`: pure, with the randomness of `step_key`.

    The loss is L1 + gradient_weight `edges` + flicker_weight `flicker` + kl_weight `kl`, of errors of pixels in [-1, 1]
    that are decoded from a sample of the posterior. The first two weigh the frames at the ends by ends_weight: these
    are few, and their temporal convolutions see one neighbor less. `batch` contains `frames` uint8 `[n, t, h, w, 3]`.
    """
    method = config.vae

    def gradients(generator, batch, key):
        x = to_signed(batch["frames"])

        def loss(part):
            vae = networks.generator(tree.merge(generator, part))
            mean, log_variance = vae.posterior(x)
            log_variance = jnp.clip(log_variance, *LOG_VARIANCE)
            noise = jax.random.normal(key, mean.shape)
            y = vae.decode(mean + jnp.exp(0.5 * log_variance) * noise).astype(jnp.float32)
            weighted = frame_weights(x.shape[1], method.ends_weight) * (y - x)
            terms = {"l1": jnp.mean(jnp.abs(weighted)), "gradient": edges(weighted), "flicker": flicker(y - x)}
            terms["kl"] = kl(mean, log_variance)
            total = terms["l1"] + sum(method[f"{name}_weight"] * terms[name] for name in ("gradient", "flicker", "kl"))
            # 10 log10(255^2 / MSE) in gray levels is this in [-1, 1].
            values = {f"loss/{name}": value for name, value in terms.items()}
            values["psnr"] = -10 * jnp.log10(jnp.mean((y - x) ** 2) / 4)
            return total, values | {"latents/std": jnp.std(mean), "latents/noise": jnp.exp(0.5 * log_variance).mean()}

        return jax.grad(loss, has_aux=True)(optim.trainable(generator, config.trainable))

    def train_step(state, frozen, batch):
        del frozen
        step, generator = state["step"], state["generator"]
        grads, metrics = accumulate(gradients, generator, batch, step_key(config, step), config.accumulation_steps)
        new, norms = update_generator(config, state, grads, warmed_decay(config, step))
        metrics |= norms | watch(generator_gradient=grads, generator=new["generator"])
        return {"step": step + 1, **new}, metrics

    return train_step
