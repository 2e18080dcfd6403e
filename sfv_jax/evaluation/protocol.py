"""Protocol of a score against real videos: every choice is a field, so that scores are reproducible.

The SF-V paper (section 4) specifies: first frames of UCF-101 as conditions, 14 frames at 7 fps, generated at 1024x576,
scored at 320x240 by FVD. It leaves the rest open; the defaults below are our choices (docs/decisions.md) and are
printed with every result.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from sfv_jax.data.images import fitted
from sfv_jax.errors import UserError
from sfv_jax.evaluation.frechet import MIN_SAMPLES

CROPS = ("none", "centre")
FILTERS = {name.lower(): getattr(Image.Resampling, name) for name in ("BILINEAR", "BICUBIC", "LANCZOS", "BOX")}


@dataclass(frozen=True)
class Protocol:
    """Choices of a score. The values of fields with a * are the paper's.

    Attributes:
      n: clips of each set; 0 for all.
      seed: determines the selection and order of clips, and the noise: clip k is generated with seed `seed + k`.
      num_frames, fps: frames of a clip and their rate; real videos are resampled by time, from their start. *
      height, width: size of generated clips. *
      score_height, score_width: size at which features are computed. *
      crop: "none" stretches the condition to the generated size and back, as diffusers' pipeline does; "centre" crops
        conditions and real clips to the generated aspect ratio.
      filter: Pillow's filter for resizing to the score size, with antialiasing: one of `FILTERS`.
      ddof: covariances divide by n - ddof.

    Raises:
      UserError: if `crop`, `filter` or `n` is invalid.
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
        if self.crop not in CROPS:
            raise UserError(f"crop {self.crop!r}: choose none or centre")
        if self.filter not in FILTERS:
            raise UserError(f"filter {self.filter!r}: choose one of {', '.join(FILTERS)}")
        if 0 < self.n < MIN_SAMPLES or self.n < 0:
            raise UserError(f"n is {self.n}: a Frechet distance needs at least {MIN_SAMPLES} clips")

    def real(self, frames: np.ndarray) -> np.ndarray:
        """Prepares real frames uint8 `[..., h, w, 3]` for scoring: uint8 `[..., score_height, score_width, 3]`."""
        return self.score(self.cut(frames))

    def cut(self, frames: np.ndarray) -> np.ndarray:
        """Crops frames uint8 `[..., h, w, 3]` to the generated aspect ratio if `crop` is "centre"; never resizes."""
        if self.crop == "none":
            return frames
        h, w = frames.shape[-3:-1]
        ratio = self.width / self.height
        height, width = (round(w / ratio), w) if w / h < ratio else (h, round(h * ratio))
        return fitted(frames, height, width, "crop")

    def score(self, frames: np.ndarray) -> np.ndarray:
        """Stretches frames uint8 `[..., h, w, 3]` to the score size with `filter`."""
        size = (self.score_width, self.score_height)
        if frames.shape[-3:-1] == size[::-1]:
            return frames
        flat = frames.reshape(-1, *frames.shape[-3:])
        resized = np.stack([np.asarray(Image.fromarray(x).resize(size, FILTERS[self.filter])) for x in flat])
        return resized.reshape(*frames.shape[:-3], *resized.shape[1:])

    def reading(self) -> dict:
        """Returns the fields that determine the features of real clips."""
        unused = ("n", "seed", "ddof") + (("height", "width") if self.crop == "none" else ())
        return {name: value for name, value in asdict(self).items() if name not in unused}

    def order(self, names: list[str]) -> np.ndarray:
        """Returns a permutation of the clips `names` that depends on `seed` alone; clips are used in this order."""
        return np.random.default_rng(self.seed).permutation(len(names))


def digest(value) -> str:
    """Returns the SHA-256 of a JSON-serializable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(there: dict, here: dict) -> list[str]:
    """Returns one line for each field of `here`, or of dicts in it, that differs in `there`."""
    lines = []
    for name, value in here.items():
        other = there.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            lines += differences(other, dict.fromkeys(other) | value)
        elif other != value:
            lines.append(f"{name} is {other} there, {value} here")
    return lines
