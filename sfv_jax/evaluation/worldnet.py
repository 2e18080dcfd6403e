"""Small 3-D convolutional network for the procedural world; world-FVD is measured on its features.

It is trained to classify shapes, colors, directions and speeds of true clips, as I3D is trained on Kinetics. Training
takes a minute on two CPU cores for clips of 16x16 pixels and 6 frames, 300 CPU seconds for 32x32 and 14, and always
gives the same weights on one machine:

    python -m sfv_jax.evaluation.worldnet --config configs/world.py:teacher

trains it in advance and prints its accuracy; otherwise `load` trains it on first use and caches the result. A cached
network is used only if it is the one that was stored and classifies as well as then.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from einops import rearrange
from flax import nnx
from ml_collections import config_flags

from sfv_jax.config import world_of
from sfv_jax.config_check import check
from sfv_jax.data.worlds import Body, Label, World
from sfv_jax.models import tree
from sfv_jax.models.codec import to_signed
from sfv_jax.runtime import commands
from sfv_jax.runtime.files import FileError, one_line, parse_json, read_arrays, replacing

BODY_TASKS = ("shape", "colour", "direction", "speed")
CHEAP = 8192  # numbers of a clip, up to which the network is trained unasked, in about a minute
TOLERANCE = 0.01  # of the accuracy: devices round differently, and near the border of two classes that decides
Program = Callable[[tree.Params, np.ndarray], tuple[jax.Array, list[jax.Array]]]


@dataclass(frozen=True)
class Settings:
    """Architecture and training of the network; its file name contains a hash of them."""

    widths: tuple[int, int] = (32, 64)
    features: int = 32
    clips: int = 8192
    batch_size: int = 64
    steps: int = 1000
    lr: float = 3e-3
    seed: int = 0
    version: int = 1  # of this module; incremented when the same settings give other weights


@dataclass(frozen=True)
class Shape:
    """Sizes that determine the parameter shapes; `classes` is the number of classes of each of `tasks`."""

    widths: tuple[int, int]
    features: int
    classes: tuple[int, ...]


class Conv(nnx.Module):
    """3x3x3 convolution with zero padding, then ReLU, as a matrix product: XLA's 3-D convolution is slow on the CPU."""

    def __init__(self, i: int, o: int, stride: tuple[int, int, int], *, rngs):
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (27 * i, o)))
        self.bias = nnx.Param(jnp.zeros((o,)))
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
        strided = [[slice(k, k + n, s) for k in range(3)] for n, s in zip(x.shape[1:4], self.stride, strict=True)]
        taps = [padded[:, t, h, w] for t, h, w in itertools.product(*strided)]
        return nnx.relu(_product(jnp.concatenate(taps, axis=-1), self.kernel[...]) + self.bias[...])


