"""Procedural world of moving shapes: endless clips with exactly known motion.

Each clip shows one shape on a plain background, which moves in a straight line and bounces off the borders. The first
frame does not determine the direction, so a still image has `directions * len(speeds)` equally likely futures. A model
that averages them draws a blur, a model that selects one draws a shape: the central question of one-step video
generation, small enough for a laptop.

Positions are (x, y) in pixels, x to the right and y down; the center of the top left pixel is (0.5, 0.5).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable

import numpy as np

from sfv_jax.choices import MOST_SEED
from sfv_jax.errors import UserError

PALETTE = {
    "red": (230, 57, 70),
    "orange": (247, 151, 30),
    "yellow": (250, 224, 80),
    "green": (80, 200, 110),
    "blue": (70, 140, 250),
    "violet": (190, 110, 240),
}
SHAPES = ("disc", "square", "triangle", "ring")
SPLITS = {"train": 0, "heldout": 1}
_EDGE = 0.5  # pixels; outlines fade from full to empty over the width of one pixel


@dataclasses.dataclass(frozen=True)
class Label:
    """Complete description of one clip for `World.render`.

    Attributes:
      shape, colour: names in `SHAPES` and `PALETTE`.
      background: index in `World.backgrounds`.
      radius: half the side of the shape's bounding box in pixels.
      start: (x, y) of the center in frame 0, in pixels.
      direction: index of the direction; see `World.angle`.
      speed: pixels per frame.
    """

    shape: str
    colour: str
    background: int
    radius: float
    start: tuple[float, float]
    direction: int
    speed: float


@dataclasses.dataclass(frozen=True)
class World:
    """Rules from which clips are drawn.

    Attributes:
      size: side of the square frame in pixels.
      num_frames: frames of a clip.
      shapes, colours: names in `SHAPES` and `PALETTE`.
      backgrounds: RGB colors in 0..255.
      directions, angle_offset: direction k points at `angle_offset + 360 k / directions` degrees; 0 is right, 90 down.
      speeds: pixels per frame.
      radii: smallest and largest radius in pixels.
      seed: seed of all clips.

    Raises:
      UserError: if the rules cannot be drawn.
    """

    size: int = 32
    num_frames: int = 8
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(PALETTE)
    backgrounds: tuple[tuple[int, int, int], ...] = ((22, 24, 34), (48, 40, 58), (30, 54, 58), (62, 56, 46))
    directions: int = 8
    angle_offset: float = 0.0
    speeds: tuple[float, ...] = (1.0, 2.0)
    radii: tuple[float, float] = (3.5, 6.0)
    seed: int = 0

    def __post_init__(self):
        unknown = sorted(set(self.shapes) - set(SHAPES)) + sorted(set(self.colours) - set(PALETTE))
        if unknown:
            raise UserError(f"unknown shapes or colours {unknown}; known: {SHAPES} and {tuple(PALETTE)}")
        if not (self.shapes and self.colours and self.backgrounds and self.speeds and self.directions > 0):
            raise UserError("a world needs at least one shape, colour, background, direction and speed")
        if not 0 < self.radii[0] <= self.radii[1] < self.size / 2 - _EDGE:
            raise UserError(f"radii {self.radii} must be positive, in order, and fit a frame of {self.size} pixels")
        if self.num_frames < 1 or not 0 <= self.seed <= MOST_SEED:
            raise UserError(f"need num_frames >= 1 and seed from 0 to {MOST_SEED}, got {self.num_frames}, {self.seed}")

    def label(self, index: int | np.integer, split: str = "train") -> Label:
        """Returns the label of clip `index`, a function of (seed, split, index) alone.

        Raises:
          UserError: if the split is unknown or the index is negative.
        """
        if split not in SPLITS or index < 0:
            raise UserError(f"need split in {tuple(SPLITS)} and index >= 0, got {split!r} and {index}")
        rng = np.random.default_rng((self.seed, SPLITS[split], int(index)))
        radius = rng.uniform(*self.radii)
        low, high = self.bounds(radius)
        return Label(
            shape=self.shapes[rng.integers(len(self.shapes))],
            colour=self.colours[rng.integers(len(self.colours))],
            background=int(rng.integers(len(self.backgrounds))),
            radius=float(radius),
            start=(float(rng.uniform(low, high)), float(rng.uniform(low, high))),
            direction=int(rng.integers(self.directions)),
            speed=float(self.speeds[rng.integers(len(self.speeds))]),
        )

    def bounds(self, radius: float) -> tuple[float, float]:
        """Returns the range of center coordinates, in pixels, that keep a shape of `radius` inside the frame."""
        return radius + _EDGE, self.size - radius - _EDGE

    def angle(self, direction: int) -> float:
        """Returns the angle of `direction` in radians; 0 is right, pi/2 down."""
        return math.radians(self.angle_offset) + 2 * math.pi * direction / self.directions

    def positions(self, label: Label) -> np.ndarray:
        """Returns the center in every frame: float64 `[t, 2]`, (x, y) in pixels, reflected at the borders."""
        low, high = self.bounds(label.radius)
        angle = self.angle(label.direction)
        velocity = label.speed * np.array([math.cos(angle), math.sin(angle)])
        straight = np.asarray(label.start) + np.arange(self.num_frames)[:, None] * velocity
        # A bounce between two walls is a triangle wave of the straight path.
        length = high - low
        return high - np.abs(np.mod(straight - low, 2 * length) - length)

    def coverage(self, label: Label) -> np.ndarray:
        """Returns the fraction of each pixel that the shape covers: float32 `[t, h, w]` in [0, 1]."""
        return self.stamp(label.shape, label.radius, self.positions(label))

    def stamp(self, shape: str, radius: float, centers: np.ndarray) -> np.ndarray:
        """Returns the coverage float32 `[n, h, w]` by a shape at each of `centers [n, 2]`, (x, y) in pixels."""
        centers = centers.astype(np.float32)
        grid = np.arange(self.size, dtype=np.float32) + 0.5
        x = grid[None, None, :] - centers[:, 0, None, None]
        y = grid[None, :, None] - centers[:, 1, None, None]
        return np.clip(_EDGE - _distance(shape, x, y, np.float32(radius)), 0, 1)

    def render(self, label: Label) -> np.ndarray:
        """Draws a label: uint8 `[t, h, w, 3]` RGB."""
        background = np.asarray(self.backgrounds[label.background], np.float32)
        contrast = np.asarray(PALETTE[label.colour], np.float32) - background
        return (background + self.coverage(label)[..., None] * contrast + 0.5).astype(np.uint8)

    def clip(self, index: int, split: str = "train") -> tuple[np.ndarray, Label]:
        """Returns clip `index` of `split`: (uint8 `[t, h, w, 3]`, its label)."""
        label = self.label(index, split)
        return self.render(label), label

    def batch(self, indices: Iterable[int], split: str = "train") -> tuple[np.ndarray, list[Label]]:
        """Returns several clips: (uint8 `[b, t, h, w, 3]`, their labels)."""
        labels = [self.label(index, split) for index in indices]
        return np.stack([self.render(label) for label in labels]), labels

    def futures(self, label: Label) -> list[Label]:
        """Returns all continuations of the same first frame, `label` included: all directions times all speeds."""
        motions = itertools.product(range(self.directions), self.speeds)
        return [dataclasses.replace(label, direction=k, speed=float(speed)) for k, speed in motions]


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.float32) -> np.ndarray:
    """Returns the signed distance to the outline in pixels, negative inside; the centroid is the origin."""
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
    if shape == "triangle":
        slopes = np.float32(math.sqrt(0.75)) * np.abs(x) - 0.5 * y
        return np.maximum(slopes, y) - 0.5 * radius
    from_center = np.sqrt(x * x + y * y)
    if shape == "ring":
        return np.abs(from_center - 0.75 * radius) - 0.25 * radius
    return from_center - radius
