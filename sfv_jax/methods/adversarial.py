"""The adversarial training step that SF-V, UFOGen and LADD share, with SF-V's discriminator.

A method supplies the noise levels of its networks (`Draws`) and a second loss.

State: `step`, `generator`, `ema`, `opt_g`, `heads`, `opt_d`, and `balance` where the config asks for it. Frozen:
`backbone`. The config section that has the method's name contains the fields of `config.gan` besides its own.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sfv_jax.diffusion import edm, losses
from sfv_jax.methods import optim
from sfv_jax.methods.common import accumulate, check_recipe, generator_state, step_key, update_generator, watch
from sfv_jax.models import tree
from sfv_jax.models.discriminator import DiscriminatorConfig, head_names, per_head
from sfv_jax.models.networks import Networks, Params
from sfv_jax.models.unet import UNetConfig
from sfv_jax.runtime.seeds import stream

Array = jax.Array
GAN_LOSSES = {  # (discriminator's loss, generator's loss), both functions of (real, fake) logits
    "hinge": (losses.hinge_discriminator, lambda real, fake: losses.adversarial_generator(fake)),
    "relativistic": (losses.relativistic_discriminator, losses.relativistic_generator),
}


class Keys(NamedTuple):
    """Random keys of a micro-batch, one for everything that is drawn; each is used at most once.

    Attributes:
      level, noise: of the latents that the generator denoises.
      real_level, real_noise: of the real latents that the discriminator scores.
      fake_level, fake_noise: of the fakes, unless they share those of the real latents.
      real_shift, fake_shift: perturbations of clean latents, for `r1_form="perturbation"`.
      videos: clean latents that a method samples itself.
    """

    level: Array
    noise: Array
    real_level: Array
    real_noise: Array
    fake_level: Array
    fake_noise: Array
    real_shift: Array
    fake_shift: Array
    videos: Array

    @classmethod
    def split(cls, key: Array) -> "Keys":
        """Returns the keys of a micro-batch from its own key, which must not be used for anything else."""
        return cls(*jax.random.split(key, len(cls._fields)))


class Balance(NamedTuple):
    """Moving average of the ratio of the two gradients that meet in the generator's output, part of the state, fp32.

    Attributes:
      log_ratio: average of the logarithm of the ratio, adversarial over second, before its correction.
      weight: sum of the weights of that average; 0 before the first update.
    """

    log_ratio: Array
    weight: Array

    @classmethod
    def start(cls) -> "Balance":
        """Returns the average of nothing."""
        return cls(jnp.zeros(()), jnp.zeros(()))

    def factor(self, log_ratio: Array, method) -> Array:
        """Returns the factor of the second loss that brings the ratio to `method.balance`.

        Args:
          log_ratio: logarithm of this micro-batch's ratio, which stands for the average before the first update.
          method: config section with `balance` and `balance_limit`; the factor lies between 1 / limit and limit.
        """
        average = jnp.where(self.weight > 0, self.log_ratio / jnp.maximum(self.weight, 1e-30), log_ratio)
        limit = math.log(method.balance_limit)
        return jnp.exp(jnp.clip(average - math.log(method.balance), -limit, limit))

    def update(self, log_ratio: Array, decay: float) -> "Balance":
        """Returns the average with the ratio of one more step; without change if that is NaN, not measured."""
        measured = jnp.isfinite(log_ratio)
        new = Balance(
            decay * self.log_ratio + (1 - decay) * jnp.where(measured, log_ratio, 0), decay * self.weight + 1 - decay
        )
        return jax.tree.map(lambda new, old: jnp.where(measured, new, old), new, self)


class Draws(NamedTuple):
    """Random numbers of a micro-batch: pairs of noise levels `[b]` and standard normal noise `[b, t, h, w, c]`.

    Attributes:
      generator: added to the clean latents that the generator denoises.
      real: added to the clean latents that the discriminator scores.
      fake: added to the generator's latents that the discriminator scores.
      one_step: bool `[b]`, whether the generator starts from its highest levels.
    """

    generator: tuple[Array, Array]
    real: tuple[Array, Array]
    fake: tuple[Array, Array]
    one_step: Array


def make_networks(unet: UNetConfig, config) -> Networks:
    """Returns generator, backbone and heads for a config.

    Raises:
      UserError: if the recipe is impossible (`check_recipe`).
    """
    heads = DiscriminatorConfig.for_unet(unet, **config.discriminator.to_dict())
    return check_recipe(config, Networks(unet, heads, config.dtype))


def init_state(networks: Networks, config, generator: Params) -> tuple[Params, Params]:
    """Returns (state, frozen) from the base model's UNet parameters, with which generator and backbone both start."""
    heads = networks.init_heads(stream(config.seed, "heads"))
    state = generator_state(config, generator)
    state |= {"heads": heads, "opt_d": optim.make_optimizer(config.heads_optimizer).init(heads)}
    if config[config.method].balance:
        state |= {"balance": Balance.start()}
    return state, {"backbone": networks.backbone_params(state["generator"])}


