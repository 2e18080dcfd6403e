"""Definition of the paper's Tables 1 to 3: the trained models, their config changes, and how each row is sampled.

`RUNS` is the only list of methods and ablations. A run is an ordinary training config. The list serves all scales:
"svd", the published configuration on given weights and data; "scenes", small networks of SVD's classes on the scenes of
the models in the package; and "world", tiny networks on a procedural world of 8x8 pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ml_collections import ConfigDict

from sfv_jax import config as configs

# {run: (recipe of `sfv_jax.config`, changes by dotted field)}. Every run starts from the base model, which is not in
# this list. SF-V's rows are those of the paper, `printed`.
RUNS = {
    "animatelcm": ("animatelcm", {}),
    "ufogen": ("ufogen", {}),
    "ladd": ("ladd", {}),
    "sfv": ("printed", {}),
    "spatial heads": ("printed", {"discriminator.temporal": False}),
    "temporal heads": ("printed", {"discriminator.spatial": False}),
    "P_mean -2": ("printed", {"sfv.p_mean": -2.0}),
    "P_mean 0": ("printed", {"sfv.p_mean": 0.0}),
    "P_mean 1": ("printed", {"sfv.p_mean": 1.0}),
    "no reconstruction": ("printed", {"sfv.recon_weight": 0.0}),
    "no R1": ("printed", {"sfv.r1_weight": 0.0}),
}
# Runs of the world that are longer, so that a discriminator has time to win.
LONG = {
    "long": ("printed", {}),
    "balanced": ("sfv", {}),
    "more reconstruction": ("printed", {"sfv.recon_weight": 2.0}),
    "two levels": ("printed", {"sfv.generator_levels": 2}),
    "mostly one step": ("printed", {"sfv.probabilities": (0.15, 0.15, 0.7)}),
    **{f"long, P_mean {n}": ("printed", {"sfv.p_mean": float(n)}) for n in (-6, -5, -4, -3)},
}
# The paper's recipe and the default one, for several seeds and sizes of the world. With 20 times the reconstruction
# the printed losses begin at the ratio that they have at the paper's size of a video.
RECIPES = {
    "printed recipe": ("printed", {}),
    "default recipe": ("sfv", {}),
    "printed recipe x 20": ("printed", {"sfv.recon_weight": 2.0}),
}
RUNS |= LONG | RECIPES
OWN_STEPS = dict.fromkeys(LONG, 3200) | dict.fromkeys(RECIPES, 800)  # in the world, whatever the budget
BASE = "teacher"  # the base model: SVD, or a teacher trained on the world
RAMP = (1.0, 3.0)  # SVD's guidance in the first and the last frame


@dataclass(frozen=True)
class Row:
    """Row of a table: a trained model, sampled in one way.

    Attributes:
      label: text of the row.
      run: `BASE` or a key of `RUNS`.
      steps: sampling steps.
      sampler: a key of `solvers.SAMPLERS`.
      guidance: scales in the first and the last frame; None for no guidance.
      published: the paper's FVD (UCF-101 first frames); None if not published.
      seconds: the paper's UNet time of a video on one A100; None if not published.
      decoder: decoder of the frames, as for `Sampler.load`.
    """

    label: str
    run: str
    steps: int = 1
    sampler: str = "euler"
    guidance: tuple[float, float] | None = None
    published: float | None = None
    seconds: float | None = None
    decoder: str = "full"

    @property
    def key(self) -> str:
        """Name of the row's files; rows with the same model, steps, guidance and decoder share their files."""
        guided = "-guided" if self.guidance else ""
        tiny = "" if self.decoder == "full" else "-tiny_decoder"
        return f"{self.run}-{self.steps}{guided}{tiny}".replace(" ", "_")


def _svd(steps: int, published: float, seconds: float) -> Row:
    return Row(f"SVD, {steps} steps", BASE, steps, guidance=RAMP, published=published, seconds=seconds)


def _lcm(steps: int, published: float | None, seconds: float | None) -> Row:
    return Row(f"AnimateLCM, {steps} steps", "animatelcm", steps, "animatelcm", None, published, seconds)


def _sfv(label: str, run: str, published: float | None) -> Row:
    return Row(label, run, published=published)


