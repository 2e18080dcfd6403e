"""Legal values of all config fields, in one table: `config_check` applies it, docs/configuration.md is made from it.

What depends on several fields is in `config_check`. What depends on the model, the data or the devices is checked where
these are opened: whether `trainable` finds a parameter, latents fit the UNet, or the mesh covers the devices.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from sfv_jax import choices

COUNT = 2**31 - 1  # steps are counted in int32
MISSING = object()
KINDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text"}


@dataclass(frozen=True)
class Rule:
    """Type and range of a field's value.

    Attributes:
      meaning: one line for docs/configuration.md.
      kind: int, float (which also takes int), bool or str; of each entry if `length` is given.
      low, high: the range, inclusive. Numbers are always finite.
      above: lower bound that is itself excluded.
      parity: "odd", "even" or "" for both.
      among: legal strings; empty: all.
      other: a legal value besides, such as None.
      length: least and greatest number of entries of a list; None: a single value.
      rows: whether the value is a list of such lists.
    """

    meaning: str
    kind: type
    low: float | None = None
    high: float | None = None
    above: float | None = None
    parity: str = ""
    among: Sequence[str] = ()
    other: object = MISSING
    length: tuple[int, int] | None = None
    rows: bool = False

    @property
    def legal(self) -> str:
        """Description of the legal values."""
        one = "one of " + ", ".join(self.among) if self.among else KINDS[self.kind]
        if self.parity:
            one = one.replace("a whole", f"an {self.parity}")
        bounds = [f"above {self.above:g}"] if self.above is not None else []
        bounds += [f"from {digits(self.low)}"] if self.low is not None else []
        bounds += [f"to {digits(self.high)}"] if self.high is not None else []
        one = " ".join([one, *bounds])
        if self.length is not None:
            least, most = self.length
            entries = f"{least}" if least == most else f"{least} to {most}"
            one = f"a list of {entries} entries, each {one}"
        if self.rows:
            one = f"a list of lists, each {one}"
        return one if self.other is MISSING else f"{self.other}, or {one}"

    def allows(self, value: object) -> bool:
        """Returns whether `value` is legal."""
        if self.other is not MISSING and type(value) is type(self.other) and value == self.other:
            return True
        if self.rows:
            return isinstance(value, (tuple, list)) and len(value) > 0 and all(map(self._allows_row, value))
        return self._allows_row(value)

    def _allows_row(self, value: object) -> bool:
        if self.length is None:
            return self._allows_one(value)
        if not isinstance(value, (tuple, list)) or not self.length[0] <= len(value) <= self.length[1]:
            return False
        return all(map(self._allows_one, value))

    def _allows_one(self, value: object) -> bool:
        if isinstance(value, bool) or self.kind is bool:
            return isinstance(value, bool) and self.kind is bool
        if isinstance(value, str) and self.kind is str:
            return not self.among or value in self.among
        if not isinstance(value, (int, float) if self.kind is float else self.kind):
            return False
        assert isinstance(value, (int, float))
        return (
            abs(value) <= sys.float_info.max  # not so NaN and infinity, nor integers that no float can hold
            and (self.above is None or value > self.above)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (not self.parity or value % 2 == (self.parity == "odd"))
        )


def digits(x: float) -> str:
    """Returns a bound as text, whole numbers without exponent."""
    return str(int(x)) if float(x).is_integer() else f"{x:.6g}"


def count(meaning: str, low: int = 1, high: int = COUNT, **more) -> Rule:
    """Returns the rule of a whole number."""
    return Rule(meaning, int, low, high, **more)


def real(meaning: str, low: float | None = 0, high: float | None = None, **more) -> Rule:
    """Returns the rule of a number."""
    return Rule(meaning, float, low, high, **more)


def share(meaning: str, high: float = 1, **more) -> Rule:
    """Returns the rule of a share or probability."""
    return Rule(meaning, float, 0, high, **more)


def positive(meaning: str, high: float | None = None, **more) -> Rule:
    """Returns the rule of a number above 0."""
    return Rule(meaning, float, high=high, above=0, **more)


def decay(meaning: str) -> Rule:
    """Returns the rule of the decay of a moving average; at 1 it would never move."""
    return Rule(meaning, float, 0, 0.999999)


def choice(meaning: str, *among: str) -> Rule:
    """Returns the rule of a string with few legal values."""
    return Rule(meaning, str, among=among)


def switch(meaning: str) -> Rule:
    """Returns the rule of True and False."""
    return Rule(meaning, bool)


def text(meaning: str) -> Rule:
    """Returns the rule of any string."""
    return Rule(meaning, str)


GENERAL = {
    "method": choice("training method; each has its own file in `configs/`", *choices.METHODS),
    "init": text("model folder or workdir to start from; empty: random weights, for the procedural world"),
    "init_weights": choice("which weights of a workdir to start from", "ema", "generator"),
    "encoders": text("model folder with VAE and CLIP tower for a UNet without `init`; empty: the patch codec"),
    "seed": count("seed of weights, order of the data, noise", 0, 2**32 - 1),
    "steps": count("optimizer steps of the whole run"),
    "batch_size": count("samples per optimizer step, over all devices and micro-batches"),
    "accumulation_steps": count("micro-batches per optimizer step"),
    "dtype": choice(
        "compute dtype; auto: float32 on CPU, else bfloat16; parameters and optimizer state are float32",
        *("auto", *choices.DTYPES),
    ),
    "ema_decay": decay("decay of the averaged generator"),
    "trainable": text('generator parameters to train: "all", "temporal", "spatial", or a regular expression on paths'),
    "data.source": choice("latents: a cache of `sfv_jax.prepare`; world: the procedural world", "latents", "world"),
    "data.path": text("folder of the latent cache"),
    "data.split": choice("part of the data to train on", "train", "heldout"),
    "data.any_encoders": switch("accept a cache from other encoders than those of `init`"),
    "data.world_size": count("clips in the world's training split"),
    "mesh.data": count("devices that share the batch; -1: all that the other two axes leave", 1, 2**20, other=-1),
    "mesh.fsdp": count("devices that share the batch and the stored parameters", 1, 2**20),
    "mesh.spatial": count("devices that share the rows of every frame", 1, 2**20),
    "log_every": count("steps between lines of metrics"),
    "checkpoint_every": count("steps between checkpoints; the last step always has one"),
    "keep_checkpoints": count("number of newest checkpoints that are kept"),
    "keep_every": count("also keeps checkpoints whose step is a multiple of this; 0: none", 0),
    "sample_every": count("steps between pictures; 0: none", 0),
    "sample_count": count("videos in a picture", 1, 1024),
    "alarms.on_alarm": choice("what an alarm does", "warn", "stop"),
    "alarms.patience": count("log intervals in a row before an alarm"),
    "alarms.min_live": share("alarm below this active share of the discriminator's loss gradient; 0: off"),
    "alarms.max_gap": real("alarm above this gap between fake and real logits; 0: off"),
    "alarms.min_motion": real("alarm below this motion of fakes, as a share of real videos'; 0: off"),
    "alarms.min_adv_to_rec": real("alarm below this ratio of adversarial to second gradient; 0: off"),
    "alarms.max_adv_to_rec": real("alarm above this ratio; 0: off"),
    "alarms.max_data_wait": share("warning above this share of time spent waiting for data; 0: off"),
    "wandb_project": text("Weights & Biases project to write to as well; empty: none"),
    "profile_start": count("the profiler traces the steps after this one", 0),
    "profile_steps": count("number of traced steps; 0: none", 0),
}
OPTIMIZER = {
    "name": choice("optimizer", "sm3", "adamw", "muon"),
    "lr": positive("learning rate", 1),
    "delay_steps": count("steps before the warm-up in which nothing moves", 0),
    "warmup_steps": count("linear warm-up; 0: none", 0),
    "schedule": choice("learning rate after the warm-up", "constant", "cosine", "linear"),
    "decay_steps": count('length of "cosine" and "linear", to zero', 0),
    "clip_norm": real("gradients are scaled down to at most this norm; 0: never"),
    "momentum": decay("SM3 and Muon (there 0.95 by default): momentum"),
    "beta": decay("SM3: decay of the second moment; 0: sums, as in SM3-II"),
    "max_decay": real("SM3: decay of the running maximum; 1: it never falls", 0, 1),
    "b1": decay("AdamW, and Muon for vectors: decay of the first moment"),
    "b2": decay("the same: decay of the second moment"),
    "weight_decay": share("AdamW and Muon: weight decay"),
}
OWN_FIELDS = {
    "sm3": ("momentum", "beta", "max_decay"),
    "adamw": ("b1", "b2", "weight_decay"),
    "muon": ("momentum", "b1", "b2", "weight_decay"),
}
DISCRIMINATOR = {
    "spatial": switch("heads that see each frame by itself"),
    "temporal": switch("heads that see each position along time"),
    "spatial_kernel": count("kernel of the spatial heads", 1, 63, parity="odd"),
    "temporal_kernel": count("kernel of the temporal heads", 1, 63, parity="odd"),
    "projection_dim": count("width of the inner product with the condition", 1, 4096),
    "sinusoid_dim": count("width of the sinusoids of noise level and frame index", 2, 4096, parity="even"),
}
GAN = {
    "adv_weight": real("weight of the adversarial loss of the generator"),
    "recon_weight": real("weight of the method's second loss"),
    "gan_loss": choice("adversarial loss", "hinge", "relativistic"),
    "r1_weight": real("weight of the gradient penalty on real videos; 0: none"),
    "r2_weight": real("weight of the same penalty on fakes; 0: none"),
    "r1_form": choice("form of both penalties", "gradient", "perturbation"),
    "perturbation_std": positive("standard deviation of the perturbations"),
    "shared_noise": switch("real and fake videos get the same level and noise before the discriminator"),
    "generator_every": count("the generator is updated in every n-th step"),
    "heads_every": count("the heads are updated in every n-th step"),
    "balance": real("ratio at which adversarial and second gradient are held; 0: off", 0, 1e6),
    "balance_decay": decay("decay of the average of that ratio"),
    "balance_limit": real("the factor of the second loss lies between 1 / this and this", 1, 1e9),
    "heads_reduction": choice("losses and penalties over the heads", "mean", "sum"),
    "r1_every": count("penalties in every n-th step, n-fold"),
}
LEVELS = {
    "generator_levels": count("noise levels of Eq. 5 for the generator, the lowest included", 2, 10**6),
    "discriminator_levels": count("noise levels of Eq. 5 for the discriminator", 3, 10**6),
    "p_mean": real("mean of the logarithm of the discriminator's noise level", -10, 10),
    "p_std": real("standard deviation of that logarithm; its sign does not matter", -10, 10),
    "noise_shift": switch("`p_mean` is that of the paper's video size, shifted for others"),
}
ADVERSARIAL = {"backbone_init": text("model folder or workdir with the discriminator's backbone; empty: as `init`")}
WEIGHTS = dict(low=0, length=(1, 64))
METHODS = {
    "sfv": LEVELS
    | {
        "recon_c": Rule("c of the pseudo-Huber loss; None: 0.00054 sqrt(d)", float, above=0, other=None),
        "recon_reduction": choice("norm of that loss", "video", "rms", "element"),
        "probabilities": share("probabilities of the generator's levels; (): equal", length=(0, 1000)),
    }
    | GAN,
    "ladd": LEVELS
    | {
        "probabilities": share("probabilities of the highest generator levels, 1 together", length=(1, 1000)),
        "warmup_steps": count("steps with the warm-up probabilities", 0),
        "warmup_probabilities": share("probabilities during the warm-up", length=(1, 1000)),
        "teacher_steps": count("0: real videos; n: the base model samples videos in n steps", 0, 1000),
        "teacher_guidance": real("guidance of the base model in the first and the last frame", length=(2, 2)),
    }
    | GAN,
    "ufogen": {
        "levels": count("noise levels of Eq. 5", 2, 10**6),
        "jump": share("distance of the discriminator's level from the generator's, as a share of all levels"),
    }
    | GAN,
    "animatelcm": {
        "levels": count("noise levels of Eq. 5", 2, 10**6),
        "guidance_first": real("guidance in the first frame, drawn per video", **WEIGHTS),
        "guidance_last": real("guidance in the last frame, drawn per video", **WEIGHTS),
        "huber_c": positive("c of the pseudo-Huber loss"),
        "weight_power": real("power of the weight 1 / (s_i - s_{i+1})", 0, 10),
        "sampler": choice("sampler of the pictures made during training", *choices.SAMPLERS),
        "sample_steps": count("sampling steps of these pictures", 1, 1000),
    },
    "teacher": {
        "p_mean": real("mean of the logarithm of the noise level", -10, 10),
        "p_std": positive("standard deviation of that logarithm", 10),
        "cond_drop": share("share of samples without each condition, and without both", 1 / 3),
        "sample_steps": count("Euler steps of the pictures made during training", 1, 1000),
    },
    "vae": {
        "num_frames": count("consecutive frames of a clip that are trained on together", 1, 4096),
        "gradient_weight": real("weight of the L1 error of differences between neighboring pixels"),
        "flicker_weight": real("weight of the L1 error of differences between frames"),
        "kl_weight": real("weight of the KL term, a mean over latent numbers"),
        "ends_weight": positive("weight of the errors in the first and last frame, relative to the others", 1000),
    },
    "decoder": {
        "variant": choice("sizes of the decoder: TAESDV's, or a wider one", *choices.TINY_DECODERS),
        "block_out_channels": count("widths from the latents to the pixels; (): the variant's", 1, 4096, length=(0, 8)),
        "layers_per_block": count("blocks with memory of each level; (): the variant's", 0, 8, length=(0, 8)),
        "init": text("file, folder, run or name of a tiny decoder to start from; empty: random weights"),
        "crop": count("side of random squares in latent cells; 0: whole frames", 0, 4096),
        "l1_weight": real("weight of the L1 distance from the teacher's frames"),
        "flicker_weight": real("weight of the L1 distance of frame differences"),
        "feature_weight": real("weight of the error of the projected features"),
        "real_weight": real("weight of the L1 distance from real frames; needs data that has them"),
        "adv_weight": real("weight of the patch critic's loss; 0: no critic"),
        "r1_weight": real("weight of the critic's gradient penalty"),
        "generated_share": share("share of the latents that the UNet of `init` makes in one step", 0.95),
    },
}
CHANNELS = dict(low=1, high=2**14)
UNET = {
    "in_channels": count("channels of the input: noised latents and condition", 2, 2**14),
    "out_channels": count("channels of the latents", **CHANNELS),
    "block_out_channels": count("channels of each level", **CHANNELS, length=(1, 8)),
    "num_attention_heads": count("attention heads of each level", 1, 1024, length=(1, 8)),
    "layers_per_block": count("residual blocks of each level", 1, 16),
    "cross_attention_dim": count("numbers of an image embedding", 1, 2**16),
    "addition_time_embed_dim": count("width of the sinusoids of the added ids", 2, 2**14, parity="even"),
    "num_frames": count("frames of a clip", 1, 4096),
    "sample_size": count("side of the latents in the model's description; without effect", 1, 2**14),
    "norm_groups": count("groups of every GroupNorm", 1, 2**14),
    "resnet_eps": positive("epsilon of the residual blocks' norms", 1),
    "mid_eps": positive("epsilon of the norms of the last down block and the middle", 1),
    "temporal_conv": choice(
        "form of the temporal convolutions; auto: matmul on CPU, else conv", *choices.TEMPORAL_CONVS
    ),
    "attention_kernel": choice("attention over the positions of a frame", *choices.ATTENTION_KERNELS),
    "remat": switch("recompute in the backward pass: less memory, more time"),
}
AUTOENCODER = {
    "block_out_channels": count(
        "channels of each level; each but the last halves height and width", **CHANNELS, length=(1, 8)
    ),
    "layers_per_block": count("residual blocks of each level of the encoder; the decoder has one more", 1, 16),
    "latent_channels": count("channels of the latents", **CHANNELS),
    "scaling_factor": positive("factor of the latents before diffusion"),
    "sample_size": count("side of the frames in the model's description; without effect", 1, 2**14),
    "norm_groups": count("groups of every GroupNorm", 1, 2**14),
    "temporal_conv": choice("form of the temporal convolutions; auto: matmul on CPU", *choices.TEMPORAL_CONVS),
    "decode_pixels": count("pixels decoded at a time; 0: all", 0),
}
WORLD = {
    "size": count("side of a frame in pixels", 4, 4096),
    "num_frames": count("frames of a clip", 1, 4096),
    "shapes": Rule("shapes to draw", str, among=choices.SHAPES, length=(1, len(choices.SHAPES))),
    "colours": Rule("colors to draw", str, among=choices.COLOURS, length=(1, len(choices.COLOURS))),
    "directions": count("number of directions of motion", 1, 3600),
    "angle_offset": real("angle of the first direction, in degrees; 90 is down", -360, 360),
    "speeds": real("speeds in pixels per frame", 0, 4096, length=(1, 64)),
    "radii": positive("smallest and largest radius in pixels", 4096, length=(2, 2)),
    "backgrounds": count("background colors: red, green and blue", 0, 255, length=(3, 3), rows=True),
    "bodies": count("bodies in a clip, each of another color", 1, len(choices.COLOURS)),
    "shade": share("brightness of one half of each body; 1: plain bodies"),
    "rolling": switch("bodies turn as if they rolled along the bottom"),
    "finest": count("most periods of the texture over the frame", 2, 1000),
    "texture": real("RMS amplitude of the background's texture, in gray levels", 0, 128),
    "pans": count("directions in which the background drifts", 1, 360),
    "pan_speed": real("speed of the background in pixels per frame", 0, 4096),
    "seed": count("seed of all clips", 0, 2**32 - 1),
}
PATCH_CODEC = {
    "patch": count("pixels per latent cell in each direction", 1, 1024),
    "scaling_factor": positive("factor of the latents"),
    "embed_cell": count("side of the averaged cells of an image embedding, in pixels", 1, 4096),
    "offset": real("mean of the signed pixels, subtracted first", -1, 1),
}


def prefixed(section: str, rules: dict[str, Rule]) -> dict[str, Rule]:
    """Returns `rules` under the names `SECTION.FIELD`."""
    return {f"{section}.{field}": rule for field, rule in rules.items()}


SECTIONS = {  # of the fields that not every config has
    "generator_optimizer": OPTIMIZER,
    "heads_optimizer": OPTIMIZER,
    "discriminator": DISCRIMINATOR,
    **METHODS,
    "unet": UNET,
    "autoencoder": AUTOENCODER,
    "data.world": WORLD,
    "patch_codec": PATCH_CODEC,
}
RULES = (
    GENERAL
    | ADVERSARIAL
    | {name: rule for section, rules in SECTIONS.items() for name, rule in prefixed(section, rules).items()}
)