def make_gradients(
    networks: Networks, config, draw: Callable, second_loss: Callable, videos: Callable | None = None
) -> Callable:
    """Returns the gradient function of one micro-batch.

    Both gradients are taken at the same parameters with the same fake, so the generator and the backbone run forward
    once per sample. Generator gradients cover its trained part only. With `generator_every` n, the generator is updated
    in every n-th step; in the others its gradients are zero, there is no backward pass for them, and the metrics of
    that pass are NaN.

    With `balance` the second loss is multiplied by a factor that holds the ratio of the two gradients' norms at the
    generator's output at that target (`Balance.factor`). The ratio is that of one micro-batch, all samples together.

    Args:
      networks: `Networks` with a discriminator.
      config: the whole config.
      draw: `(Keys, shape of the latents, step) -> Draws`.
      second_loss: `(predicted x0, x0, sigma) -> scalar`, weighted by `recon_weight`.
      videos: `(frozen, batch, key) -> latents [b, t, h, w, c]` in place of those of the batch; None: the batch's.

    Returns:
      `(generator, heads, frozen, batch, key, step, balance) -> (generator gradients, head gradients, metrics)`;
      `balance` is the state's, None without.
    """
    method, discriminator = config[config.method], networks.discriminator
    assert discriminator is not None  # make_networks builds it
    loss_d, loss_g = GAN_LOSSES[method.gan_loss]
    over_heads = len(head_names(discriminator)) if method.heads_reduction == "sum" else 1  # the losses are means

    def gradients(generator, heads, frozen, batch, key, step=0, balance=None):
        keys = Keys.split(key)
        x0 = batch["latents"] if videos is None else videos(frozen, batch, keys.videos)
        (sigma, noise), (sigma_r, noise_r), (sigma_f, noise_f), one_step = draw(keys, x0.shape, step)
        x_t = edm.add_noise(x0, noise, sigma)

        def logits(heads, features, sigma):
            return networks.heads(heads)(features, batch["image_embed"], edm.scalings(sigma)[3])

        def encode(x, sigma, noise):
            noised = edm.model_input(edm.add_noise(x, noise, sigma), batch["cond_latent"], sigma)
            condition = edm.scalings(sigma)[3], batch["image_embed"], batch["ids"]
            return per_head(discriminator, networks.encode(frozen["backbone"])(noised, *condition))

        def denoise(part):  # Eq. 6
            return edm.denoise(networks.generator(tree.merge(generator, part)), x_t, sigma, batch)

        def adversarial(x):  # Eq. 8
            features = encode(x, sigma_f, noise_f)
            real = logits(heads, real_features, sigma_r)
            return over_heads * loss_g(real, logits(heads, features, sigma_f)), features

        def reconstruction(x):
            return second_loss(x, x0, sigma)

        part = optim.trainable(generator, config.trainable)
        fake, to_generator = jax.vjp(denoise, part)
        real_features = encode(x0, sigma_r, noise_r)
        adv, to_fake, fake_features = jax.vjp(adversarial, fake, has_aux=True)
        rec = reconstruction(fake)

        def backward():  # Eq. 10
            adv_grad = method.adv_weight * to_fake(jnp.ones_like(adv))[0]
            rec_grad = method.recon_weight * jax.grad(reconstruction)(fake)
            if not method.recon_weight:
                return to_generator(adv_grad)[0], unmeasured
            log_ratio = jnp.log(optim.global_norm(adv_grad) + 1e-12) - jnp.log(optim.global_norm(rec_grad) + 1e-12)
            factor = jnp.ones(()) if balance is None else balance.factor(log_ratio, method)
            ratios = {"ratio/adv_to_rec_gradient": jnp.exp(log_ratio) / factor}
            if balance is not None:
                ratios |= {"balance/log_ratio": log_ratio, "balance/factor": factor}
            return to_generator(adv_grad + factor * rec_grad)[0], ratios

        def nothing():
            return jax.tree.map(jnp.zeros_like, part), unmeasured

        names = ["ratio/adv_to_rec_gradient"]
        names += ["balance/log_ratio", "balance/factor"] if balance is not None else []
        unmeasured = dict.fromkeys(names, jnp.full((), jnp.nan))
        turn = turn_of(step, method.generator_every)
        g_grads, ratios = backward() if turn is None else jax.lax.cond(turn, backward, nothing)

        def penalty(heads, x, features, sigma, noise, key):
            score = lambda features: logits(heads, features, sigma)  # noqa: E731
            if method.r1_form == "gradient":
                return losses.r1_on_features(score, features)
            step = method.perturbation_std * jax.random.normal(key, x.shape)
            return losses.perturbation_penalty(score(features), score(encode(x + step, sigma, noise)))

        def in_its_turn(penalty):
            """Returns the penalty, in every n-th step only and then n-fold, as StyleGAN2 does (arXiv 1912.04958)."""
            turn = turn_of(step, method.r1_every)
            if turn is None:
                return penalty()
            return jax.lax.cond(turn, lambda: method.r1_every * penalty(), lambda: jnp.zeros(()))

        def discriminator_loss(heads):  # Eq. 11
            real, fake_ = logits(heads, real_features, sigma_r), logits(heads, fake_features, sigma_f)
            parts = {f"loss/{method.gan_loss}": loss_d(real, fake_), "loss/r1": jnp.zeros(())}
            total = parts[f"loss/{method.gan_loss}"]
            if method.r1_weight:
                real_penalty = partial(penalty, heads, x0, real_features, sigma_r, noise_r, keys.real_shift)
                parts["loss/r1"] = in_its_turn(real_penalty)
                total += method.r1_weight * parts["loss/r1"]
            if method.r2_weight:
                clean = jax.lax.stop_gradient(fake)
                fake_penalty = partial(penalty, heads, clean, fake_features, sigma_f, noise_f, keys.fake_shift)
                parts["loss/r2"] = in_its_turn(fake_penalty)
                total += method.r2_weight * parts["loss/r2"]
            return over_heads * total, (parts, real, fake_)

        d_grads, (parts, real, fake_logits) = jax.grad(discriminator_loss, has_aux=True)(heads)
        metrics = {"loss/adversarial": adv, "loss/reconstruction": rec, **parts, **ratios}
        metrics |= motion(fake, x0, one_step)
        metrics |= head_metrics(head_names(discriminator), real, fake_logits, method.gan_loss)
        return g_grads, d_grads, metrics

    return gradients


