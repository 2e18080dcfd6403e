"""Scores of appearance from pixels: detail, contrast, first frame, diversity.

Frames are uint8 `[t, h, w, 3]` RGB. None of these scores measures quality as such: each compares a video with its own
condition image or with videos of other seeds.
"""

from collections.abc import Callable
from itertools import combinations

import numpy as np

from sfv_jax.data.pictures import psnr
from sfv_jax.errors import UserError
from sfv_jax.sampling.inputs import resize


def luma(frames: np.ndarray) -> np.ndarray:
    """Returns the luma fp32 `[..., h, w]` in 0..255 of RGB `[..., h, w, 3]`, with the weights of BT.709."""
    return frames.astype(np.float32) @ np.array([0.2126, 0.7152, 0.0722], np.float32)


def sharpness(frames: np.ndarray) -> np.ndarray:
    """Returns the mean absolute Laplacian of the luma of each frame, in gray levels: fp32 `[t]`.

    The Laplacian is four times a pixel minus its four neighbors; border pixels are excluded. Blur lowers the score,
    noise and ringing raise it. It is measured in pixels, so only videos of one resolution are comparable.
    """
    y = luma(frames)
    center = y[..., 1:-1, 1:-1]
    around = y[..., :-2, 1:-1] + y[..., 2:, 1:-1] + y[..., 1:-1, :-2] + y[..., 1:-1, 2:]
    return np.abs(4 * center - around).mean(axis=(-2, -1))


def contrast(frames: np.ndarray) -> np.ndarray:
    """Returns the standard deviation of the luma over the pixels of each frame, in gray levels: fp32 `[t]`."""
    return luma(frames).std(axis=(-2, -1))


def against(measure: Callable[[np.ndarray], np.ndarray], frames: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Returns the ratio of `measure` on each frame to `measure` on the condition.

    Args:
      measure: `sharpness` or `contrast`.
      frames: uint8 `[t, h, w, 3]`.
      image: the condition, uint8 `[h', w', 3]`; stretched to the size of the frames, as samplers do.
    Returns:
      fp32 `[t]`; 1 if nothing is lost, NaN if the measure of the condition is 0.
    """
    reference = float(measure(resize(image, frames.shape[1:3])[None])[0])
    return measure(frames) / reference if reference else np.full(len(frames), np.nan, np.float32)


def first_frame_psnr(frames: np.ndarray, image: np.ndarray) -> float:
    """Returns the PSNR in dB of the first frame against the condition, stretched to the size of the frames."""
    return psnr(frames[0], resize(image, frames.shape[1:3]))


def diversity(clips: np.ndarray) -> float:
    """Returns the mean RMSE, in gray levels, over all pairs of videos of one condition and different seeds.

    The first frame, which the condition determines, is excluded. A sampler that ignores its noise scores 0; differences
    that are noise rather than motion count too.

    Args:
      clips: uint8 `[n, t, h, w, 3]`, one per seed.
    Raises:
      UserError: if there are fewer than two videos or two frames.
    """
    if len(clips) < 2 or clips.shape[1] < 2:
        raise UserError(f"diversity needs two videos of two frames, got {clips.shape[:2]}")
    later = clips[:, 1:].astype(np.float32)
    return float(np.mean([np.sqrt(np.mean(np.square(a - b))) for a, b in combinations(later, 2)]))
