"""Training runs of the paper's tables: their folders, their execution, and a plan of the missing runs with its cost."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sfv_jax import config as configs
from sfv_jax.checkpoints.base import read_unet
from sfv_jax.checkpoints.model_folder import load_codec
from sfv_jax.checkpoints.run import claim_workdir
from sfv_jax.choices import PACKAGED
from sfv_jax.config import world_of
from sfv_jax.config_check import check
from sfv_jax.data.loader import latent_source, world_source
from sfv_jax.errors import InterruptedWork, UserError
from sfv_jax.methods.adversarial import per_head
from sfv_jax.models.discriminator import DiscriminatorConfig
from sfv_jax.models.networks import Networks
from sfv_jax.models.unet import UNetConfig
from sfv_jax.reproduction.experiments import (
    BASE,
    SCENES_BASE,
    Budget,
    rows_of,
    runs_of,
    scenes_config,
    svd_config,
    world_config,
)
from sfv_jax.runtime.device import count_flops
from sfv_jax.runtime.plain_config import flat
from sfv_jax.training.loop import train

CPU_RATE = 25e9  # FLOP/s of small networks on two x86-64 cores, an assumption: see docs/reproduction.md
CHIP_RATE = 0.4 * 989e12  # FLOP/s of an H100 in bf16 at 40 % of its peak, an assumption


class ReproduceError(UserError):
    """Impossible command line; the message names the remedy."""


@dataclass(frozen=True)
class Runs:
    """Models of the tables.

    Attributes:
      folder: folder of all results.
      config: function `(run, seed) -> training config`.
      base: workdir or model folder of the base model, from which the methods start and SVD's rows are sampled.
      trains_base: whether the base model is trained, too.
      small: whether the networks are such that two CPU cores train them.
      run_minutes: about how long a run compiles on a CPU core, for the estimate of `plan`.
      row_minutes: about how long a row is compiled, sampled and scored on one.
    """

    folder: Path
    config: Callable[[str, int], ConfigDict]
    base: Path
    trains_base: bool
    small: bool = True
    run_minutes: float = 1.2
    row_minutes: float = 0.25

    def workdir(self, run: str, seed: int) -> Path:
        """Returns the workdir of a run, or `base` for the base model."""
        return self.base if run == BASE else self.folder / f"seed{seed}" / run.replace(" ", "_")

    def done(self, run: str, seed: int) -> bool:
        """Returns whether a run has reached its last step."""
        return (self.workdir(run, seed) / "checkpoints" / str(self.config(run, seed).steps)).is_dir()

    def ensure(self, run: str, seed: int) -> None:
        """Trains a run from the start or from its newest checkpoint, unless it is done.

        The base model has one seed, and is only trained if `trains_base`.

        Raises:
          WorkdirError: if the workdir contains another run.
          InterruptedWork: if training was stopped before the last step.
        """
        if run == BASE:
            if not self.trains_base:
                return
            seed = 0
        path, config = self.workdir(run, seed), self.config(run, seed)
        if self.done(run, seed):
            claim_workdir(path, config.to_dict())
            return
        print(f"training {path}: {config.method}, {config.steps} steps of {config.batch_size}", flush=True)
        train(config, path)
        if not self.done(run, seed):
            raise InterruptedWork(f"the training in {path} was stopped; run the same command again to continue")
        jax.clear_caches()


def world_runs(folder: Path, budget: Budget, settings: Sequence[str]) -> Runs:
    """Returns the runs of tiny networks in the procedural world, with `settings` as in `with_settings`."""
    base = folder / BASE

    def config(run, seed):
        return world_config(run, budget, seed, "" if run == BASE else str(base))

    return Runs(folder, with_settings(config, settings), base, True)


def scenes_runs(folder: Path, budget: Budget, settings: Sequence[str]) -> Runs:
    """Returns the runs of small networks on the scenes, from the base model in the package."""
    config = partial(scenes_config, budget=budget)
    return Runs(
        folder,
        with_settings(lambda run, seed: config(run, seed=seed), settings),
        Path(SCENES_BASE),
        False,
        run_minutes=2.0,
        row_minutes=0.7,
    )


def svd_runs(folder: Path, svd: str, data: str, settings: Sequence[str]) -> Runs:
    """Returns the runs of the published configuration, from the model folder `svd` on the latent cache `data`."""
    return Runs(folder, with_settings(partial(svd_config, model=svd, cache=data), settings), Path(svd), False, False)


def with_settings(make: Callable[[str, int], ConfigDict], settings: Sequence[str]) -> Callable[[str, int], ConfigDict]:
    """Returns `make` with changed config fields in every run.

    Args:
      make: function `(run, seed) -> training config`.
      settings: the changes, "name=value" each.

    Raises:
      ReproduceError: if the returned function meets an unknown name or a value of another type.
      ConfigError: if it meets an illegal value.
    """

    def config(run: str, seed: int) -> ConfigDict:
        made = make(run, seed)
        known = flat(made.to_dict())
        for setting in settings:
            name, _, text = setting.partition("=")
            if name not in known:
                raise ReproduceError(f"--set {setting}: the config of {run} has no field {name!r}")
            try:
                value = text if isinstance(known[name], str) else json.loads(text)
                made.update_from_flattened_dict({name: value})
            except (TypeError, ValueError) as error:
                raise ReproduceError(f"--set {setting}: {error}") from error
        if settings:
            check(made)
        return made

    return config


def cost_of_step(config: ConfigDict, base: Path) -> float:
    """Estimates the FLOPs of a train step of `config` on its data; `base` is the folder of its base model.

    It is the forward passes of `forward_flops` times how often a method runs them, a backward pass counting twice, or
    once where weights are frozen. Tracing the step itself takes a minute at full size.
    """
    if config.data.source == "latents":
        unet, example = read_unet(base), latent_source(config.data.path, config.data.split)[0]
    else:
        packaged = config.init in PACKAGED
        unet = read_unet(base) if packaged else configs.unet_of(config)
        codec = load_codec(base) if packaged else configs.patch_codec_of(config)
        example = world_source(world_of(config), config.data.split, 1, codec)[0]
    adversarial = "discriminator" in config
    changes = tuple(config.discriminator.to_dict().items()) if adversarial else None
    unet_, encoder, heads = forward_flops(unet, changes, example["latents"].shape)
    times = {"teacher": 3, "animatelcm": 6}.get(config.method, 3)  # student; target, and two branches of the teacher
    if config.method == "ladd":
        times += 2 * config.ladd.teacher_steps
    # Backbone: real, fake, and back to the fake. Heads: 3 for the generator, 3 each for real and fake, 6 for R1.
    return config.batch_size * (times * unet_ + 3 * encoder + 15 * heads)


@cache
def forward_flops(unet: UNetConfig, discriminator: tuple | None, shape: tuple[int, ...]) -> tuple[float, float, float]:
    """Returns the FLOPs of UNet, discriminator's backbone and heads for one video, forward; 0 for those not there.

    Args:
      unet: config of the UNet.
      discriminator: items of `config.discriminator`; None for a method without one.
      shape: `(t, h, w, c)` of the latents.
    """
    unet = configs.plain_unet(unet)
    heads = None if discriminator is None else DiscriminatorConfig.for_unet(unet, **dict(discriminator))
    networks = Networks(unet, heads)
    shapes = dict(x=(*shape[:3], unet.in_channels), level=(), embed=(unet.cross_attention_dim,), ids=(3,))
    x, level, embed, ids = (jax.ShapeDtypeStruct((1, *s), jax.numpy.float32) for s in shapes.values())
    found = [count_flops(lambda p, *a: networks.generator(p)(*a), networks.abstract["generator"], x, level, embed, ids)]
    if heads is None:
        return found[0], 0.0, 0.0

    def encode(params, *inputs):
        return networks.encode(params)(*inputs)

    backbone = networks.abstract["backbone"], x, level, embed, ids
    features = per_head(heads, jax.eval_shape(encode, *backbone))
    found.append(count_flops(encode, *backbone))
    judge = lambda params, *inputs: networks.heads(params)(*inputs)  # noqa: E731
    found.append(count_flops(judge, networks.abstract["heads"], features, embed, level))
    return found[0], found[1], found[2]


def plan(runs: Runs, tables: Sequence[str], seeds: Sequence[int], jobs: int = 1, decoder: str = "full") -> list[str]:
    """Returns lines of text on the missing training runs of these tables, and their cost with `jobs` runs at a time.

    Rows by a tiny `decoder` are counted, too.
    """
    rows = {row.key for name in tables for row in rows_of(name, decoder)}
    wanted = ([(BASE, 0)] if runs.trains_base else []) + [(run, seed) for seed in seeds for run in runs_of(tables)]
    todo = [(run, seed) for run, seed in wanted if not runs.done(run, seed)]
    if not todo:
        return [f"All {len(wanted)} training runs are there."]
    total, alone = 0.0, 0.0
    lines: list[str] = []
    counted: dict[tuple[str, str], float] = {}
    for run, seed in todo:
        settings = runs.config(run, seed)
        key = (settings.method, settings.discriminator.to_json() if "discriminator" in settings else "")
        if key not in counted:
            counted[key] = cost_of_step(settings, runs.base)
        flops = settings.steps * counted[key]
        total += flops
        alone += flops if run == BASE else 0.0
        line = f"  {run}: {settings.steps} steps of {settings.batch_size}, {counted[key]:.3g} FLOPs each"
        lines += [] if line in lines else [line]
    there = f", {len(wanted) - len(todo)} are there" if len(todo) < len(wanted) else ""
    count = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    lines.append(f"{len(todo)} training runs ({count}){there}, {len(rows) * len(seeds)} rows in all.")
    if runs.small:
        shared = (total - alone) / CPU_RATE / 60 + runs.run_minutes * len(todo)
        shared += runs.row_minutes * len(rows) * len(seeds)
        minutes = alone / CPU_RATE / 60 + shared / jobs
        lines.append(
            f"Training {total:.3g} FLOPs; about {minutes:.0f} minutes in all on two or more idle x86-64 cores, "
            f"{jobs} at a time."
        )
    else:
        hours = total / CHIP_RATE / 3600
        lines.append(
            f"Training {total:.3g} FLOPs: about {hours:.2g} hours of one H100 at 40 % of its peak (an assumption; "
            "python -m sfv_jax.plan gives a better estimate), one process, plus sampling and scoring."
        )
    return ["Training:", *lines]