def turn_of(step: Array | int, every: int) -> Array | None:
    """Returns whether a network trained every `every` steps updates at `step`; None means always."""
    return jnp.asarray(step) % every == 0 if every > 1 else None


def head_metrics(names: list[str], real: list[Array], fake: list[Array], kind: str) -> dict[str, Array]:
    """Returns metrics of each head: mean logits, their gap (fake minus real), loss, and `losses.live_share`."""
    metrics = {}
    for name, r, f in zip(names, real, fake, strict=True):
        means = jnp.mean(r), jnp.mean(f)
        metrics |= {
            f"logits_real/{name}": means[0],
            f"logits_fake/{name}": means[1],
            f"gap/{name}": means[1] - means[0],
        }
        metrics[f"head_loss/{name}"] = GAN_LOSSES[kind][0]([r], [f])
        metrics[f"live/{name}"] = losses.live_share(r, f, kind)
    return metrics


def motion(fake: Array, real: Array, chosen: Array) -> dict[str, Array]:
    """Returns the motion energy of fake and real latents `[b, t, h, w, c]`: squared difference of neighboring frames.

    It is averaged over elements, summed over the samples marked by `chosen [b]`, and divided by b. Chosen are those
    denoised from the highest level: from lower ones even an untrained generator copies motion. The log takes the ratio
    of both numbers over a whole interval.
    """

    def energy(x):
        return jnp.mean(jnp.mean(jnp.square(jnp.diff(x, axis=1)), axis=(1, 2, 3, 4)) * chosen)

    return {"motion/fake": energy(fake), "motion/real": energy(real)}


