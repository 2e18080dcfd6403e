"""How a score against real videos is made: every choice a field, so that two people get the same number.

The SF-V paper (section 4) says: first frames of UCF-101 as conditions, 14 frames at 7 fps, generated at 1024x576,
scored at 320x240 by FVD. The rest it leaves open; the defaults below are choices (docs/decisions.md) and are printed
with every result.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from sfv_jax.data.video import cover_resize_crop
from sfv_jax.errors import UserError
from sfv_jax.evaluation.frechet import MIN_SAMPLES

FILTERS = {name.lower(): getattr(Image.Resampling, name) for name in ("BILINEAR", "BICUBIC", "LANCZOS", "BOX")}


@dataclass(frozen=True)
class Protocol:
    """Fields with a * are the paper's.

    Attributes:
      n: clips of each set; 0 for as many as there are.
      seed: decides which clips, in which order, and the noise: clip k is generated with seed `seed + k`.
      num_frames, fps: frames of a clip and their rate; real videos are resampled by time, from their start. *
      height, width: size that is generated. *
      score_height, score_width: size at which features are computed. *
      crop: "none" stretches the condition to the generated size and back, as diffusers' pipeline does; "centre" cuts
        conditions and real clips to the generated aspect ratio.
      filter: resizing to the score size, Pillow's, with antialiasing: one of `FILTERS`.
      ddof: covariances divide by n - ddof.
    """

    n: int = 2048
    seed: int = 0
    num_frames: int = 14
    fps: float = 7.0
    height: int = 576
    width: int = 1024
    score_height: int = 240
    score_width: int = 320
    crop: str = "none"
    filter: str = "bilinear"
    ddof: int = 0

    def __post_init__(self):
        if self.crop not in ("none", "centre"):
            raise UserError(f"crop {self.crop!r}: choose none or centre")
        if self.filter not in FILTERS:
            raise UserError(f"filter {self.filter!r}: choose one of {', '.join(FILTERS)}")
        if 0 < self.n < MIN_SAMPLES or self.n < 0:
            raise UserError(f"n is {self.n}: a Frechet distance needs at least {MIN_SAMPLES} clips")

    def real(self, frames: np.ndarray) -> np.ndarray:
        """Real clips `[t, h, w, 3]` as they are scored: uint8 `[t, score_height, score_width, 3]`."""
        return self.score(self.cut(frames))

    def cut(self, frames: np.ndarray) -> np.ndarray:
        """`[..., h, w, 3]` cut to the generated aspect ratio, if `crop` says so; not resized."""
        if self.crop == "none":
            return frames
        h, w = frames.shape[-3:-1]
        ratio = self.width / self.height
        height, width = (round(w / ratio), w) if w / h < ratio else (h, round(h * ratio))
        return cover_resize_crop(frames, height, width)

    def score(self, frames: np.ndarray) -> np.ndarray:
        """`[t, h, w, 3]` stretched to the score size with `filter`."""
        size = (self.score_width, self.score_height)
        if frames.shape[1:3] == size[::-1]:
            return frames
        return np.stack([np.asarray(Image.fromarray(x).resize(size, FILTERS[self.filter])) for x in frames])

    def reading(self) -> dict:
        """The fields that decide the features of real clips."""
        unused = ("n", "seed", "ddof") + (("height", "width") if self.crop == "none" else ())
        return {name: value for name, value in asdict(self).items() if name not in unused}

    def order(self, names: list[str]) -> np.ndarray:
        """A permutation of the clips `names`, decided by `seed` alone: which are used when fewer are needed."""
        return np.random.default_rng(self.seed).permutation(len(names))


def digest(value) -> str:
    """SHA-256 of anything JSON can tell."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(there: dict, here: dict) -> list[str]:
    """What differs between two manifests, a line for each field of `here` or of the dicts in it."""
    lines = []
    for name, value in here.items():
        other = there.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            lines += differences(other, dict.fromkeys(other) | value)
        elif other != value:
            lines.append(f"{name} is {other} there, {value} here")
    return lines
