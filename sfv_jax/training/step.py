"""Compiled train step of a method, and its FLOPs."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from sfv_jax import config as configs
from sfv_jax.config import ConfigDict
from sfv_jax.methods import METHODS
from sfv_jax.models.networks import Params
from sfv_jax.models.unet import UNetConfig
from sfv_jax.runtime.device import count_flops
from sfv_jax.runtime.sharding import batch_sharding, replicated_sharding


def jit_train_step(method, networks, config: ConfigDict, mesh: Mesh, shardings: tuple) -> Callable:
    """Returns the jitted step `(state, frozen, batch) -> (state, metrics)` of a method; it donates the state.

    Args:
      method: module of `sfv_jax.methods`.
      networks: networks of the method.
      config: config of the run.
      mesh: mesh of the batch and of the metrics.
      shardings: shardings of state and frozen parameters.
    """
    return jax.jit(
        method.make_train_step(networks, config),
        in_shardings=(*shardings, batch_sharding(mesh)),
        out_shardings=(shardings[0], replicated_sharding(mesh)),
        donate_argnums=0,
    )


def unet_step_flops(config: ConfigDict, unet: UNetConfig, example: dict) -> float:
    """Returns `step_flops` of a method that trains a UNet."""
    networks = METHODS[config.method].make_networks(configs.plain_unet(unet), config)
    return step_flops(config, networks, networks.abstract["generator"], example)


def step_flops(config: ConfigDict, networks, params: Params, example: dict) -> float:
    """Returns the FLOPs of a train step on all devices together: matrix products and convolutions, from its jaxpr.

    Recomputation (`remat`) is not counted, as is usual for model FLOPs; a step without an update of the generator
    (`sfv.generator_every`) counts like one with an update.

    Args:
      config: config of the run.
      networks: networks of the method; a UNet without recomputation and fused attention (`config.plain_unet`).
      params: shapes of the parameters that the method's `init_state` starts from.
      example: one example of the data, numpy arrays.
    """
    method = METHODS[config.method]
    state = jax.eval_shape(lambda params: method.init_state(networks, config, params), params)
    batch = {k: jax.ShapeDtypeStruct((config.batch_size, *v.shape), v.dtype) for k, v in example.items()}
    return count_flops(method.make_train_step(networks, config), *state, batch)
