"""Settings that determine the content of a latent cache."""

import dataclasses

from sfv_jax import choices
from sfv_jax.errors import UserError


class PrepareError(UserError):
    """Invalid settings; the message says what to change."""


def _setting(default, help: str):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that determine the content of a cache; every field except `model` is a flag of the command.

    The defaults are the paper's training setup (section 4) and SVD's own conditioning.

    Raises:
      PrepareError: if a value is invalid.
    """

    height: int = _setting(448, "frame height in pixels, a multiple of 8")
    width: int = _setting(768, "frame width in pixels, a multiple of 8")
    fit: str = _setting("crop", "how frames of another shape get this one: crop, pad or stretch")
    num_frames: int = _setting(14, "frames per clip; default: those of a clip of the model")
    fps: float = _setting(7.0, "frames per second the videos are resampled to")
    motion_bucket_id: float = _setting(127.0, "amount of motion in the clips, a condition of the model")
    noise_aug_strength: float = _setting(
        0.02, "standard deviation of the noise on the first frame, for pixels in [-1, 1]"
    )
    clips_per_video: int = _setting(1, "largest number of clips from one video, evenly spread and not overlapping")
    shard_size: int = _setting(1024, "clips per shard, the most that an interruption loses")
    heldout_fraction: float = _setting(0.0, "fraction of the files in the split 'heldout'")
    seed: int = _setting(0, "seed of the noise on the first frames and of the choice of held-out files")
    model: str = _setting("", 'identity of the encoders\' weights, "" if unknown')

    def __post_init__(self):
        for name in ("height", "width"):
            side = getattr(self, name)
            if side < 8 or side % 8:
                below = max(side, 0) // 8 * 8
                nearest = f"{below} and {below + 8}" if below else "8"
                raise PrepareError(f"{name} {side} is not a positive multiple of 8; nearest: {nearest}")
            if side > choices.MOST_PIXELS:
                raise PrepareError(f"{name} {side} is more than {choices.MOST_PIXELS}")
        if self.fit not in choices.FITS:
            raise PrepareError(f"fit {self.fit!r}: choose one of {', '.join(choices.FITS)}")
        if min(self.num_frames, self.clips_per_video, self.shard_size) < 1:
            raise PrepareError("num_frames, clips_per_video and shard_size must be positive")
        for name, least, most in (
            ("fps", *choices.FPS),
            ("seed", 0, choices.MOST_SEED),
            ("motion_bucket_id", 0, choices.MOST_MOTION),
            ("noise_aug_strength", 0, choices.MOST_NOISE),
        ):
            if not least <= getattr(self, name) <= most:  # false for NaN
                raise PrepareError(f"{name} {getattr(self, name)} is not in [{least}, {most}]")
        if not 0 <= self.heldout_fraction < 1:
            raise PrepareError(f"heldout_fraction {self.heldout_fraction} is not in [0, 1)")