TABLES = {
    "table1": (
        "Table 1: methods",
        [
            _svd(25, 153.4, 10.79),
            _svd(16, 194.4, 6.89),
            _svd(8, 488.6, 3.44),
            _svd(4, 1687.0, 1.72),
            Row("SVD without guidance, 25 steps", BASE, 25),
            Row("SVD without guidance, 1 step", BASE, 1),
            _lcm(8, 281.0, 1.85),
            _lcm(4, 801.4, 0.92),
            _lcm(2, 1158.4, 0.46),
            _lcm(1, None, None),
            Row("UFOGen, 1 step", "ufogen", published=1917.2, seconds=0.30),
            Row("LADD, 1 step", "ladd", published=1893.8, seconds=0.30),
            Row("SF-V, 1 step", "sfv", published=180.9, seconds=0.30),
        ],
    ),
    "table2": (
        "Table 2: discriminator heads",
        [
            _sfv("spatial and temporal", "sfv", 180.9),
            _sfv("spatial only", "spatial heads", 514.7),
            _sfv("temporal only", "temporal heads", 539.2),
        ],
    ),
    "table3": (
        "Table 3: noise of the discriminator, ln s' ~ N(P_mean, 1)",
        [
            _sfv("P_mean -2", "P_mean -2", 3370.4),
            _sfv("P_mean -1", "sfv", 180.9),
            _sfv("P_mean 0", "P_mean 0", 416.7),
            _sfv("P_mean 1", "P_mean 1", 632.9),
        ],
    ),
    "losses": (
        "Losses (not in the paper)",
        [
            _sfv("SF-V", "sfv", None),
            _sfv("without reconstruction", "no reconstruction", None),
            _sfv("without R1", "no R1", None),
        ],
    ),
    "balance": (
        "Balance of the losses and levels of the generator, 3200 steps (not in the paper)",
        [
            _sfv("as printed", "long", None),
            _sfv("gradients held at 1.5", "balanced", None),
            _sfv("reconstruction x 20", "more reconstruction", None),
            _sfv("highest level alone", "two levels", None),
            _sfv("highest level 70 %", "mostly one step", None),
        ],
    ),
    "recipe": (
        "The printed recipe and the default one, 800 steps (not in the paper)",
        [
            _sfv("as printed", "printed recipe", None),
            _sfv("default", "default recipe", None),
            _sfv("as printed, reconstruction x 20", "printed recipe x 20", None),
        ],
    ),
    "noise": (
        "Noise of the discriminator over a wider range, 3200 steps (not in the paper)",
        [_sfv(f"P_mean {n}", f"long, P_mean {n}", None) for n in (-6, -5, -4, -3)] + [_sfv("P_mean -1", "long", None)],
    ),
}


def rows_of(table: str, decoder: str = "full") -> list[Row]:
    """Returns the rows of a table, and after each of one step, whose time is mostly decoding, the same by `decoder`."""
    rows: list[Row] = []
    for row in TABLES[table][1]:
        rows.append(row)
        if decoder != "full" and row.steps == 1:
            label = f"{row.label}, tiny decoder"
            rows.append(replace(row, label=label, published=None, seconds=None, decoder=decoder))
    return rows


def runs_of(tables: Sequence[str]) -> list[str]:
    """Returns the runs of some tables in the order of `RUNS`, without the base model."""
    needed = {row.run for name in tables for row in TABLES[name][1]}
    return [name for name in RUNS if name in needed]


def svd_config(run: str, seed: int, model: str, cache: str) -> ConfigDict:
    """Returns the config of a run at full size, with the published numbers.

    Args:
      run: a key of `RUNS`.
      seed: of training.
      model: folder of the converted SVD.
      cache: folder of the latent cache.
    """
    recipe, changes = RUNS[run]
    config = getattr(configs, recipe)()
    config.update_from_flattened_dict(changes)
    config.update(dict(init=model, seed=seed))
    config.data.path = cache
    return config.lock()


# ---- the world ----

WORLD = dict(
    size=8,
    num_frames=4,
    shapes=("disc", "square"),
    colours=("red", "green", "blue"),
    backgrounds=((22, 24, 34),),
    directions=4,
    angle_offset=45.0,
    speeds=(1.0,),
    radii=(1.5, 2.0),
)
# Two bodies on a coarse texture that drifts slowly: 64 futures of each first frame.
SCENES = dict(
    size=32,
    num_frames=14,
    directions=4,
    angle_offset=45.0,
    speeds=(1.2,),
    radii=(5.0, 7.0),
    backgrounds=((70, 72, 90), (96, 80, 100), (64, 96, 100), (104, 96, 76), (60, 70, 60), (110, 80, 70)),
    bodies=2,
    texture=16.0,
    finest=2,
    pans=4,
    pan_speed=0.25,
)
# The same with more detail and motion, for a VAE.
VARIED = SCENES | dict(shade=0.55, rolling=True, finest=4, pan_speed=0.6)
CODEC = dict(patch=1, embed_cell=4)  # one pixel per latent cell: the tiny network learns it fastest
WIDTH = (24, 48)


@dataclass(frozen=True)
class Budget:
    """Amount of training and scoring in the world, the same for every method.

    Attributes:
      base_steps: optimizer steps of the base model.
      steps: optimizer steps of every other run.
      batch: samples per step; the base model has twice as many.
      conditions: held-out first frames that are sampled and scored.
    """

    base_steps: int
    steps: int
    batch: int
    conditions: int


FAST = Budget(base_steps=1100, steps=220, batch=8, conditions=128)
FULL = Budget(base_steps=4000, steps=800, batch=8, conditions=256)


