"""Comparisons of videos: sheets of frames and animations, with labels and gaps; PSNR."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

HEIGHT = 64  # pixels: smaller videos are enlarged by whole factors to about this height
GAP, SPACE = 2, 8  # pixels between frames, and between groups of rows


def enlarge(frames: np.ndarray, height: int = HEIGHT) -> np.ndarray:
    """Repeats the pixels of `frames [..., h, w, 3]` until they are about `height` pixels high."""
    factor = max(height // frames.shape[-3], 1)
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def sheet(rows: Sequence[tuple[str, np.ndarray]], group: int) -> np.ndarray:
    """Returns a picture uint8 `[h, w, 3]` of videos, one per row, with their labels.

    Args:
      rows: label and frames uint8 `[t, h, w, 3]` of each video, all of one shape.
      group: rows of a group, which a wider gap separates from the next.
    """
    labels = [label for label, _ in rows]
    left = label_width(labels)
    t, h, w = enlarge(rows[0][1]).shape[:3]
    groups = -(-len(rows) // group)
    canvas = Image.new("RGB", (left + t * (w + GAP), len(rows) * (h + GAP) + SPACE * (groups - 1)), "white")
    draw = ImageDraw.Draw(canvas)
    for n, (label, frames) in enumerate(rows):
        top = n * (h + GAP) + SPACE * (n // group)
        draw.text((4, top + h // 2 - 6), label, fill="black")
        for k, frame in enumerate(enlarge(frames)):
            canvas.paste(Image.fromarray(frame), (left + k * (w + GAP), top))
    return np.asarray(canvas)


def board(columns: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Returns an animation uint8 `[t, h, w, 3]` of videos side by side, one column per label.

    Args:
      columns: label and videos uint8 `[n, t, h, w, 3]` of each column, from top to bottom, all of one shape.
    """
    shown = [enlarge(videos) for _, videos in columns]
    n, t, h, w = shown[0].shape[:4]
    wide = max(w, label_width([label for label, _ in columns]))
    head = 16
    movie = np.full((t, head + n * (h + GAP), len(columns) * (wide + SPACE) - SPACE, 3), 255, np.uint8)
    titles = Image.new("RGB", (movie.shape[2], head), "white")
    draw = ImageDraw.Draw(titles)
    for c, ((label, _), videos) in enumerate(zip(columns, shown, strict=True)):
        left = c * (wide + SPACE)
        draw.text((left + wide // 2, 2), label, fill="black", anchor="ma")
        for row, video in enumerate(videos):
            top, start = head + row * (h + GAP), left + (wide - w) // 2
            movie[:, top : top + h, start : start + w] = video
    movie[:, :head] = np.asarray(titles)
    return movie


def label_width(labels: Sequence[str]) -> int:
    """Returns the pixels that labels take in Pillow's default font, with a margin."""
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return 10 + max(int(np.ceil(draw.textlength(label))) for label in labels)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio of uint8 arrays of one shape in dB; infinite if they are equal."""
    error = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))
    return float(10 * np.log10(255**2 / error)) if error else float("inf")