def make_train_step(config, gradients: Callable):
    """Returns the train step `(state, frozen, batch) -> (state, metrics)`: pure, with the randomness of `step_key`.

    `batch` contains `latents [n, t, h, w, c]` (scaled), `cond_latent [n, h, w, c]` (unscaled), `image_embed [n, d]` and
    `ids [n, 3]`; n is the number of samples in all `accumulation_steps` micro-batches together.

    Args:
      config: the whole config.
      gradients: the function that `make_gradients` returns.
    """
    d_optimizer = optim.make_optimizer(config.heads_optimizer)
    method = config[config.method]

    def update_heads(old, grads):
        heads, opt_d, moved = optim.apply(d_optimizer, grads, old["opt_d"], old["heads"])
        return {"heads": heads, "opt_d": opt_d}, {"norm/heads_update": moved}

    def train_step(state, frozen, batch):
        step, generator, heads, balance = state["step"], state["generator"], state["heads"], state.get("balance")
        key = step_key(config, step)
        g_grads, d_grads, metrics = accumulate(
            lambda params, micro, k: gradients(*params, micro, k, step, balance),
            (generator, heads, frozen),
            batch,
            key,
            config.accumulation_steps,
        )
        new_d, norms = in_turn(turn_of(step, method.heads_every), update_heads, state, ("heads", "opt_d"), d_grads)
        metrics |= norms
        update = lambda old, grads: update_generator(config, old, grads, config.ema_decay)  # noqa: E731
        names = ("generator", "ema", "opt_g")
        new_g, norms = in_turn(turn_of(step, method.generator_every), update, state, names, g_grads)
        metrics |= norms | watch(
            batch=batch,
            generator_gradient=g_grads,
            heads_gradient=d_grads,
            generator=new_g["generator"],
            heads=new_d["heads"],
        )
        new = {"step": step + 1, **new_d, **new_g}
        if balance is not None:
            new["balance"] = balance.update(metrics.pop("balance/log_ratio"), method.balance_decay)
        return new, metrics

    return train_step


def in_turn(turn: Array | None, update: Callable, state: Params, names: tuple[str, ...], grads: Params):
    """Returns `update(part, grads)` if it is the `turn`, or else the unchanged part and NaN for its norms.

    Args:
      turn: bool scalar, or None for always; see `turn_of`.
      update: `(part of the state, grads) -> (new part, norms)`.
      state: the whole state.
      names: entries of the state that make up the part.
      grads: passed to `update`.
    """
    old = {name: state[name] for name in names}
    if turn is None:
        return update(old, grads)
    shapes = jax.eval_shape(update, old, grads)[1]
    unmeasured = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes)
    return jax.lax.cond(turn, update, lambda old, _: (old, unmeasured), old, grads)
