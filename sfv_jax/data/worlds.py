"""Procedural world of moving shapes: endless clips with exactly known motion.

Each clip shows one or more bodies on a background. Bodies move in straight lines and bounce off the borders of the
frame; later ones pass in front of earlier ones. The background can have a texture that drifts, as under a panning
camera. The first frame does not determine the directions, so a still image has many equally likely futures:
`directions * len(speeds)` for each body, times `pans`. A model that averages them draws a blur, a model that selects
one draws shapes: the central question of one-step video generation, small enough for a laptop.

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
WAVES = 4  # sinusoids of a background
MOST_FUTURES = 4096
ALL = slice(None)
_EDGE = 0.5  # pixels; outlines fade from full to empty over the width of one pixel
_TEXTURE = 1 << 16  # number of the background's random stream; bodies have 1, 2, ...
_TRIES = 64  # places tried for a body that should not cover another one


@dataclasses.dataclass(frozen=True)
class Body:
    """One moving shape.

    Attributes:
      shape, colour: names in `SHAPES` and `PALETTE`.
      radius: half the side of the shape's bounding box in pixels.
      start: (x, y) of the center in frame 0, in pixels.
      direction: index of the direction; see `World.angle`.
      speed: pixels per frame.
      turn: rotation in frame 0, in radians, clockwise on the screen.
    """

    shape: str
    colour: str
    radius: float
    start: tuple[float, float]
    direction: int
    speed: float
    turn: float = 0.0


@dataclasses.dataclass(frozen=True)
class Wave:
    """One sinusoid of a background's texture: `amplitude * cos(2 pi (x periods_x + y periods_y) / size + phase)`.

    It is periodic in the frame, so a drifting background shows nothing that the first frame does not.

    Attributes:
      periods: (x, y), whole periods over the frame.
      phase: in radians, in frame 0.
      amplitude: red, green and blue, in gray levels.
    """

    periods: tuple[int, int]
    phase: float
    amplitude: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Label:
    """Complete description of one clip for `World.render`.

    Attributes:
      bodies: from back to front.
      background: index in `World.backgrounds`.
      waves: texture of the background.
      pan: index of the direction in which the background drifts.
    """

    bodies: tuple[Body, ...]
    background: int
    waves: tuple[Wave, ...] = ()
    pan: int = 0


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
      bodies: number of bodies; their colors differ, and they do not overlap in frame 0 if there is room.
      shade: brightness of one half of each body, 1 for a plain one.
      rolling: whether bodies turn as if they rolled along the bottom.
      texture: RMS amplitude of the background's texture in gray levels, 0 for a plain one.
      finest: most periods of the texture over the frame, from 2.
      pans, pan_speed: number of directions in which the background drifts, at `360 k / pans` degrees, and its speed in
        pixels per frame.
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
    bodies: int = 1
    shade: float = 1.0
    rolling: bool = False
    texture: float = 0.0
    finest: int = 4
    pans: int = 1
    pan_speed: float = 0.0
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
        if not 1 <= self.bodies <= len(self.colours):
            raise UserError(f"bodies={self.bodies}: from 1 to {len(self.colours)}, as each has its own colour")
        if self.finest < 2:
            raise UserError(f"need finest >= 2, got {self.finest}")
        if self.pans < 1 or not 0 <= self.shade <= 1:
            raise UserError(f"need pans >= 1 and shade from 0 to 1, got {self.pans} and {self.shade}")
        count = (self.directions * len(self.speeds)) ** self.bodies * self.pans
        if count > MOST_FUTURES:
            raise UserError(
                f"a first frame has {count} futures, the scores of a world draw at most {MOST_FUTURES}: "
                "take fewer bodies, directions, speeds or pans"
            )

    def label(self, index: int | np.integer, split: str = "train") -> Label:
        """Returns the label of clip `index`, a function of (seed, split, index) alone.

        Raises:
          UserError: if the split is unknown or the index is negative.
        """
        if split not in SPLITS or index < 0:
            raise UserError(f"need split in {tuple(SPLITS)} and index >= 0, got {split!r} and {index}")
        entropy = self.seed, SPLITS[split], int(index)
        rng = np.random.default_rng(entropy)
        radius = rng.uniform(*self.radii)
        shape = self.shapes[rng.integers(len(self.shapes))]
        colour = self.colours[rng.integers(len(self.colours))]
        background = int(rng.integers(len(self.backgrounds)))
        bodies = [self._body(rng, radius, shape, colour, [])]
        for n in range(1, self.bodies):
            rng = np.random.default_rng((*entropy, n))
            radius = rng.uniform(*self.radii)
            shape = self.shapes[rng.integers(len(self.shapes))]
            left = [name for name in self.colours if name not in {body.colour for body in bodies}]
            bodies.append(self._body(rng, radius, shape, left[rng.integers(len(left))], bodies))
        rng = np.random.default_rng((*entropy, _TEXTURE))
        waves = _waves(rng, self.texture, self.finest) if self.texture else ()
        return Label(tuple(bodies), background, waves, int(rng.integers(self.pans)))

    def _body(self, rng: np.random.Generator, radius: float, shape: str, colour: str, others: list[Body]) -> Body:
        """Returns a body that covers none of `others` in frame 0, if a place is found."""
        low, high = self.bounds(radius)
        start = (0.0, 0.0)
        for _ in range(_TRIES if others else 1):
            start = (float(rng.uniform(low, high)), float(rng.uniform(low, high)))
            if all(math.dist(start, other.start) > radius + other.radius for other in others):
                break
        direction, speed = int(rng.integers(self.directions)), float(self.speeds[rng.integers(len(self.speeds))])
        turn = float(rng.uniform(0, 2 * math.pi)) if self.rolling else 0.0
        return Body(shape, colour, float(radius), start, direction, speed, turn)

    def bounds(self, radius: float) -> tuple[float, float]:
        """Returns the range of center coordinates, in pixels, that keep a shape of `radius` inside the frame."""
        return radius + _EDGE, self.size - radius - _EDGE

    def angle(self, direction: int) -> float:
        """Returns the angle of `direction` in radians; 0 is right, pi/2 down."""
        return math.radians(self.angle_offset) + 2 * math.pi * direction / self.directions

    def positions(self, body: Body) -> np.ndarray:
        """Returns the center in every frame: float64 `[t, 2]`, (x, y) in pixels, reflected at the borders."""
        low, high = self.bounds(body.radius)
        angle = self.angle(body.direction)
        velocity = body.speed * np.array([math.cos(angle), math.sin(angle)])
        straight = np.asarray(body.start) + np.arange(self.num_frames)[:, None] * velocity
        # A bounce between two walls is a triangle wave of the straight path.
        length = high - low
        return high - np.abs(np.mod(straight - low, 2 * length) - length)

    def stamp(self, body: Body, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draws `body` at other places, turned as it is when it rolls there.

        Args:
          body: only its shape, radius, start and turn matter.
          centers: `[n, 2]`, (x, y) in pixels.

        Returns:
          coverage: fraction of each pixel that the body covers, float32 `[n, h, w]` in [0, 1].
          tone: brightness of the body's color in each pixel, float32 `[n, h, w]` in [shade, 1].
        """
        turns = np.full(len(centers), body.turn)
        if self.rolling:
            turns += (centers[:, 0] - body.start[0]) / body.radius
        centers = centers.astype(np.float32)
        grid = np.arange(self.size, dtype=np.float32) + 0.5
        x = grid[None, None, :] - centers[:, 0, None, None]
        y = grid[None, :, None] - centers[:, 1, None, None]
        if self.rolling:
            cos, sin = (f(turns).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
            x, y = cos * x + sin * y, cos * y - sin * x
        coverage = np.clip(_EDGE - _distance(body.shape, x, y, np.float32(body.radius)), 0, 1)
        dark = np.clip(_EDGE - y, 0, 1) if self.shade < 1 else np.float32(0)
        return coverage, np.broadcast_to(1 - np.float32(1 - self.shade) * dark, coverage.shape)

    def coverage(self, body: Body) -> np.ndarray:
        """Returns the fraction of each pixel that the body covers, alone: float32 `[t, h, w]` in [0, 1]."""
        return self.stamp(body, self.positions(body))[0]

    def background(self, label: Label, part: slice = ALL) -> np.ndarray:
        """Returns the frames of `part` without bodies: float32 `[t, h, w, 3]`, not rounded or clipped."""
        times = np.arange(self.num_frames)[part]
        plain = np.asarray(self.backgrounds[label.background], np.float32)
        frames = np.broadcast_to(plain, (len(times), self.size, self.size, 3)).copy()
        angle = 2 * math.pi * label.pan / self.pans
        drift = self.pan_speed * times[:, None] * [math.cos(angle), math.sin(angle)]
        grid = np.arange(self.size) + 0.5
        for wave in label.waves:
            k = 2 * math.pi / self.size * np.asarray(wave.periods)
            place = (grid * k[0])[None, None] + (grid * k[1])[None, :, None] - (drift @ k)[:, None, None]
            frames += np.cos(place + wave.phase).astype(np.float32)[..., None] * np.asarray(wave.amplitude, np.float32)
        return frames

    def paint(self, frames: np.ndarray, body: Body, part: slice = ALL) -> np.ndarray:
        """Returns `frames` of `part`, float32 `[..., t, h, w, 3]`, with `body` in front."""
        coverage, tone = self.stamp(body, self.positions(body)[part])
        return frames + coverage[..., None] * (tone[..., None] * np.asarray(PALETTE[body.colour], np.float32) - frames)

    def render(self, label: Label, part: slice = ALL) -> np.ndarray:
        """Draws a label, or a part of its frames: uint8 `[t, h, w, 3]` RGB."""
        frames = self.background(label, part)
        for body in label.bodies:
            frames = self.paint(frames, body, part)
        return _pixels(frames)

    def clip(self, index: int, split: str = "train") -> tuple[np.ndarray, Label]:
        """Returns clip `index` of `split`: (uint8 `[t, h, w, 3]`, its label)."""
        label = self.label(index, split)
        return self.render(label), label

    def batch(self, indices: Iterable[int], split: str = "train") -> tuple[np.ndarray, list[Label]]:
        """Returns several clips: (uint8 `[b, t, h, w, 3]`, their labels)."""
        labels = [self.label(index, split) for index in indices]
        return np.stack([self.render(label) for label in labels]), labels

    def motions(self, body: Body) -> list[Body]:
        """Returns `body` with all its possible motions: all directions times all speeds."""
        motions = itertools.product(range(self.directions), self.speeds)
        return [dataclasses.replace(body, direction=k, speed=float(speed)) for k, speed in motions]

    def futures(self, label: Label) -> list[Label]:
        """Returns all continuations of the same first frame, `label` included: all motions of bodies and background."""
        motions = [self.motions(body) for body in label.bodies]
        return [
            dataclasses.replace(label, bodies=bodies, pan=pan)
            for pan in range(self.pans)
            for bodies in itertools.product(*motions)
        ]

    def render_futures(self, label: Label) -> np.ndarray:
        """Draws all of `futures(label)`, in their order: uint8 `[n, t, h, w, 3]`."""
        drawn = np.stack([self.background(dataclasses.replace(label, pan=pan)) for pan in range(self.pans)])
        for body in label.bodies:
            drawn = np.stack([self.paint(drawn, moved) for moved in self.motions(body)], axis=1)
            drawn = drawn.reshape(-1, *drawn.shape[2:])
        return _pixels(drawn)


def _pixels(frames: np.ndarray) -> np.ndarray:
    return np.clip(frames + 0.5, 0, 255).astype(np.uint8)


def _waves(rng: np.random.Generator, texture: float, finest: int) -> tuple[Wave, ...]:
    """Returns random waves whose sum has the RMS amplitude `texture`, in the mean of the colors."""
    lines = [(x, y) for x in range(finest + 1) for y in range(-finest, finest + 1) if (x, y) > (0, 0)]
    lines = [line for line in lines if math.hypot(*line) <= finest]
    chosen = rng.choice(len(lines), WAVES, replace=False)
    # Coarse waves are stronger, as in natural images.
    colors = rng.standard_normal((WAVES, 3)) + 1.5 * rng.standard_normal((WAVES, 1))
    colors /= np.sqrt([[math.hypot(*lines[n])] for n in chosen])
    colors *= texture / np.sqrt(np.square(colors).sum() / 6)
    phases = rng.uniform(0, 2 * math.pi, WAVES)
    return tuple(
        Wave(lines[n], float(phase), (float(color[0]), float(color[1]), float(color[2])))
        for n, phase, color in zip(chosen, phases, colors, strict=True)
    )


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
