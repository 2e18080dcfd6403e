"""Scores of how frames look, from pixels alone: detail, contrast, first frame, diversity; and similarity by CLIP.

Frames are uint8 `[t, h, w, 3]` RGB. None of these scores knows what a good video is: each compares a video with its
own condition image or with videos of other seeds, and says nothing about what it is not defined by.
"""

from collections.abc import Callable
from itertools import combinations

import numpy as np

from sfv_jax.errors import UserError
from sfv_jax.sampling.sampler import resize


def luma(frames: np.ndarray) -> np.ndarray:
    """fp32 `[..., h, w]` in 0..255 of RGB `[..., h, w, 3]`, with the weights of BT.709."""
    return frames.astype(np.float32) @ np.array([0.2126, 0.7152, 0.0722], np.float32)


def sharpness(frames: np.ndarray) -> np.ndarray:
    """Mean absolute Laplacian of the luma of each frame, in grey levels: fp32 `[t]`.

    The Laplacian is the difference between four times a pixel and its four neighbours; the border is left out. Blur
    lowers it, noise and ringing raise it. It is measured in pixels, so it compares at one resolution only.
    """
    y = luma(frames)
    centre = y[..., 1:-1, 1:-1]
    around = y[..., :-2, 1:-1] + y[..., 2:, 1:-1] + y[..., 1:-1, :-2] + y[..., 1:-1, 2:]
    return np.abs(4 * centre - around).mean(axis=(-2, -1))


def contrast(frames: np.ndarray) -> np.ndarray:
    """Standard deviation of the luma over the pixels of each frame, in grey levels: fp32 `[t]`."""
    return luma(frames).std(axis=(-2, -1))


def against(measure: Callable[[np.ndarray], np.ndarray], frames: np.ndarray, image: np.ndarray) -> np.ndarray:
    """`measure` of each frame over that of the condition `image`, fp32 `[t]`; 1 means all is kept, nan that the image
    has nothing of it. An image of another size is stretched to the frames', as samplers do."""
    reference = float(measure(resize(image, frames.shape[1:3])[None])[0])
    return measure(frames) / reference if reference else np.full(len(frames), np.nan, np.float32)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images of one shape, in dB; infinite if they are equal."""
    error = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def first_frame_psnr(frames: np.ndarray, image: np.ndarray) -> float:
    """PSNR in dB of the first frame against the condition image, stretched to the frames' size."""
    return psnr(frames[0], resize(image, frames.shape[1:3]))


def diversity(clips: np.ndarray) -> float:
    """How far videos of one condition and several seeds lie apart: RMSE in grey levels, mean over all pairs.

    Over all frames but the first, which the condition decides. A sampler that ignores its noise scores 0; noise that
    is not motion counts too.

    Args:
      clips: uint8 `[n, t, h, w, 3]`, one per seed.
    Raises:
      UserError: for less than two videos, or two frames.
    """
    if len(clips) < 2 or clips.shape[1] < 2:
        raise UserError(f"diversity needs two videos of two frames, got {clips.shape[:2]}")
    later = clips[:, 1:].astype(np.float32)
    return float(np.mean([np.sqrt(np.mean(np.square(a - b))) for a, b in combinations(later, 2)]))


def clip_similarity(frames: np.ndarray, image: np.ndarray, embed: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Cosine of the image embedding of each frame with that of the condition, fp32 `[t]`.

    Args:
      embed: uint8 `[b, h, w, 3]` to `[b, d]`: `SVDCodec.embed`, SVD's own CLIP tower.
    """
    unit = [np.asarray(embed(x), np.float32) for x in (frames, resize(image, frames.shape[1:3])[None])]
    first, second = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in unit)
    return first @ second[0]
