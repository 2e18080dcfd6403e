"""Scores of how frames move: energy, frozen videos, optical flow and what it cannot explain.

Frames are uint8 `[t, h, w, 3]` RGB, t >= 2. Optical flow is DIS (Kroeger et al., arXiv 1603.03590) from OpenCV, an
optional dependency: `pip install "sfv_jax[eval]"`.
"""

import numpy as np

from sfv_jax.errors import UserError
from sfv_jax.evaluation.appearance import luma

FLOW_SIDE = 288  # short side in pixels at which flow is computed, so that sizes compare
CHANGE = 8.0  # grey levels of luma: what counts as a change of a pixel
FROZEN_SHARE = 0.01  # a video in which fewer pixels change is frozen


class FlowError(UserError):
    """Optical flow cannot be computed here; the message says what to install."""


def motion_energy(frames: np.ndarray) -> float:
    """Mean absolute difference of consecutive frames, in grey levels of 0..255, over all pixels and channels.

    Flicker and noise count as motion, and strong edges count more than weak ones.
    """
    x = frames.astype(np.int16)
    return float(np.abs(np.diff(x, axis=0)).mean())


def changed_share(frames: np.ndarray) -> float:
    """Share of pixels whose luma in some frame differs from the first frame's by more than `CHANGE` grey levels."""
    y = luma(frames)
    return float((np.abs(y[1:] - y[0]).max(axis=0) > CHANGE).mean())


def is_frozen(frames: np.ndarray) -> bool:
    """Whether the video shows its first frame all along: less than `FROZEN_SHARE` of the pixels ever change."""
    return changed_share(frames) < FROZEN_SHARE


def flow_scores(frames: np.ndarray) -> dict[str, float]:
    """Optical flow between consecutive frames, means over the video.

    The frames are scaled so that their short side has `FLOW_SIDE` pixels.

    Returns:
      flow: length of the flow in percent of the short side, per frame.
      warp_error: mean absolute difference in grey levels between a frame and the next one warped back onto it, where
        the flow holds. Blurred and frozen videos score low: read it beside sharpness and flow.
      unmatched: share of pixels where it does not hold: forward and backward flow disagree (the rule of Sundaram et
        al., 2010), because something was covered, appeared or fell apart.
    Raises:
      FlowError: if OpenCV is not installed.
    """
    cv2 = opencv()
    small = [_scaled(cv2, frame) for frame in frames]
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in small]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    lengths, errors, lost = [], [], []
    for n in range(len(small) - 1):
        forward, backward = dis.calc(grey[n], grey[n + 1], None), dis.calc(grey[n + 1], grey[n], None)
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


def opencv():
    """The module cv2. Raises FlowError if it is not installed."""
    try:
        import cv2
    except ImportError as error:
        message = 'optical flow needs OpenCV: pip install "sfv_jax[eval]", or leave flow out with --noflow'
        raise FlowError(message) from error
    return cv2


def _scaled(cv2, frame: np.ndarray) -> np.ndarray:
    h, w = frame.shape[:2]
    scale = FLOW_SIDE / min(h, w)
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(frame, (round(w * scale), round(h * scale)), interpolation=kind)


def _warp(cv2, values: np.ndarray, flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(`values [h, w, c]` read where `flow [h, w, 2]` points, whether that is inside the frame)."""
    h, w = flow.shape[:2]
    x, y = np.meshgrid(np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32))
    x, y = x + flow[..., 0], y + flow[..., 1]
    inside = (x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1)
    return cv2.remap(values, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), inside