def world_config(run: str, budget: Budget, seed: int, base: str = "") -> ConfigDict:
    """Returns the config of a run in the world.

    The generator's published learning rate is scaled to keep its ratio to the base model's. SM3's rates cannot be
    scaled like this, because its steps are of another kind: SF-V, UFOGen and LADD share those of the quickstart.

    Args:
      run: `BASE` or a key of `RUNS`.
      budget: amount of training.
      seed: of training.
      base: workdir of the base model; "" for the base model itself.
    """
    recipe, changes = RUNS.get(run, (run, {}))
    config = configs.tiny(getattr(configs, recipe)())
    config.data.world = ConfigDict(WORLD)
    config.patch_codec.update(CODEC)
    cells = (WORLD["size"] // CODEC["embed_cell"]) ** 2
    config.unet.update(
        in_channels=6, out_channels=3, block_out_channels=WIDTH, num_frames=4, cross_attention_dim=3 * cells
    )
    config.update(dict(seed=seed, init=base, batch_size=budget.batch, ema_decay=0.98, keep_checkpoints=1))
    steps = OWN_STEPS.get(run, budget.steps)
    if run == BASE:
        steps = budget.base_steps
        config.update(dict(batch_size=2 * budget.batch, ema_decay=0.995))
        # The world is learned at lower noise than SVD's videos (P_mean 1, P_std 1.6), and sampled from sigma 700.
        config.teacher.update(p_mean=0.3, p_std=1.8)
        config.generator_optimizer.update(
            lr=3e-3, b2=0.99, warmup_steps=100, clip_norm=1.0, schedule="cosine", decay_steps=steps - 100
        )
    else:
        _set_learning_rates(config, recipe, base=3e-3)
    if config.method == "ladd":
        config.ladd.warmup_steps = steps // 10
    config.update_from_flattened_dict(changes)
    return _of_length(config, steps)


def _set_learning_rates(config: configs.ConfigDict, recipe: str, base: float) -> None:
    """Sets the learning rates of a run. AnimateLCM's is to the base model's, `base`, as the published one to SVD's."""
    if config.method == "animatelcm":
        config.generator_optimizer.update(lr=base / 30, warmup_steps=20)  # 1e-6 / 3e-5
    else:
        config.generator_optimizer.update(lr=4e-4, warmup_steps=20, delay_steps=20 if recipe == "sfv" else 0)
        config.heads_optimizer.update(lr=6e-3, warmup_steps=20)


def _of_length(config: configs.ConfigDict, steps: int) -> ConfigDict:
    """Returns `config` for a run of `steps` steps, locked: 50 log intervals, four checkpoints, no pictures."""
    config.update(dict(steps=steps, log_every=max(steps // 50, 1), checkpoint_every=max(steps // 4, 1), sample_every=0))
    return config.lock()


# ---- the scenes of the models in the package ----

SCENES_BASE = "world-teacher"  # the base model of every run
SCENES_FAST = Budget(base_steps=0, steps=200, batch=4, conditions=64)
SCENES_FULL = Budget(base_steps=0, steps=800, batch=8, conditions=128)


def scenes_config(run: str, budget: Budget, seed: int) -> ConfigDict:
    """Returns the config of a run on the scenes, which starts from the base model in the package.

    SF-V's rows are those of the default recipe: the printed losses have another balance at each size of a video. Levels
    of the discriminators are shifted by the size (`noise_shift`), so P_mean is that of the paper. SF-V trains most at
    the highest level, as LADD does. Optimizers, and four steps of the heads per step of the generator, are those of
    `configs/world.py:sfv`, in LADD too; UFOGen has two steps of the generator per step of the heads, as published. The
    runs of `RECIPES` keep SM3 and equal numbers of steps.

    Args:
      run: a key of `RUNS`.
      budget: amount of training.
      seed: of training.
    """
    recipe, changes = RUNS[run]
    recipe = "sfv" if recipe == "printed" and run not in RECIPES else recipe
    config = getattr(configs, recipe)()
    config.update(dict(init=SCENES_BASE, seed=seed, dtype="float32", accumulation_steps=1, batch_size=budget.batch))
    config.update(dict(ema_decay=0.98, keep_checkpoints=1))
    config.data.update(source="world", world=ConfigDict(SCENES), world_size=6000)
    config.unet.temporal_conv = "matmul"
    if "discriminator" in config:
        config.discriminator.update(temporal_kernel=5, projection_dim=32, sinusoid_dim=32)
    if config.method == "animatelcm" or run in RECIPES:
        _set_learning_rates(config, recipe, base=1.5e-3)
    else:
        config.generator_optimizer = configs.adamw(3e-4, b1=0.5, b2=0.99, delay_steps=8, warmup_steps=5)
        config.heads_optimizer = configs.adamw(2e-3, b1=0.5, b2=0.99, warmup_steps=20)
        if config.method != "ufogen":
            config[config.method].generator_every = 4
    if config.method == "sfv" and run not in RECIPES:
        config.sfv.update(noise_shift=True, balance=6.0)
        if "sfv.generator_levels" not in changes:
            config.sfv.probabilities = (0.15, 0.15, 0.7)
        if changes.get("sfv.recon_weight") == 0:
            config.sfv.balance = 0.0  # there is nothing to balance
    elif config.method == "ladd":
        config.ladd.update(noise_shift=True, warmup_steps=budget.steps // 10)
    config.update_from_flattened_dict(changes)
    return _of_length(config, budget.steps)
