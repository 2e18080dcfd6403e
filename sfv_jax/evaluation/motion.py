"""Scores of motion: energy, frozen videos, optical flow and the pixels that it cannot match.

Frames are uint8 `[t, h, w, 3]` RGB, t >= 2. Optical flow is DIS (Kroeger et al., arXiv 1603.03590) from OpenCV, an
optional dependency: `pip install -e ".[eval]"`.
"""

from typing import Any

import numpy as np

from sfv_jax.errors import UserError
from sfv_jax.evaluation.appearance import luma

FLOW_SIDE = 288  # short side in pixels at which flow is computed, so that videos of all sizes are comparable
CHANGE = 8.0  # gray levels of luma by which a pixel must change to count as changed
FROZEN_SHARE = 0.01  # share of changed pixels below which a video is frozen


class FlowError(UserError):
    """Missing optical flow; the message names the package to install."""


def motion_energy(frames: np.ndarray) -> float:
    """Returns the mean absolute difference of consecutive frames over pixels and channels, in gray levels of 0..255.

    Flicker and noise count as motion, and strong edges count more than weak ones.
    """
    x = frames.astype(np.int16)
    return float(np.abs(np.diff(x, axis=0)).mean())


def changed_share(frames: np.ndarray) -> float:
    """Returns the share of pixels whose luma ever differs from the first frame's by more than `CHANGE` gray levels."""
    y = luma(frames)
    return float((np.abs(y[1:] - y[0]).max(axis=0) > CHANGE).mean())


def is_frozen(frames: np.ndarray) -> bool:
    """Returns whether less than `FROZEN_SHARE` of the pixels ever differ from the first frame."""
    return changed_share(frames) < FROZEN_SHARE


def flow_scores(frames: np.ndarray) -> dict[str, float]:
    """Computes scores from optical flow between consecutive frames, each a mean over the video.

    The frames, uint8 `[t, h, w, 3]`, are scaled so that their short side has `FLOW_SIDE` pixels.

    Returns:
      flow: length of the flow per frame in percent of the short side.
      warp_error: mean absolute difference in gray levels between a frame and the next one warped back onto it, over
        pixels with consistent flow. Blurred and frozen videos score low: read it together with sharpness and flow.
      unmatched: share of pixels with inconsistent flow, where forward and backward flow disagree (the rule of Sundaram
        et al., 2010) because objects are covered, appear or fall apart.
    Raises:
      FlowError: if OpenCV is not installed.
    """
    cv2 = opencv()
    small = [_scaled(cv2, frame) for frame in frames]
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in small]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    lengths, errors, lost = [], [], []
    for n in range(len(small) - 1):
        forward, backward = dis.calc(gray[n], gray[n + 1], None), dis.calc(gray[n + 1], gray[n], None)
        back, inside = _warp(cv2, backward, forward)
        squares = np.sum(forward**2, -1) + np.sum(back**2, -1)
        holds = inside & (np.sum((forward + back) ** 2, -1) <= 0.01 * squares + 0.5)
        warped, _ = _warp(cv2, small[n + 1].astype(np.float32), forward)
        difference = np.abs(warped - small[n]).mean(-1)
        lengths.append(float(np.linalg.norm(forward, axis=-1).mean()))
        errors.append(float(difference[holds].mean()) if holds.any() else np.nan)
        lost.append(1 - float(holds.mean()))
    finite = [error for error in errors if np.isfinite(error)]
    return {
        "flow": 100 * float(np.mean(lengths)) / FLOW_SIDE,
        "warp_error": float(np.mean(finite)) if finite else float("nan"),
        "unmatched": float(np.mean(lost)),
    }


def opencv() -> Any:
    """Returns the module cv2, whose type stubs are incomplete.

    Raises:
      FlowError: if OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        message = 'optical flow needs OpenCV: pip install -e ".[eval]", or leave flow out with --noflow'
        raise FlowError(message) from error
    return cv2


def _scaled(cv2, frame: np.ndarray) -> np.ndarray:
    h, w = frame.shape[:2]
    scale = FLOW_SIDE / min(h, w)
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(frame, (round(w * scale), round(h * scale)), interpolation=kind)


def _warp(cv2, values: np.ndarray, flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `values [h, w, c]` sampled at the ends of `flow [h, w, 2]`, and whether each end is inside the frame."""
    h, w = flow.shape[:2]
    x, y = np.meshgrid(np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32))
    x, y = x + flow[..., 0], y + flow[..., 1]
    inside = (x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1)
    return cv2.remap(values, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), inside
