"""What a page may ask for: the limits, the check of a request, its defaults. This module does not import JAX."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sfv_jax import choices
from sfv_jax.errors import UserError

MOST_STEPS = 100
MOST_FPS = 120.0
MOST_GUIDANCE = 20.0
BESIDE = ("nothing", "seed", "checkpoint")  # what the second video differs in


class RequestError(UserError):
    """Request that cannot be fulfilled; the message is a sentence for the page."""


@dataclass(frozen=True)
class Limits:
    """Limits of uploads and of what is kept.

    Attributes:
      upload_bytes, upload_pixels: of an image; checked before it is decoded.
      sessions: pages open at a time.
      waiting: requests that wait for their turn.
      videos: kept in a session; the oldest is deleted for a new one.
      idle: seconds after which a page that no longer answers has ended.
    """

    upload_bytes: int = 20_000_000
    upload_pixels: int = 40_000_000
    sessions: int = 32
    waiting: int = 16
    videos: int = 24
    idle: float = 300.0


@dataclass(frozen=True)
class Offer:
    """What a server offers to its pages.

    Attributes:
      decoders: names for the decoder of frames.
      examples: number of examples.
      compare: whether there is a second checkpoint.
    """

    decoders: tuple[str, ...] = ("full",)
    examples: int = 0
    compare: bool = False


@dataclass(frozen=True)
class Request:
    """One press of the button, under SVD's own names; the defaults are those of the page.

    Attributes:
      example: number of the example to animate; None for the session's image.
      beside: one of `BESIDE`: whether a second video is made, with `second_seed` or by the second checkpoint.
      min_guidance_scale, max_guidance_scale: weights of the first and last frame; None for no guidance.
      seed, second_seed, fps, motion_bucket_id, noise_aug_strength, num_inference_steps, sampler, decoder, fit: as the
        flags of `python -m sfv_jax.sample`.
    """

    example: int | None = None
    seed: int = 0
    beside: str = "nothing"
    second_seed: int = 1
    fps: float = 7.0
    motion_bucket_id: float = 127.0
    noise_aug_strength: float = 0.02
    num_inference_steps: int = 1
    sampler: str = "euler"
    min_guidance_scale: float | None = None
    max_guidance_scale: float | None = None
    decoder: str = "full"
    fit: str = "crop"

    @property
    def guidance(self) -> tuple[float, float] | None:
        """First and last weight of the guidance ramp; None for no guidance."""
        if self.min_guidance_scale is None or self.max_guidance_scale is None:
            return None
        return self.min_guidance_scale, self.max_guidance_scale

    @property
    def sides(self) -> list[tuple[bool, int]]:
        """The videos to make: whether by the second checkpoint, and the seed."""
        second = {"seed": [(False, self.second_seed)], "checkpoint": [(True, self.seed)]}
        return [(False, self.seed), *second.get(self.beside, [])]

    def options(self, seed: int, size: tuple[int, int]) -> dict[str, Any]:
        """Returns the arguments of `Sampler.stream` for a video of `size (height, width)`, as they are recorded."""
        names = ("sampler", "fit", "fps", "motion_bucket_id", "noise_aug_strength", "guidance")
        height, width = size
        chosen = {name: getattr(self, name) for name in names}
        return {"seed": seed, "steps": self.num_inference_steps, "height": height, "width": width} | chosen


NUMBERS: dict[str, tuple[type, float, float]] = {  # kind and range
    "seed": (int, 0, choices.MOST_SEED),
    "second_seed": (int, 0, choices.MOST_SEED),
    "fps": (float, 1, MOST_FPS),
    "motion_bucket_id": (float, 0, choices.MOST_MOTION),
    "noise_aug_strength": (float, 0, choices.MOST_NOISE),
    "num_inference_steps": (int, 1, MOST_STEPS),
    "min_guidance_scale": (float, 0, MOST_GUIDANCE),
    "max_guidance_scale": (float, 0, MOST_GUIDANCE),
}


def parse(content: Any, offer: Offer, defaults: Request) -> Request:
    """Checks a request of a page.

    Args:
      content: the JSON that the page sent; fields that it lacks have the values of `defaults`.
      offer: what may be chosen.
      defaults: the defaults of the page.

    Raises:
      RequestError: with the first field that is unknown or has an impossible value.
    """
    if not isinstance(content, dict):
        raise RequestError("The request is no JSON object.")
    known = asdict(defaults)
    if unknown := sorted(str(name)[:40] for name in content.keys() - known.keys()):
        raise RequestError(f"There is no setting {unknown[0]!r}.")
    values: dict[str, Any] = known | content
    for name, bounds in NUMBERS.items():
        optional = name.endswith("_guidance_scale")
        values[name] = None if optional and values[name] is None else _number(name, values[name], *bounds)
    if (values["min_guidance_scale"] is None) != (values["max_guidance_scale"] is None):
        raise RequestError("Guidance needs both min_guidance_scale and max_guidance_scale.")
    named: Mapping[str, tuple[str, ...]] = {
        "sampler": choices.SAMPLERS,
        "fit": choices.FITS,
        "decoder": offer.decoders,
        "beside": BESIDE if offer.compare else BESIDE[:2],
    }
    for name, allowed in named.items():
        if values[name] not in allowed:
            raise RequestError(f"{name}: choose one of {', '.join(allowed)}.")
    if values["example"] is not None:
        if not offer.examples:
            raise RequestError("This model has no examples: choose an image.")
        values["example"] = _number("example", values["example"], int, 0, offer.examples - 1)
    return Request(**values)


def _number(name: str, value: Any, kind: type, least: float, most: float) -> float:
    whole = kind is int
    if isinstance(value, float) and whole and value.is_integer():  # JSON of a browser has one kind of number
        value = int(value)
    wrong = isinstance(value, bool) or not isinstance(value, int if whole else int | float)
    if wrong or not math.isfinite(value) or not least <= value <= most:
        raise RequestError(f"{name}: give a {'whole number' if whole else 'number'} from {least:g} to {most:.10g}.")
    return kind(value)
