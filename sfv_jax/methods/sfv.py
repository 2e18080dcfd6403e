"""SF-V (arXiv 2406.04324): adversarial fine-tuning of SVD into a one-step generator.

State: `step`, `generator`, `ema`, `opt_g`, `heads`, `opt_d`. Frozen: `backbone`.
"""

import jax
import jax.numpy as jnp

from sfv_jax import edm, losses, optim
from sfv_jax.models.discriminator import DiscriminatorConfig, head_names, per_head
from sfv_jax.models.unet import UNetConfig
from sfv_jax.state import Networks, Params, accumulate, global_norm


def make_networks(unet: UNetConfig, config) -> Networks:
    """Generator, backbone and heads of a config."""
    heads = DiscriminatorConfig.for_unet(unet, **config.discriminator.to_dict())
    return Networks(unet, heads, config.dtype)


def init_state(networks: Networks, config, generator: Params) -> tuple[Params, Params]:
    """(state, frozen) from the base model's UNet parameters; both networks start from the same weights."""
    heads = networks.init_heads(config.seed)
    generator = jax.tree.map(lambda x: jnp.array(x, jnp.float32), generator)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "generator": generator,
        "ema": jax.tree.map(jnp.copy, generator),
        "opt_g": optim.make_optimizer(config.generator_optimizer).init(generator),
        "heads": heads,
        "opt_d": optim.make_optimizer(config.heads_optimizer).init(heads),
    }
    return state, {"backbone": networks.backbone_params(generator)}


def make_gradients(networks: Networks, config):
    """`(generator, heads, frozen, batch, key) -> (generator gradients, head gradients, metrics)` for one micro-batch.

    Both gradients are taken at the same parameters with the same fake, so the generator and the backbone run forward
    once per sample.
    """
    method, discriminator = config.sfv, networks.discriminator
    g_sigmas = edm.generator_sigmas(method.generator_levels)
    d_sigmas, d_probabilities = edm.lognormal_levels(method.discriminator_levels, method.p_mean, method.p_std)
    names = head_names(discriminator)

    def gradients(generator, heads, frozen, batch, key):
        x0 = batch["latents"]
        b = len(x0)
        k_level, k_noise, *k_real = jax.random.split(key, 4)
        k_fake = k_real if method.shared_noise else jax.random.split(jax.random.fold_in(key, 1))
        sigma = edm.draw_levels(k_level, g_sigmas, None, (b,))
        x_t = edm.add_noise(x0, jax.random.normal(k_noise, x0.shape), sigma)
        (sigma_r, noise_r), (sigma_f, noise_f) = (
            (edm.draw_levels(k[0], d_sigmas, d_probabilities, (b,)), jax.random.normal(k[1], x0.shape))
            for k in (k_real, k_fake)
        )

        def logits(heads, features, sigma):
            return networks.heads(heads)(features, batch["image_embed"], edm.scalings(sigma)[3])

        def encode(x, sigma, noise):
            noised = edm.model_input(edm.add_noise(x, noise, sigma), batch["cond_latent"], sigma)
            condition = edm.scalings(sigma)[3], batch["image_embed"], batch["ids"]
            return per_head(discriminator, networks.encode(frozen["backbone"])(noised, *condition))

        def adversarial(x):  # Eq. 8
            features = encode(x, sigma_f, noise_f)
            return losses.adversarial_generator(logits(heads, features, sigma_f)), features

        def reconstruction(x):  # Eq. 9
            return losses.pseudo_huber(x, x0, method.recon_c, method.recon_reduction)

        fake, pullback = jax.vjp(lambda p: edm.denoise(networks.generator(p), x_t, sigma, batch), generator)  # Eq. 6
        (adv, fake_features), adv_grad = jax.value_and_grad(adversarial, has_aux=True)(fake)
        rec, rec_grad = jax.value_and_grad(reconstruction)(fake)
        rec_grad = method.recon_weight * rec_grad
        (g_grads,) = pullback(method.adv_weight * adv_grad + rec_grad)  # Eq. 10

        real_features = encode(x0, sigma_r, noise_r)

        def discriminator_loss(heads):  # Eq. 11
            real = logits(heads, real_features, sigma_r)
            fake = logits(heads, fake_features, sigma_f)
            hinge = losses.hinge_discriminator(real, fake)
            r1 = jnp.zeros(())
            if method.r1_weight:
                r1 = losses.r1_on_features(lambda f: logits(heads, f, sigma_r), real_features)
            return hinge + method.r1_weight * r1, (hinge, r1, real, fake)

        d_grads, (hinge, r1, real, fake_logits) = jax.grad(discriminator_loss, has_aux=True)(heads)
        metrics = {
            "loss/adversarial": adv,
            "loss/reconstruction": rec,
            "loss/hinge": hinge,
            "loss/r1": r1,
            "ratio/adv_to_rec_gradient": global_norm(method.adv_weight * adv_grad) / (global_norm(rec_grad) + 1e-12),
        }
        for name, r, f in zip(names, real, fake_logits, strict=True):
            metrics |= {f"logits_real/{name}": jnp.mean(r), f"logits_fake/{name}": jnp.mean(f)}
            metrics[f"live_hinge/{name}"] = (jnp.mean(r > -1) + jnp.mean(f < 1)) / 2
        return g_grads, d_grads, metrics

    return gradients


def make_train_step(networks: Networks, config):
    """`(state, frozen, batch) -> (state, metrics)`, pure; randomness is fold_in(seed, step).

    `batch`: `latents [n, t, h, w, c]` (scaled), `cond_latent [n, h, w, c]`, `image_embed [n, d]`, `ids [n, 3]`; n is
    the number of samples of all `accumulation_steps` micro-batches together.
    """
    gradients = make_gradients(networks, config)
    g_optimizer = optim.make_optimizer(config.generator_optimizer)
    d_optimizer = optim.make_optimizer(config.heads_optimizer)
    every = config.sfv.generator_every

    def train_step(state, frozen, batch):
        step, generator, heads = state["step"], state["generator"], state["heads"]
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        g_grads, d_grads, metrics = accumulate(
            lambda micro, k: gradients(generator, heads, frozen, micro, k), batch, key, config.accumulation_steps
        )
        metrics |= {"norm/generator_gradient": global_norm(g_grads), "norm/heads_gradient": global_norm(d_grads)}
        heads, opt_d = optim.apply(d_optimizer, d_grads, state["opt_d"], heads)
        generator, opt_g = optim.apply(g_optimizer, g_grads, state["opt_g"], generator)
        ema = optim.ema_update(state["ema"], generator, config.ema_decay)
        new = {"generator": generator, "opt_g": opt_g, "ema": ema}
        if every > 1:
            skipped = {k: state[k] for k in new}
            new = jax.tree.map(lambda a, b: jnp.where(step % every == 0, a, b), new, skipped)
        return {"step": step + 1, "heads": heads, "opt_d": opt_d, **new}, metrics

    return train_step