class Linear(nnx.Module):
    """Linear layer on the last axis."""

    def __init__(self, i: int, o: int, *, rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (i, o)))
        self.bias = nnx.Param(jnp.zeros((o,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return _product(x, self.kernel[...]) + self.bias[...]


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies in fp32 on every device: by default TPUs use bfloat16 and GPUs use TF32."""
    return jnp.matmul(x, kernel, precision="highest")


class WorldNet(nnx.Module):
    """Maps frames `[b, t, h, w, 3]` in [-1, 1] to features `[b, d]` and logits `[b, classes]` of each of `tasks`."""

    def __init__(self, config: Shape, *, rngs):
        a, b = config.widths
        self.conv1 = Conv(12, a, (1, 2, 2), rngs=rngs)
        self.conv2 = Conv(a, b, (2, 1, 1), rngs=rngs)
        self.hidden = Linear(2 * b, config.features, rngs=rngs)
        self.heads = nnx.List([Linear(config.features, n, rngs=rngs) for n in config.classes])

    def __call__(self, frames: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        even = [(0, n % 2) for n in frames.shape[2:4]]
        frames = jnp.pad(frames, ((0, 0), (0, 0), *even, (0, 0)), mode="edge")
        patches = rearrange(frames, "b t (h p) (w q) c -> b t h w (p q c)", p=2, q=2)
        x = self.conv2(self.conv1(patches))
        features = self.hidden(jnp.concatenate([x.mean((1, 2, 3)), x.max((1, 2, 3))], axis=-1))
        return features, [head(nnx.relu(features)) for head in self.heads]


def tasks(world: World) -> tuple[str, ...]:
    """Returns the names of what is classified: `BODY_TASKS` of each body, and the drift of the background."""
    bodies = [f"{name} {n + 1}" if world.bodies > 1 else name for n in range(world.bodies) for name in BODY_TASKS]
    return (*bodies, "pan") if world.pans > 1 else tuple(bodies)


def classes(world: World, labels: list[Label]) -> np.ndarray:
    """Returns int32 `[n, tasks]`: the class of each label in each of `tasks`; bodies are sorted by color."""

    def of(body: Body) -> list[int]:
        colour = world.colours.index(body.colour)
        return [world.shapes.index(body.shape), colour, body.direction, world.speeds.index(body.speed)]

    rows = []
    for label in labels:
        bodies = sorted(map(of, label.bodies), key=lambda row: row[1])
        rows.append([*itertools.chain(*bodies), *([label.pan] if world.pans > 1 else [])])
    return np.array(rows, np.int32)


def shape_of(world: World, settings: Settings) -> Shape:
    """Returns the network's sizes for a world."""
    counts = (len(world.shapes), len(world.colours), world.directions, len(world.speeds)) * world.bodies
    return Shape(settings.widths, settings.features, counts + ((world.pans,) if world.pans > 1 else ()))


def train(world: World, settings: Settings) -> tuple[tree.Params, np.ndarray, dict[str, float]]:
    """Trains the network with Adam, always on the CPU.

    Returns:
      params: nested dict of numpy arrays.
      scale: standard deviations `[d]` of the features on 1024 held-out clips.
      accuracy: `{task: accuracy}` on the same clips.
    """
    shape, run = shape_of(world, settings), program(world, settings)
    graph, _ = tree.abstract(WorldNet, shape)
    optimizer = optax.adam(optax.cosine_decay_schedule(settings.lr, settings.steps))

    def loss(params, frames, target):
        _, logits = tree.build(graph, params)(to_signed(frames))
        losses = [optax.softmax_cross_entropy_with_integer_labels(x, target[:, n]) for n, x in enumerate(logits)]
        return jnp.mean(sum(losses))

    @jax.jit
    def step(params, state, frames, target):
        updates, state = optimizer.update(jax.grad(loss)(params, frames, target), state)
        return optax.apply_updates(params, updates), state

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        frames, labels = world.batch(range(settings.clips))
        target = classes(world, labels)
        params = tree.init(WorldNet, shape, settings.seed)
        state, rng = optimizer.init(params), np.random.default_rng(settings.seed)
        for _ in range(settings.steps):
            rows = rng.choice(settings.clips, settings.batch_size, replace=False)
            params, state = step(params, state, frames[rows], target[rows])
        params = jax.tree.map(np.asarray, params)
        features, accuracy = examine(world, run, params)
    return params, features.std(axis=0) + 1e-6, accuracy


def program(world: World, settings: Settings) -> Program:
    """Returns the compiled network: from parameters and uint8 `[b, t, h, w, 3]` to features `[b, d]` and logits."""
    graph, _ = tree.abstract(WorldNet, shape_of(world, settings))
    return jax.jit(lambda params, frames: tree.build(graph, params)(to_signed(frames)))


def examine(world: World, run: Program, params: tree.Params) -> tuple[np.ndarray, dict[str, float]]:
    """Returns the features `[n, d]` of 1024 held-out clips, and the accuracy by task."""
    frames, labels = world.batch(range(1024), "heldout")
    features, logits = _outputs(run, params, frames)
    right = (np.stack([x.argmax(-1) for x in logits], 1) == classes(world, labels)).mean(0)
    return features, {name: float(value) for name, value in zip(tasks(world), right, strict=True)}


def _outputs(run: Program, params: tree.Params, frames: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns features and logits, computed 256 clips at a time."""
    parts = [run(params, frames[n : n + 256]) for n in range(0, len(frames), 256)]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def load(world: World, cache: str | Path | None = None, settings: Settings | None = None) -> tuple[Callable, dict]:
    """Loads the network for `world` from the cache; a missing or damaged one is trained and stored there.

    Args:
      world: the procedural world.
      cache: folder, default `$XDG_CACHE_HOME/sfv_jax` or `~/.cache/sfv_jax`.
      settings: default `Settings()`.
    Returns:
      features: function from uint8 `[b, t, h, w, 3]` to float32 `[b, d]`; each feature has standard deviation 1 over
        true clips.
      description: `sha256` of the network, held-out `accuracy` by task, `seconds` of training and the `settings`.
    """
    settings = settings or Settings()
    path, run = _place(cache) / f"world-{identity(world, settings)}.npz", program(world, settings)
    try:
        params, scale, about = _read(path, world, settings, run)
    except FileError as error:
        why = f"{error}; " if path.exists() else ""
        print(f"{one_line(why)}training the network of world-FVD, for {path}; this takes minutes", file=sys.stderr)
        began = time.monotonic()
        params, scale, accuracy = train(world, settings)
        arrays: dict[str, Any] = tree.flatten(params) | {"scale": scale}
        about = {"accuracy": accuracy, "sha256": _digest(world, settings, arrays, accuracy)}
        about |= {"seconds": round(time.monotonic() - began, 1)}
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, about=json.dumps(about), **arrays)

    def features(frames: np.ndarray) -> np.ndarray:
        return _outputs(run, params, frames)[0] / scale

    return features, about | {"settings": dataclasses.asdict(settings)}


def _read(path: Path, world: World, settings: Settings, run: Program) -> tuple[tree.Params, np.ndarray, dict]:
    """Reads parameters, standard deviations of the features and description of a stored network.

    Raises:
      FileError: if the file is missing, damaged or of another network, or the network classifies worse or better than
        when it was stored.
    """
    arrays = read_arrays(path, "it is made again", ("about", "scale"))
    try:
        about = parse_json(str(arrays.pop("about")).encode())
        accuracy = {name: float(about["accuracy"][name]) for name in tasks(world)}
        about["seconds"] = float(about["seconds"])
        if about["sha256"] != _digest(world, settings, arrays, accuracy):
            raise ValueError("its SHA-256 is another")
    except (ValueError, TypeError, KeyError) as error:
        raise FileError(f"{path} is not what was stored; it is made again") from error
    scale = arrays.pop("scale")
    params = tree.unflatten(arrays)
    found = examine(world, run, params)[1]
    if any(abs(found[name] - accuracy[name]) > TOLERANCE for name in accuracy):
        raise FileError(f"{path} has accuracy {found}, not {accuracy}; it is made again")
    return params, scale, about


def _digest(world: World, settings: Settings, arrays: dict[str, Any], accuracy: dict[str, float]) -> str:
    """Returns the SHA-256 of a network, of what determines it and of its accuracy."""
    digest = hashlib.sha256(f"{identity(world, settings)} {json.dumps(accuracy, sort_keys=True)}".encode())
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.dtype} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()


def identity(world: World, settings: Settings) -> str:
    """Returns 16 hexadecimal digits of a hash of everything that determines the weights."""
    content = json.dumps([dataclasses.asdict(world), dataclasses.asdict(settings)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def at_hand(world: World, cache: str | Path | None = None) -> Path | None:
    """Returns the folder of a network that is cheap to train or stored already; None if it would have to be trained.

    Clips of the package's models have five times as many numbers as `CHEAP`.
    """
    cheap = world.num_frames * world.size**2 * 3 <= CHEAP
    folder = _place(cache)
    return folder if cheap or (folder / f"world-{identity(world, Settings())}.npz").is_file() else None


def _place(cache: str | Path | None) -> Path:
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(cache) if cache else users / "sfv_jax"


FLAGS = flags.FLAGS


def main() -> None:
    check(FLAGS.config)
    _, about = load(world_of(FLAGS.config), FLAGS.cache)
    accuracy = ", ".join(f"{name} {value:.3f}" for name, value in about["accuracy"].items())
    print(f"held-out accuracy: {accuracy}; trained in {about['seconds']:.0f} s")


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", "configs/world.py:teacher", "a config with data.world")
    flags.DEFINE_string("cache", None, "folder for the network; default: the user's cache")


if __name__ == "__main__":
    commands.run(main, define_flags)
