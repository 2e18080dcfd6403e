"""The models behind a page: one or two checkpoints, their decoders, the world they know, the size of their videos."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sfv_jax.checkpoints.base import training_config, world_rules
from sfv_jax.config import ConfigError
from sfv_jax.config_check import checked_world
from sfv_jax.data.worlds import World
from sfv_jax.errors import UserError
from sfv_jax.models.codec import PatchCodec
from sfv_jax.sampling.files import origin_of
from sfv_jax.sampling.sampler import Sampler
from sfv_jax.web.request import Offer, Request, RequestError

EXAMPLES = 8
TEACHER_STEPS = 25  # SVD's
TEACHER_GUIDANCE = (1.0, 3.0)  # SVD's


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint.

    Attributes:
      checkpoint: as it was given.
      samplers: one for each decoder by its name; they share their parameters.
      load: the other arguments of `Sampler.load`, for records.
      config: config of the training, as JSON; {} if the checkpoint does not tell.
    """

    checkpoint: str
    samplers: dict[str, Sampler]
    load: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Short name for the page."""
        return Path(self.checkpoint).name or self.checkpoint

    @property
    def first(self) -> Sampler:
        """The sampler with the decoder that was asked for."""
        return next(iter(self.samplers.values()))

    def sampler(self, decoder: str) -> Sampler:
        """Returns the sampler with that decoder.

        Raises:
          RequestError: if there is none.
        """
        if decoder not in self.samplers:
            raise RequestError(f"{self.name} has no decoder {decoder}, only {', '.join(self.samplers)}.")
        return self.samplers[decoder]

    def origin(self, decoder: str) -> dict[str, Any]:
        """Returns the fields of records that say where a video comes from."""
        return origin_of(self.sampler(decoder), self.checkpoint, self.load)

    def about(self) -> dict[str, Any]:
        """Returns what a page shows."""
        return {
            "step": self.first.step,
            "method": self.config.get("method"),
            "frames": self.first.unet.num_frames,
            "world": world_rules(self.config) is not None,
        }


def load(checkpoint: str, decoder: str = "full", **options: Any) -> Model:
    """Loads a checkpoint with the decoder that is asked for and the others that it has.

    Args:
      checkpoint: model folder, its name in the package, or workdir of a run.
      decoder: as for `Sampler.load`.
      options: `dtype`, `vae_dtype`, `raw` of `Sampler.load`.

    Raises:
      UserError: as `Sampler.load`.
    """
    first = Sampler.load(checkpoint, decoder=decoder, **options)
    samplers = {decoder: first}
    for other in ("full", "tiny"):
        if other == decoder:
            continue
        try:
            samplers[other] = first.with_decoder(other)
        except UserError:  # the model has none
            continue
    return Model(checkpoint, samplers, options, training_config(checkpoint))


def world_behind(config: dict[str, Any]) -> World | None:
    """Returns the procedural world of a training; None if it had another source or its config cannot be used."""
    if (rules := world_rules(config)) is None:
        return None
    try:
        return checked_world(rules)
    except ConfigError:
        return None


@dataclass(frozen=True)
class Models:
    """What a page chooses from.

    Attributes:
      main: the checkpoint.
      other: a second one, for comparisons; None for none.
      height, width: sides of all videos in pixels; None: from the image.
    """

    main: Model
    other: Model | None = None
    height: int | None = None
    width: int | None = None
    examples: list[np.ndarray] = field(default_factory=list)

    @property
    def offer(self) -> Offer:
        """What requests may choose."""
        return Offer(tuple(self.main.samplers), len(self.examples), self.other is not None)

    @property
    def defaults(self) -> Request:
        """The settings that a page begins with: one step, or those of SVD for a base model."""
        steps, guidance = 1, None
        if self.main.config.get("method") == "teacher":
            steps = TEACHER_STEPS
            guidance = TEACHER_GUIDANCE if not world_behind(self.main.config) else None
        return Request(
            example=0 if self.examples else None,
            noise_aug_strength=self.main.first.noise_aug_strength,
            num_inference_steps=steps,
            min_guidance_scale=guidance and guidance[0],
            max_guidance_scale=guidance and guidance[1],
            decoder=next(iter(self.main.samplers)),
        )

    def title(self, other: bool) -> str:
        """Returns how a page calls the main or the other model: its name, or its path if both have one name."""
        model = self.other if other and self.other else self.main
        twice = self.other is not None and self.other.name == self.main.name
        return model.checkpoint if twice else model.name

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Returns `(height, width)` of the video for an image of this size, in whole latent cells.

        They are the sides that were given, or those of `Sampler.size`.
        """
        return self.main.first.size((height, width), self.height, self.width)

    def about(self) -> list[dict[str, Any]]:
        """Returns what a page shows of each model."""
        models = [model for model in (self.main, self.other) if model]
        return [model.about() | {"name": self.title(model is self.other)} for model in models]


def make(main: Model, other: Model | None = None, height: int | None = None, width: int | None = None) -> Models:
    """Returns the models of a page, with held-out first frames of the world of `main`, if it knows one, as examples.

    Raises:
      UserError: if the codec cannot represent the size, or the two models cannot make the same videos.
    """
    codecs = [model.first.codec for model in (main, other) if model is not None]
    if len({codec.downscale for codec in codecs}) > 1 or len({type(codec) is PatchCodec for codec in codecs}) > 1:
        raise UserError(f"{main.name} and {other and other.name} make videos of different kinds: compare models of one")
    for model in (main, other):
        if model is not None:
            model.first.size((1, 1), height, width)
    world = world_behind(main.config)
    frames = [world.clip(n, "heldout")[0][0] for n in range(EXAMPLES)] if world else []
    return Models(main, other, height, width, frames)
