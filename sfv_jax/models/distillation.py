"""Networks that exist only while a tiny decoder is trained: projectors of its features, and a critic of its pixels."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sfv_jax.models.layers import Conv2d

Array = jax.Array


@dataclass(frozen=True)
class ProjectorsConfig:
    """Widths of the student's and of the teacher's levels, from the latents' resolution up."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]


class Projectors(nnx.Module):
    """One 1x1 convolution per level, from the student's features to the width of the teacher's."""

    def __init__(self, config: ProjectorsConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kw: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        pairs = zip(config.student, config.teacher, strict=True)
        self.levels = nnx.List([Conv2d(i, o, 1, **kw) for i, o in pairs])

    def __call__(self, levels: list[Array]) -> list[Array]:
        """Returns the projected features of each level `[b, t, h, w, c]`."""
        return [project(x) for project, x in zip(self.levels, levels, strict=True)]


@dataclass(frozen=True)
class CriticConfig:
    """Widths of the critic's layers; the first two halve the resolution."""

    in_channels: int = 3
    widths: tuple[int, ...] = (32, 64, 64)


class PatchCritic(nnx.Module):
    """Logit per patch of each frame, seen with its two neighbors in time: `[b, t, h, w, 3] -> [b, t, h/4, w/4, 1]`.

    Three frames show flicker, as in the published notebook of TAESDV's author (Seraena). At either end of the clip the
    frame itself stands for the missing neighbor.
    """

    def __init__(self, config: CriticConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        kw: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        widths = (3 * config.in_channels, *config.widths)
        self.convs = nnx.List(
            Conv2d(i, o, 3, stride=2 if n < 2 else 1, padding=1, **kw)
            for n, (i, o) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.conv_out = Conv2d(widths[-1], 1, 3, padding=1, **kw)

    def __call__(self, frames: Array) -> Array:
        before = jnp.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
        after = jnp.concatenate([frames[:, 1:], frames[:, -1:]], axis=1)
        x = jnp.concatenate([before, frames, after], axis=-1)
        for conv in self.convs:
            x = nnx.leaky_relu(conv(x), 0.2)
        return self.conv_out(x)
